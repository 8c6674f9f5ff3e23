"""The files of a model: found or downloaded, and checked before any of them is loaded."""

from __future__ import annotations

import argparse
import contextlib
import re
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from ..families import Family


_COMMIT = re.compile("[0-9a-f]{40}")
# A variant comes before or behind the numbers of a shard.
_VARIANT = re.compile(r"[\w-]*?model(?:-\d+-of-\d+)?\.(\w+?)(?:-\d+-of-\d+)?\.safetensors")


def resolve_model(args: argparse.Namespace) -> Path:
    """The local folder of ``--pretrained_model_name_or_path``; a hub id is downloaded as a pipeline would be.

    Raises:
        ValueError: if it is neither a folder nor a hub id that can be downloaded.
    """
    name = args.pretrained_model_name_or_path
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ValueError(
            f"--pretrained_model_name_or_path {name} is a single file, and a model is a folder in diffusers' layout; "
            "make one of it with from_single_file and save_pretrained, as docs/troubleshooting.md shows."
        )
    verbosity = diffusers.logging.get_verbosity()
    # What it warns of is said in our one line.
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    try:
        folder = Path(
            DiffusionPipeline.download(
                name,
                revision=args.revision,
                variant=args.variant,
                cache_dir=args.cache_dir,
                token=args.hub_token,
                use_safetensors=True,
            )
        )
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
        variants = {match[1] for file in files if (match := _VARIANT.fullmatch(file))}
        if not variant and not any(_VARIANT.fullmatch(file) is None for file in files):
            raise ValueError(
                f"--pretrained_model_name_or_path {model_path}: {name} holds only the variant "
                f"{', '.join(sorted(variants))} of its weights; give --variant {min(variants)}."
            )
        # The transformer's reader takes weights without the variant where there are no others.
        if variant and name != "transformer" and not any(f".{variant}" in file for file in files):
            raise ValueError(f"--variant {variant}: {model_path / name} has no such weights, only {', '.join(files)}.")
