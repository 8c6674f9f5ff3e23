"""LoRA on the kept blocks: where it goes, what it starts from, what the file holds, and whether it learns."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME, load_lora, save_lora
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.training.lora_checks import check_finite, check_gradients, describe_trainable, warn_unless_learned
from tests.tiny import TINY_FAMILIES


TINY = TINY_FAMILIES[0]
# Families with blocks of other kinds before those that can be skipped, and families with a text stream of its own.
WITH_REFINERS = [tiny for tiny in TINY_FAMILIES if tiny.name in ("z-image", "lumina2")]
WITH_TEXT_STREAM = [tiny for tiny in TINY_FAMILIES if tiny.family.text_stream_layers]
# The tiny FLUX has two double-stream blocks, then three single-stream ones.
DOUBLE = [f"transformer_blocks.{i}" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(3)]
LAYERS_OF_SINGLE = {"attn.to_k", "attn.to_q", "attn.to_v"}
SPANS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 3), (1, 3), (2, 2), (4, 0), (0, 4), (3, 1)]


def make_model(leading=0, trailing=0, tiny=TINY):
    config = BlockSkipConfig(leading=leading, trailing=trailing)
    return DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)


def default_targets(model, family=Flux):
    return lora_targets(model, family.lora_layers, family.text_stream_layers)


def matching_layers(model, family):
    """Every linear layer of the whole model that the family's default names match, by the plain rule."""
    endings = tuple(f".{layer}" for layer in family.lora_layers)
    linear = [name for name, module in model.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name in linear if name.endswith(endings)}


def in_blocks(names, blocks):
    return {name for name in names if name.startswith(tuple(f"{block.name}." for block in blocks))}


def with_lora(leading=1, trailing=1, *, layers=("attn.to_q", "attn.to_v"), rank=2, seed=0, fill=True):
    model = make_model(leading, trailing)
    parameters = add_lora(
        model.transformer, lora_targets(model, layers), rank=rank, alpha=2 * rank, dropout=0.0, seed=seed
    )
    if fill:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def lora_state(model):
    return {name: p.detach().clone() for name, p in model.transformer.named_parameters() if "lora_" in name}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Where it goes


@pytest.mark.parametrize(("leading", "trailing"), SPANS)
def test_default_layers_are_those_of_kept_blocks_that_can_learn(leading, trailing):
    kept = (DOUBLE + SINGLE)[leading : 5 - trailing]
    expected = set()
    for block in kept:
        layers = LAYERS_OF_SINGLE if block in SINGLE else set(Flux.lora_layers)
        if trailing and block == kept[-1]:
            layers = layers - set(Flux.text_stream_layers)
        expected |= {f"{block}.{layer}" for layer in layers}
    targets = default_targets(make_model(leading, trailing))
    assert set(targets) == expected and len(targets) == len(expected)


@pytest.mark.parametrize(("leading", "trailing"), [(0, 0), (1, 2), (0, 3), (1, 3), (2, 2)])
def test_every_default_target_learns(leading, trailing):
    model = make_model(leading, trailing)
    add_lora(model.transformer, default_targets(model), rank=2, alpha=2, dropout=0.0, seed=0)
    inputs = TINY.make_inputs(2)
    residuals = model.capture_residuals(**inputs, return_dict=False)
    prediction = model(**inputs, residuals=residuals, return_dict=False)[0]
    prediction.square().sum().backward()
    check_gradients(model.transformer)


def test_text_layers_dropped_before_a_trailing_span_could_not_have_learnt():
    model = make_model(0, 3)
    unread = [f"{DOUBLE[1]}.{layer}" for layer in Flux.text_stream_layers]
    parameters = add_lora(model.transformer, unread, rank=2, alpha=2, dropout=0.0, seed=0)
    inputs = TINY.make_inputs(1)
    residuals = model.capture_residuals(**inputs, return_dict=False)
    prediction = model(**inputs, residuals=residuals, return_dict=False)[0]
    if prediction.requires_grad:
        prediction.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in parameters)


def test_layers_are_named_by_their_ending_or_in_full_and_listed_once():
    model = make_model(1, 1)
    ending, full = "attn.to_q", f"{SINGLE[0]}.attn.to_q"
    expected = [f"{block}.attn.to_q" for block in (DOUBLE[1], *SINGLE[:2])]
    assert lora_targets(model, [ending]) == expected
    assert lora_targets(model, [ending, full, ending]) == expected
    assert lora_targets(model, [full]) == [full]
    assert lora_targets(model, ["proj_out"]) == [f"{block}.proj_out" for block in SINGLE[:2]]
    assert lora_targets(make_model(), ["proj_out"]) == [f"{block}.proj_out" for block in SINGLE] + ["proj_out"]


