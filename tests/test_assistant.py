"""A frozen assistant LoRA: in training and its records, not in images, not in the exported file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.lora import ASSISTANT, TRAINED, add_lora, lora_targets, only_adapters
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.residuals.precompute import frozen_model
from blockskip_hooks.training.assistant import add_assistant, find_assistant
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from blockskip_hooks.utils.errors import UserError
from tests.script import load_script, losses, save_photos, settings, train, weights
from tests.tiny import TINY_FAMILIES


TINY = {tiny.name: tiny for tiny in TINY_FAMILIES}
RANK = 3


def save_assistant(tiny, folder, scale=0.3):
    """A LoRA of every linear layer of the transformer, inside and outside of its blocks."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, module in tiny.make_transformer().named_modules():
        if isinstance(module, torch.nn.Linear):
            for part, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                key = f"transformer.{name}.lora_{part}.weight"
                tensors[key] = scale * torch.randn(shape, generator=generator) / shape[1] ** 0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def skipping_model(tiny, file, config, recorded=True):
    """A model with its kept blocks alone in memory, a LoRA with values that trains, and an assistant."""
    family = tiny.make_family()
    model = DiTBlockSkipTransformer(tiny.make_transformer(), config, family.block_stacks)
    kept = [block.name for block in model.spans.kept]
    names = [name for name, _ in model.transformer.named_modules() if name.startswith(tuple(f"{k}." for k in kept))]
    layers = [n for n in names if n.endswith(tuple(f".{layer}" for layer in family.modulation_layers))]
    targets = lora_targets(model, family.lora_layers, family.text_stream_layers)
    model = DiTBlockSkipTransformer.from_pretrained(
        tiny.folder,
        config,
        stacks=family.block_stacks,
        transformer_class=family.transformer_class(load_config(tiny.folder / "transformer")),
        recorded_layers=layers if recorded else (),
    )
    assistant = find_assistant(str(file), family, model.transformer, None, None)
    parameters = add_lora(model.transformer, targets, rank=2, alpha=2, dropout=0.0, seed=0)
    add_assistant(model, family, assistant, torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, parameters


def full_model(tiny, model, file, with_assistant=True):
    """The stock model with the same LoRA, loaded by diffusers."""
    transformer = tiny.make_transformer()
    state = {
        name.replace(f".{TRAINED}.", "."): p.detach()
        for name, p in model.transformer.named_parameters()
        if f".{TRAINED}." in name
    }
    transformer.load_lora_adapter(state, prefix=None, adapter_name=TRAINED)
    if with_assistant:
        transformer.load_lora_adapter(load_file(file), adapter_name=ASSISTANT)
        transformer.set_adapters([TRAINED, ASSISTANT])
    return transformer.eval()


def first(output):
    value = output[0]
    return value if isinstance(value, torch.Tensor) else torch.stack(list(value))


@pytest.mark.parametrize("name", ["flux-dev", "z-image", "sana", "krea2"])
@torch.no_grad()
def test_a_step_from_records_is_one_of_the_full_model_with_both_loras(name, tmp_path):
    tiny = TINY[name]
    file = save_assistant(tiny, tmp_path)
    model, _ = skipping_model(tiny, file, BlockSkipConfig(leading=1, trailing=2))
    inputs = tiny.make_inputs(2)
    expected = first(full_model(tiny, model, file)(**inputs, return_dict=False))
    residuals = model.capture_residuals(**inputs)
    actual = first(model(**inputs, residuals=residuals, return_dict=False))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with only_adapters(model.transformer, [TRAINED]), model.full_model() as whole:
        alone = first(whole(**inputs, return_dict=False))
    stock = first(full_model(tiny, model, file, with_assistant=False)(**inputs, return_dict=False))
    torch.testing.assert_close(alone, stock, atol=1e-5, rtol=1e-5)
    assert (alone - expected).abs().max() > 1e-3
