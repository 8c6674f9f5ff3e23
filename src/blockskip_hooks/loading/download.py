"""The files of a model: found or downloaded, and checked before any of them is loaded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError

from ..utils.errors import UserError, first_line
from .component_config import MODULAR_INDEX, read_index


_COMMIT = re.compile("[0-9a-f]{40}")
# A variant comes before or behind the numbers of a shard.
_VARIANT = re.compile(r"[\w-]*?model(?:-\d+-of-\d+)?\.(\w+?)(?:-\d+-of-\d+)?\.safetensors")
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
# All that a plan reads: configs, indices of weights, tokenizers.
_PLAN_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
    configs_only: bool = False,
    unread: Callable[[str], Collection[str]] = lambda pipeline: (),
) -> Path:
    """The local folder of a model; a hub id is downloaded as its pipeline would be.

    Args:
        name: Value of ``--pretrained_model_name_or_path``.
        revision: Branch, tag or commit on the hub.
        variant: Weight variant in the file names, such as ``"fp16"``.
        cache_dir: Where downloads are kept; ``None`` for the hub's own cache.
        token: Access token of the hub.
        configs_only: Download no weights, which a plan does without.
        unread: Components that nothing loads, by the name of the pipeline's class: of a modular one, which says of no
            component that it is optional, they stay on the hub.

    Raises:
        UserError: if it is neither a folder nor a hub id that can be downloaded.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a single file, and a model is a folder in diffusers' layout; "
            "make one of it with from_single_file and save_pretrained, as docs/troubleshooting.md shows."
        )
    verbosity = diffusers.logging.get_verbosity()
    # The error below says in one line what the library would warn of.
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    try:
        place: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        if configs_only:
            return Path(snapshot_download(name, allow_patterns=list(_PLAN_FILES), **place))
        folder = _download(name, variant, place, unread)
    except Exception as error:
        raise UserError(f"--pretrained_model_name_or_path {_why_not(name, error)}") from error
    finally:
        diffusers.logging.set_verbosity(verbosity)
    _fetch_card(name, folder, revision, cache_dir, token)
    return folder


def _why_not(name: str, error: Exception) -> str:
    """Why a model could not be downloaded, and what to do."""
    if Path(name).is_absolute() or name.startswith((".", "~")):  # No hub id is like that.
        return f"{name} is not there; name the folder of a model, or its id on the hub."
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its licence on {constants.ENDPOINT}/{name}, then run: hf auth login"
    if constants.HF_HUB_OFFLINE:
        return f"{name} is not a folder, and not whole in the hub's cache; unset HF_HUB_OFFLINE to download it."
    # The hub client raises many types for a missing id or no network.
    return (
        f"{name} is not a folder and could not be downloaded ({first_line(error)}); check the name, your access to it "
        "and the network."
    )


def _download(name: str, variant: str | None, place: dict[str, Any], unread: Callable[[str], Collection[str]]) -> Path:
    """The files of a pipeline on the hub, as its class would download them."""
    try:
        return Path(DiffusionPipeline.download(name, variant=variant, use_safetensors=True, **place))
    except OSError as error:
        try:
            index = read_index(Path(hf_hub_download(name, MODULAR_INDEX, **place)).parent)
        except GatedRepoError:
            raise
        except Exception:  # as above; what went wrong first says more
            raise error from None
    kinds = (*_PLAN_FILES, f"*{variant}*.safetensors" if variant else "*.safetensors")
    left_out = unread(str(index.get("_class_name")))
    parts = [name for name, entry in index.items() if isinstance(entry, list) and name not in left_out]
    patterns = [f"{part}/{kind}" for part in parts for kind in kinds]
    return Path(snapshot_download(name, allow_patterns=[MODULAR_INDEX, *patterns], **place))


def resolve_component(
    name: str | Path, subfolder: str | None, *, variant: str | None = None, revision: str | None = None
) -> Path:
    """The local folder of one component of a pipeline; of a hub id nothing else is downloaded.

    Args:
        name: Folder of the pipeline, or its id on the hub.
        subfolder: The component's folder inside; ``None`` where ``name`` is the component itself.
        variant: Weight variant in the file names, such as ``"fp16"``.
        revision: Branch, tag or commit on the hub.

    Raises:
        UserError: if it is neither a folder with such a component nor a hub id that can be downloaded.
    """
    folder, inside = Path(name), f"{subfolder}/" if subfolder else ""
    if not folder.exists():
        weights = f"*{variant}*.safetensors" if variant else "*.safetensors"
        try:
            patterns = [f"{inside}*.json", f"{inside}{weights}"]
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=patterns))
        except Exception as error:
            raise UserError(_why_not(str(name), error)) from error
    if not (folder / inside / "config.json").is_file():
        raise UserError(
            f"{name} has no {inside}config.json; give the folder of a pipeline in diffusers' layout and, as "
            "subfolder, its component, or subfolder=None for a component's own folder."
        )
    return folder / inside


def _fetch_card(name: str, folder: Path, revision: str | None, cache_dir: str | None, token: str | None) -> None:
    """Bring a hub model's card beside its files where it is not: it names the licence."""
    # A folder of the hub's cache is named after the commit it holds; a card that is there is not asked for again.
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    # A run does without the card, whatever goes wrong.
    with contextlib.suppress(Exception):
        hf_hub_download(name, "README.md", revision=commit, cache_dir=cache_dir, token=token)


def has_weights(folder: Path) -> bool:
    """Whether a model or one of its components is there with weights, and not as configs alone."""
    return any(path.suffix in _WEIGHTS for path in folder.rglob("*"))


def check_weights(model_path: Path, text_components: Sequence[str], variant: str | None) -> None:
    """Check that every component has the weight files that its stage will ask for.

    Args:
        model_path: Folder of a pipeline.
        text_components: Its components that encode prompts.
        variant: Weight variant in the file names.

    Raises:
        UserError: naming the component and the flag.
    """
    with_weights = [name for name in text_components if (model_path / name / "config.json").is_file()]
    for name in ("transformer", "vae", *with_weights):
        files = [path.name for path in (model_path / name).glob("*.safetensors")]
        if not files:
            of_variant = f" of --variant {variant}" if variant else ""
            raise UserError(
                f"--pretrained_model_name_or_path {model_path}: {name} holds no safetensors weights{of_variant}."
            )
        variants = {match[1] for file in files if (match := _VARIANT.fullmatch(file))}
        if not variant and not any(_VARIANT.fullmatch(file) is None for file in files):
            raise UserError(
                f"--pretrained_model_name_or_path {model_path}: {name} holds only the variant "
                f"{', '.join(sorted(variants))} of its weights; give --variant {min(variants)}."
            )
        # The transformer's reader takes weights without the variant where there are no others.
        if variant and name != "transformer" and not any(f".{variant}" in file for file in files):
            raise UserError(f"--variant {variant}: {model_path / name} has no such weights, only {', '.join(files)}.")