@pytest.mark.parametrize("name", ["attn.to_x", "to_", "", "transformer_blocks", "attn", "norm1"])
def test_a_name_of_no_linear_layer_is_refused(name):
    with pytest.raises(ValueError, match=f"^'{name}' is the name of no linear layer"):
        lora_targets(make_model(1, 1), ["attn.to_q", name])


def test_layers_of_skipped_blocks_only_are_refused_with_the_kept_ones_named():
    with pytest.raises(ValueError, match="^No layer of a kept block is called attn.add_q_proj or ff.net.2; ") as error:
        lora_targets(make_model(2, 0), ["attn.add_q_proj", "ff.net.2"])
    message = str(error.value)
    assert SINGLE[0] in message and SINGLE[2] in message and "\n" not in message
    with pytest.raises(ValueError, match="^No layer of a kept block is called"):
        lora_targets(make_model(1, 0), [f"{DOUBLE[0]}.attn.to_q"])


@pytest.mark.parametrize("tiny", WITH_REFINERS, ids=lambda tiny: tiny.name)
def test_layers_outside_the_blocks_get_lora_in_plain_mode_only(tiny):
    plain = make_model(tiny=tiny)
    everywhere = matching_layers(plain, tiny.family)
    refiners = {name for name in everywhere if "refiner" in name}
    assert refiners and everywhere - refiners == in_blocks(everywhere, plain.spans.kept)
    assert set(default_targets(plain, tiny.family)) == everywhere
    for leading, trailing in ((1, 0), (0, 1), (1, 2)):
        model = make_model(leading, trailing, tiny)
        assert set(default_targets(model, tiny.family)) == in_blocks(everywhere, model.spans.kept)


@pytest.mark.parametrize("tiny", WITH_REFINERS, ids=lambda tiny: tiny.name)
def test_a_layer_outside_the_blocks_is_refused_once_anything_is_skipped(tiny):
    refiner = min(name for name in matching_layers(make_model(tiny=tiny), tiny.family) if "refiner" in name)
    assert lora_targets(make_model(tiny=tiny), [refiner]) == [refiner]
    with pytest.raises(ValueError, match=f"^No layer of a kept block is called {refiner}; ") as error:
        lora_targets(make_model(0, 1, tiny), [refiner])
    assert "layers.0 to layers.3" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tiny", WITH_REFINERS, ids=lambda tiny: tiny.name)
def test_layers_outside_the_blocks_learn_in_plain_mode(tiny):
    model = make_model(tiny=tiny)
    add_lora(model.transformer, default_targets(model, tiny.family), rank=2, alpha=2, dropout=0.0, seed=0)
    prediction = model(**tiny.make_inputs(1), return_dict=False)[0]
    prediction = torch.stack(list(prediction)) if isinstance(prediction, (list, tuple)) else prediction
    prediction.square().sum().backward()
    check_gradients(model.transformer)


@pytest.mark.parametrize("tiny", WITH_REFINERS, ids=lambda tiny: tiny.name)
def test_named_blocks_are_a_limit_for_layers_outside_the_blocks_too(tiny):
    model = make_model(tiny=tiny)
    names = [model.spans.kept[1].name, model.spans.kept[3].name]
    targets = lora_targets(model, tiny.family.lora_layers, blocks=names)
    assert set(targets) == in_blocks(matching_layers(model, tiny.family), [model.spans.kept[1], model.spans.kept[3]])


def test_a_named_block_is_not_taken_for_the_start_of_another_name():
    model = make_model()
    assert lora_targets(model, ["attn.to_q"], blocks=[DOUBLE[1]]) == [f"{DOUBLE[1]}.attn.to_q"]
    with pytest.raises(ValueError, match=f"^None of {DOUBLE[0]}, {DOUBLE[1]} has a layer {SINGLE[0]}.attn.to_q "):
        lora_targets(model, [f"{SINGLE[0]}.attn.to_q"], blocks=DOUBLE)


@pytest.mark.parametrize("spans", [(0, 0), (1, 0), (0, 2), (1, 2)], ids=lambda spans: f"{spans[0]},{spans[1]}")
@pytest.mark.parametrize("tiny", WITH_TEXT_STREAM, ids=lambda tiny: tiny.name)
def test_text_layers_are_left_out_of_the_last_kept_block_and_of_no_other(tiny, spans):
    model = make_model(*spans, tiny)
    last = model.spans.kept[-1]
    matching = in_blocks(matching_layers(model, tiny.family), model.spans.kept)
    endings = tuple(f".{layer}" for layer in tiny.family.text_stream_layers)
    unread = {name for name in in_blocks(matching, [last]) if name.endswith(endings)}
    assert set(default_targets(model, tiny.family)) == matching - unread


