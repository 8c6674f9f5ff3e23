"""The transformer with the LoRA in its weights, made without ever having the transformer in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..loading.checkpoint_index import index_safetensors
from ..utils.errors import UserError
from ..utils.files import sync, write_error


MERGED_NAME = "merged_transformer"
SHARD_BYTES = 2**30
"""A shard's tensors are in memory together: that, and one merged layer, is the most that a merge takes."""


def export_merged(
    transformer: Path, lora: Path, output_dir: Path, variant: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a transformer with a LoRA merged into it to ``merged_transformer``, whole or not at all.

    Tensors are read from the checkpoint and written shard by shard. Those without LoRA are copied bit for bit; the
    others are what peft's merge makes of them, in the checkpoint's dtype, whatever kept blocks were held in.

    Args:
        transformer: The model's folder of the transformer.
        lora: The file that :func:`~blockskip_hooks.loading.lora_files.save_lora` wrote.
        output_dir: Where the folder is made; one from before is replaced.
        variant: Weight variant in the file names, such as ``"fp16"``.
        shard_bytes: Bytes of a shard, as far as no tensor is larger.

    Returns:
        The folder, for ``from_pretrained`` of the transformer's class.

    Raises:
        UserError: if the LoRA is of other layers than the checkpoint has.
        OSError: if the folder cannot be written; nothing is left of it then.
    """
    index = index_safetensors(transformer, variant)
    layers = _read_lora(lora)
    missing = sorted(name for name in layers if f"{name}.weight" not in index)
    if missing:
        raise UserError(f"{lora} has LoRA of {missing[0]}, which {transformer} lacks; merge it into its own model.")
    # By size alone: the helpers that split tensors would want all of them, and none of their values is read here.
    sizes = {name: tensor.nbytes for name, tensor in _read(index, index)}
    shards = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern=SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=shard_bytes,
    )
    final = output_dir / MERGED_NAME
    with _replacing_folder(final, sum(sizes.values())) as folder:
        shutil.copyfile(transformer / "config.json", folder / "config.json")
        for file, names in shards.filename_to_tensors.items():
            tensors = {
                key: _merge(tensor, layers.get(key.removesuffix(".weight"))) for key, tensor in _read(index, names)
            }
            save_file(tensors, str(folder / file), metadata={"format": "pt"})
            del tensors
            sync(folder / file)
        if shards.is_sharded:
            weight_map = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(weight_map, indent=2) + "\n")
    return final


def _read_lora(file: Path) -> dict[str, dict[str, Any]]:
    """Arguments of :func:`_merge` by the name of the layer: the transformer's LoRA is small."""
    layers: dict[str, dict[str, Any]] = {}
    with safe_open(str(file), framework="pt") as opened:
        settings = json.loads(opened.metadata()[LORA_ADAPTER_METADATA_KEY])
        for key in opened.keys():  # noqa: SIM118
            if key.startswith("transformer."):
                layer, _, part = key.removeprefix("transformer.").partition(".lora_")
                layers.setdefault(layer, {"alpha": settings["transformer.lora_alpha"]})[part[0]] = opened.get_tensor(
                    key
                )
    return layers


def _merge(weight: torch.Tensor, lora: Mapping[str, Any] | None) -> torch.Tensor:
    """A layer's weight with its LoRA merged by peft; without LoRA the weight itself."""
    if lora is None:
        return weight
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # What is read may be a view of the file.
    base.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    rank = lora["A"].shape[0]
    config = LoraConfig(r=rank, lora_alpha=lora["alpha"], init_lora_weights=False)
    layer = LoraLinear(base, "default", config=config, r=rank, lora_alpha=lora["alpha"])
    layer.lora_A["default"].weight.data = lora["A"]
    layer.lora_B["default"].weight.data = lora["B"]
    layer.merge()
    return base.weight.data


def _read(index: Mapping[str, Path], names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the checkpoint; a file is closed when the next one begins, and its pages are the system's again."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(index[name], []).append(name)
    for file, inside in by_file.items():
        with safe_open(str(file), framework="pt") as opened:
            for name in inside:
                yield name, opened.get_tensor(name)


@contextmanager
def _replacing_folder(final: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``final`` once the body is done, and is gone if it fails."""
    folder, old = (final.with_name(f".{final.name}.{end}") for end in ("tmp", "old"))
    for left in (folder, old):
        # What a killed run left.
        if left.is_dir():
            shutil.rmtree(left)
    folder.mkdir(parents=True)
    try:
        yield folder
        sync(folder)
        if final.is_dir():
            # A folder cannot be renamed over one that is not empty.
            os.replace(final, old)
        os.replace(folder, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(error, final, needed) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
