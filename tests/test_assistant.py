"""A frozen assistant LoRA: in training and its records, not in images, not in the exported file."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from blockskip_hooks.cli import preparation
from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.lora import ASSISTANT, TRAINED, add_lora, lora_targets, only_adapters
from blockskip_hooks.residuals.precompute import frozen_model
from blockskip_hooks.training.assistant import add_assistant, find_assistant
from blockskip_hooks.training.validation import Validation
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from tests.plans import fake_transformer
from tests.script import PROMPT, assert_same_weights, load_script, losses, save_photos, settings, train, weights
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


def test_only_the_lora_that_trains_has_gradients(tmp_path):
    tiny = TINY["flux-dev"]
    model, parameters = skipping_model(tiny, save_assistant(tiny, tmp_path), BlockSkipConfig(leading=1, trailing=1))
    inputs = tiny.make_inputs(1)
    with frozen_model(model.transformer):
        residuals = model.capture_residuals(**inputs)
    first(model.train()(**inputs, residuals=residuals, return_dict=False)).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
    with_gradients = {id(p) for p in model.parameters() if p.requires_grad or p.grad is not None}
    assert with_gradients == {id(parameter) for parameter in parameters}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("photos"), [(64, 64), (80, 64)])


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A finished run with an assistant, of blocks skipped, and the images that it made at its end."""
    folder, made = tmp_path_factory.mktemp("run"), []
    file = save_assistant(TINY["flux-dev"], folder / "assistant")
    with pytest.MonkeyPatch.context() as patch:
        final = Validation.final
        patch.setattr(Validation, "final", lambda *args: made.append(final(*args)) or made[-1])
        images = ("--validation_prompt", PROMPT, "--num_validation_images", "1")
        flags = ("--checkpointing_steps", "2", "--patch_sampling", "none", "--assistant_lora", str(file), *images)
        train(TINY["flux-dev"].folder, photos, folder / "out", "--skip_blocks", "1,0", *flags)
    return SimpleNamespace(file=file, output=folder / "out", images=made[0], flags=flags)


def test_skipping_blocks_trains_the_same_lora_as_all_of_them_in_memory(run, photos, tmp_path):
    flags = [flag for flag in run.flags if flag not in ("--validation_prompt", PROMPT)]
    whole = train(TINY["flux-dev"].folder, photos, tmp_path, *flags, "--lora_blocks", "1,2,3,4")
    assert losses(run.output) == pytest.approx(losses(whole), rel=1e-5)
    expected, found = weights(whole), weights(run.output)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-3)


def test_the_assistant_is_neither_in_the_file_nor_in_the_images(run):
    tiny = TINY["flux-dev"]
    names = {name.partition(".lora_")[0] for name in weights(run.output)}
    assert not names & {"transformer.x_embedder", "transformer.transformer_blocks.0.attn.to_q"}
    assert {weight.shape[0] for name, weight in weights(run.output).items() if "lora_A" in name} == {2}
    pipeline = tiny.make_family().load_pipeline(torch.float32)
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    stock = []
    for loaded in (False, True):
        if loaded:
            pipeline.load_lora_weights(run.output)
        noise = torch.Generator().manual_seed(3)
        stock += pipeline(PROMPT, max_sequence_length=12, generator=noise, **size).images
    assert not np.array_equal(*stock)
    for made, expected in zip(run.images, stock, strict=True):
        assert_like(made[0][0], expected)


def assert_like(image, expected):
    """Images are the same but for rounding to a level."""
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_a_run_that_was_stopped_ends_as_if_never_stopped(run, photos, tmp_path):
    flags = ("--skip_blocks", "1,0", *run.flags, "--resume_from_checkpoint", str(run.output / "checkpoint-2"))
    assert_same_weights(train(TINY["flux-dev"].folder, photos, tmp_path, *flags), run.output)


def refused(capsys, photos, folder, *flags):
    assert load_script().main(settings(TINY["flux-dev"].folder, photos, folder, *flags)) == 2
    return capsys.readouterr().err


def test_it_does_not_go_on_without_its_assistant(run, photos, tmp_path, capsys):
    where = ("--resume_from_checkpoint", str(run.output / "checkpoint-2"))
    flags = [flag for flag in run.flags if flag not in ("--assistant_lora", str(run.file))]
    said = refused(capsys, photos, tmp_path, "--skip_blocks", "1,0", *flags, *where)
    assert "made with --assistant_lora (now without)" in said and said.count("\n") == 1
    other = save_assistant(TINY["flux-dev"], tmp_path / "other", scale=0.1)
    flags += ["--assistant_lora", str(other)]
    assert "(now another)" in refused(capsys, photos, tmp_path, "--skip_blocks", "1,0", *flags, *where)


def test_what_is_no_assistant_of_this_model_is_refused_before_anything_loads(photos, tmp_path, capsys, monkeypatch):
    tiny, flag = TINY["flux-dev"], "--assistant_lora"
    file = save_assistant(tiny, tmp_path)
    state = load_file(file)
    for number, (changed, words) in enumerate(
        [
            ({"text_encoder.layer.lora_A.weight": torch.ones(1, 1)}, "LoRA of the transformer's layers alone"),
            ({"transformer.nowhere.lora_A.weight": torch.ones(1, 1)}, "is of another model"),
            ({"transformer.proj_out.lora_B.weight": torch.ones(7, RANK)}, "fits no linear layer"),
        ]
    ):
        bad = tmp_path / f"{number}.safetensors"
        save_file({**state, **changed}, bad)
        assert words in refused(capsys, photos, tmp_path / "out", flag, str(bad))
    assert "neither a file or folder nor" in refused(capsys, photos, tmp_path / "out", flag, "nothing")
    assert "owner/name/file.safetensors" in refused(capsys, photos, tmp_path / "out", flag, "some/adapter")
    monkeypatch.setattr(preparation, "asks_for_sharding", lambda: True)
    assert "FSDP do not go together" in refused(capsys, photos, tmp_path / "out", flag, str(file))


def test_the_plan_counts_its_weights_where_they_are_in_memory(tmp_path):
    tiny = TINY["flux-dev"]
    family, config = tiny.make_family(), load_config(tiny.folder / "transformer")
    assistant = find_assistant(str(save_assistant(tiny, tmp_path)), family, tiny.make_transformer(), None, None)
    spans = BlockSkipConfig(leading=1, trailing=2)
    options = {"rank": 2, "lora_targets": ["transformer_blocks.1.attn.to_q"], "device": "cpu", "text_tokens": 12}
    model = skipping_model(tiny, assistant.file, spans)[0].transformer
    blocks = ("transformer_blocks.0.", "single_transformer_blocks.1.", "single_transformer_blocks.2.")
    ours = {name: p.nbytes for name, p in model.named_parameters() if f".{ASSISTANT}." in name}
    resident = sum(size for name, size in ours.items() if not name.startswith(blocks))
    largest = max(sum(size for name, size in ours.items() if name.startswith(block)) for block in blocks)
    before, after = (
        fake_transformer(family, config, spans, assistant_layers=layers, **options)
        for layers in ({}, assistant.layers())
    )
    needed = [fake.infer(1, (32, 32)).parameter_bytes for fake in (before, after)]
    assert needed[1] - needed[0] == resident + largest