def test_text_layers_of_the_last_block_are_left_out_without_skipping_too():
    """Where every block has a text stream, as in Qwen-Image, nothing reads the text of the last one."""
    tiny = next(tiny for tiny in TINY_FAMILIES if tiny.name == "qwen-image")
    model = make_model(tiny=tiny)
    targets = default_targets(model, tiny.family)
    of_last = [name for name in targets if name.startswith(f"{model.spans.kept[-1].name}.")]
    assert of_last and not any(name.endswith(tiny.family.text_stream_layers) for name in of_last)
    unread = f"{model.spans.kept[-1].name}.{tiny.family.text_stream_layers[0]}"
    with pytest.raises(ValueError, match=f"^{unread} are text layers of .* only"):
        lora_targets(model, [unread], tiny.family.text_stream_layers)


def test_layers_that_could_never_learn_only_are_refused():
    model = make_model(1, 3)
    with pytest.raises(ValueError, match="^attn.add_q_proj are text layers") as error:
        lora_targets(model, ["attn.add_q_proj"], Flux.text_stream_layers)
    assert "\n" not in str(error.value)


# What it starts from


def test_lora_starts_the_same_for_a_seed_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = lora_state(with_lora(seed=5, fill=False))
    torch.manual_seed(2)
    torch.randn(100)
    assert equal(first, lora_state(with_lora(seed=5, fill=False)))
    other = lora_state(with_lora(seed=6, fill=False))
    downs = [name for name in first if "lora_A" in name]
    assert downs and not any(torch.equal(first[name], other[name]) for name in downs)


