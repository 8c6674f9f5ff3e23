"""The files of a model: found or downloaded, and checked before any of them is loaded."""

from __future__ import annotations

import argparse
import contextlib
import re
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download

from ..families import Family


_COMMIT = re.compile("[0-9a-f]{40}")
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
# All that a plan reads: configs, indices of weights, tokenizers.
_PLAN_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def resolve_model(args: argparse.Namespace) -> Path:
    """The local folder of ``--pretrained_model_name_or_path``; a hub id is downloaded as a pipeline would be.

    For ``--plan_only`` only what is not weights is.

    Raises:
        ValueError: if it is neither a folder nor a hub id that can be downloaded.
    """
    name = args.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    verbosity = diffusers.logging.get_verbosity()
    # What it warns of is said in our one line.
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    try:
        place = {"revision": args.revision, "cache_dir": args.cache_dir, "token": args.hub_token}
        if getattr(args, "plan_only", False):
            return Path(snapshot_download(name, allow_patterns=list(_PLAN_FILES), **place))
        folder = Path(DiffusionPipeline.download(name, variant=args.variant, use_safetensors=True, **place))
        _fetch_card(args, folder)
        return folder
    except Exception as error:
        # The hub client raises many types for a missing id, a gated model, or no network.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"--pretrained_model_name_or_path {name} is not a folder and could not be downloaded ({reason}); check "
            "the name, your access to it and the network."
        ) from error
    finally:
        diffusers.logging.set_verbosity(verbosity)


def _fetch_card(args: argparse.Namespace, folder: Path) -> None:
    """Bring a hub model's card beside its files, where it is not: it names the licence."""
    # Folders of the hub's cache are named after the revision they hold; one that is there is not asked for again.
    revision = folder.name if _COMMIT.fullmatch(folder.name) else args.revision
    # Whatever goes wrong, a run does without.
    with contextlib.suppress(Exception):
        hf_hub_download(
            args.pretrained_model_name_or_path,
            "README.md",
            revision=revision,
            cache_dir=args.cache_dir,
            token=args.hub_token,
        )


def has_weights(folder: Path) -> bool:
    """Whether a model or one of its components is there with weights, and not as configs alone."""
    return any(path.suffix in _WEIGHTS for path in folder.rglob("*"))


def check_weights(model_path: Path, family: type[Family], variant: str | None) -> None:
    """Check that every component has the weight files that its stage will ask for.

    Raises:
        ValueError: naming the component and the flag.
    """
    with_weights = [name for name in family.text_components if (model_path / name / "config.json").is_file()]
    for name in ("transformer", "vae", *with_weights):
        files = [path.name for path in (model_path / name).glob("*.safetensors")]
        if not files:
            raise ValueError(f"--pretrained_model_name_or_path {model_path}: {name} holds no safetensors weights.")
        # The transformer's reader takes weights without the variant where there are no others.
        if variant and name != "transformer" and not any(f".{variant}" in file for file in files):
            raise ValueError(f"--variant {variant}: {model_path / name} has no such weights, only {', '.join(files)}.")
