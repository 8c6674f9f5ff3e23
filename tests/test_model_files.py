"""Checkpoints that do not fit the model are refused by name, by the library and before a run is planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.loading.checks import check_model
from blockskip_hooks.loading.models import check_surplus
from tests.tiny import TINY_FAMILIES, randomise, save_tiny_flux


def test_loading_names_what_is_wrong(tmp_path: Path):
    tiny = TINY_FAMILIES[0]
    config = BlockSkipConfig(leading=1)
    transformer = tiny.make_transformer()
    transformer.save_pretrained(tmp_path / "pickled" / "transformer", safe_serialization=False)
    with pytest.raises(ValueError, match="no safetensors weights"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path / "pickled", config)

    transformer.save_pretrained(tmp_path / "truncated" / "transformer")
    weights = tmp_path / "truncated" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path / "truncated", config)

    randomise(transformer).register_to_config(in_channels=12)
    transformer.save_pretrained(tmp_path / "mismatch" / "transformer")
    with pytest.raises(ValueError, match="x_embedder.weight has shape"):
        DiTBlockSkipTransformer.from_pretrained(tmp_path / "mismatch", config)


SURPLUS = {
    "a block more": ("transformer_blocks.7.attn.to_q.weight", "1 tensors that its config's FluxTransformer2DModel"),
    "scaled fp8": ("transformer_blocks.0.attn.to_q.scale_weight", "quantised weights.* name the model in bfloat16"),
    "scaled fp8, marked": ("scaled_fp8", "quantised weights"),
    "bitsandbytes": ("transformer_blocks.0.attn.to_q.weight.absmax", "quantised weights"),
}


@pytest.mark.parametrize("case", SURPLUS)
def test_tensors_that_would_be_ignored_are_refused_by_name(case: str, tmp_path: Path):
    """Before a run is planned, from the files' headers, and where the library loads a model."""
    name, words = SURPLUS[case]
    folder = save_tiny_flux(tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), name: torch.ones(2)}, file)
    with pytest.raises(ValueError, match=f"{words}") as error:
        DiTBlockSkipTransformer.from_pretrained(folder, BlockSkipConfig(leading=1))
    assert name in str(error.value)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{words}") as error:
        check_model(folder, Flux, None)
    assert name in str(error.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_quantised_weights_of_other_parts_are_refused(part: str, tmp_path: Path):
    folder = save_tiny_flux(tmp_path)
    (file,) = (folder / part).glob("*.safetensors")
    save_file({**load_file(file), "layer.scale_weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f": {part} holds quantised weights"):
        check_model(folder, Flux, None)


def test_buffers_that_are_not_saved_may_be_in_a_checkpoint():
    model = torch.nn.Module()
    model.register_buffer("table", torch.ones(2), persistent=False)
    check_surplus(["table"], model, "it")
    with pytest.raises(ValueError, match="it holds 1 tensors .* first other"):
        check_surplus(["table", "other"], model, "it")