def test_adding_lora_leaves_the_global_random_state_alone():
    model = make_model(1, 1)
    before = torch.get_rng_state()
    add_lora(model.transformer, default_targets(model), rank=2, alpha=2, dropout=0.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_at_zero_in_float32_and_is_all_that_trains(dtype):
    model = make_model(1, 1)
    model.to(dtype)
    parameters = add_lora(model.transformer, default_targets(model), rank=3, alpha=6, dropout=0.0, seed=0)
    trainable = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
    assert len(parameters) == len(trainable) == 2 * len(default_targets(make_model(1, 1)))
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert all(bool(p.any()) != ("lora_B" in name) for name, p in trainable.items())
    assert {min(p.shape) for p in parameters} == {3}
    assert {p.dtype for p in model.transformer.parameters() if not p.requires_grad} == {dtype}


# What is said of it


def test_the_description_has_the_trained_blocks_and_the_parameters_that_train():
    model = make_model(1, 1)
    targets = default_targets(model)
    parameters = add_lora(model.transformer, targets, rank=3, alpha=6, dropout=0.0, seed=0)
    count = sum(p.numel() for p in parameters)
    assert describe_trainable(model, targets) == (
        f"{count:,} LoRA parameters in {len(targets)} layers of 3 of 5 blocks: "
        "transformer_blocks 1, single_transformer_blocks 0-1"
    )


def test_the_description_follows_the_named_blocks_and_counts_layers_outside():
    model = make_model()
    targets = [f"{DOUBLE[0]}.attn.to_q", f"{SINGLE[0]}.attn.to_q", f"{SINGLE[2]}.attn.to_q", "x_embedder", "proj_out"]
    add_lora(model.transformer, targets, rank=1, alpha=1, dropout=0.0, seed=0)
    assert describe_trainable(model, targets).endswith(
        " in 5 layers of 3 of 5 blocks: transformer_blocks 0, single_transformer_blocks 0, 2, "
        "2 layers outside the blocks"
    )


# What the file holds


@pytest.mark.parametrize(("leading", "trailing"), [(0, 0), (1, 1), (2, 2)])
def test_the_file_has_full_block_names_of_kept_blocks_only(tmp_path, leading, trailing):
    model = with_lora(leading, trailing)
    save_lora(tmp_path, Flux, model.transformer)
    kept = (DOUBLE + SINGLE)[leading : 5 - trailing]
    assert set(load_file(tmp_path / WEIGHTS_NAME)) == {
        f"transformer.{block}.attn.{layer}.{part}.weight"
        for block in kept
        for layer in ("to_q", "to_v")
        for part in ("lora_A", "lora_B")
    }
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_file_has_the_dtype_asked_for_and_the_model_keeps_its_own(tmp_path, dtype):
    model = with_lora()
    before = lora_state(model)
    save_lora(tmp_path / "new" / "folder", Flux, model.transformer, dtype=dtype)
    state = load_file(tmp_path / "new" / "folder" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in state.values()} == {dtype or torch.float32}
    assert equal(before, lora_state(model))
    for name, value in before.items():
        key = "transformer." + name.replace(".default.", ".")
        assert torch.equal(state[key], value.to(dtype or torch.float32))


def test_the_file_says_how_the_lora_is_scaled(tmp_path):
    save_lora(tmp_path, Flux, with_lora(rank=2).transformer)
    with safe_open(str(tmp_path / WEIGHTS_NAME), framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (2, 4)


def test_saving_again_replaces_the_file(tmp_path):
    save_lora(tmp_path, Flux, with_lora(seed=1).transformer)
    save_lora(tmp_path, Flux, with_lora(seed=2).transformer)
    model = with_lora(fill=False)
    load_lora(tmp_path, Flux, model.transformer)
    assert equal(lora_state(model), lora_state(with_lora(seed=2)))


# Reading back


@pytest.mark.parametrize("layers", [("attn.to_q", "attn.to_v"), Flux.lora_layers], ids=["two layers", "all layers"])
def test_reading_back_is_exact_to_the_bit(tmp_path, layers):
    written = with_lora(layers=layers, seed=3)
    save_lora(tmp_path, Flux, written.transformer)
    read = with_lora(layers=layers, seed=4)
    load_lora(tmp_path, Flux, read.transformer)
    assert equal(lora_state(read), lora_state(written))
    assert all(p.requires_grad and p.dtype == torch.float32 for n, p in read.named_parameters() if "lora_" in n)


@pytest.mark.parametrize(
    "other",
    [{"rank": 4}, {"layers": ("attn.to_q",)}, {"layers": ("attn.to_q", "attn.to_k")}, {"leading": 2}, {"leading": 0}],
    ids=["rank", "fewer layers", "other layers", "fewer blocks", "more blocks"],
)
def test_lora_of_other_settings_is_refused_and_changes_nothing(tmp_path, other):
    save_lora(tmp_path, Flux, with_lora(seed=3).transformer)
    model = with_lora(seed=4, **other)
    before = lora_state(model)
    with pytest.raises(ValueError, match="--resume_from_checkpoint .*other LoRA layers or another rank") as error:
        load_lora(tmp_path, Flux, model.transformer)
    assert "\n" not in str(error.value) and equal(before, lora_state(model))


# Whether it learns


def layer_without(model, what):
    """Run one backward by hand, then leave ``what`` out for the first LoRA; return its name."""
    name, first = next((n, p) for n, p in model.transformer.named_parameters() if "lora_B" in n)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    first.grad = None if what == "absent" else torch.zeros_like(first)
    return name.partition(".lora_B")[0]


def test_lora_that_is_reached_passes(caplog):
    model = with_lora()
    layer_without(model, "absent")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    check_gradients(model.transformer)
    warn_unless_learned(model.transformer)
    assert not caplog.records


@pytest.mark.parametrize("what", ["absent", "zero"])
def test_a_layer_without_a_gradient_is_named(what):
    model = with_lora()
    layer = layer_without(model, what)
    with pytest.raises(ValueError, match=f"The LoRA of {layer} receives no gradient"):
        check_gradients(model.transformer)


def test_layers_that_learnt_nothing_are_named_in_a_warning(caplog):
    model = with_lora(fill=False)
    named = [(name, parameter) for name, parameter in model.transformer.named_parameters() if "lora_B" in name]
    for _, parameter in named[2:]:
        parameter.data.fill_(0.1)
    warn_unless_learned(model.transformer)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"The LoRA of {named[0][0].partition('.lora_B')[0]} and 1 other layers is still zero")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_layer_that_broke_is_named(value):
    model = with_lora()
    name, parameter = [(n, p) for n, p in model.transformer.named_parameters() if "lora_B" in n][-1]
    parameter.data.fill_(value)
    with pytest.raises(ValueError, match=f"The LoRA of {name.partition('.lora_B')[0]} is not finite"):
        check_finite(model.transformer)


def test_a_down_projection_that_broke_is_named():
    model = with_lora()
    name, parameter = next((n, p) for n, p in model.transformer.named_parameters() if "lora_A" in n)
    parameter.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"The LoRA of {name.partition('.lora_A')[0]} is not finite"):
        check_finite(model.transformer)
