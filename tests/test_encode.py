"""Stage encode: prompts are embedded once, by encoders that are whole or read layer by layer, and nothing stays."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.families import Family
from blockskip_hooks.families.prompts import encode_prompts
from blockskip_hooks.loading import text_encoders
from blockskip_hooks.loading.text_encoders import (
    empty_text_encoder,
    large_encoders,
    large_tables,
    layer_stacks,
    load_streamed_encoder,
)
from blockskip_hooks.planning import stages as planner
from blockskip_hooks.planning.components import simulate_text_encoder
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import plan_run
from blockskip_hooks.training import class_images, prompts
from tests import script
from tests.plans import load_preset, stage
from tests.tiers import fast_first, fast_rows
from tests.tiny import TINY_FAMILIES, TinyFamily


CALL = {"output_hidden_states": False, "use_cache": True}
"""What bears on an encoder's memory, as models of transformers have it by default."""


PROMPTS = ["a photo of sks dog", "", "the red cat on the beach"]
GIB = 2**30


def tiny_named(name: str) -> TinyFamily:
    return next(tiny for tiny in TINY_FAMILIES if tiny.name == name)


def encoders_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part}


@contextmanager
def seen_encoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, torch.nn.Module]]]:
    """Every text pipeline's encoders, by component, while they are alive."""
    seen: Any = {}
    original = Family.load_text_pipeline

    def spy(self: Family, *args: Any, **kwargs: Any) -> Any:
        pipeline = original(self, *args, **kwargs)
        for name, encoder in encoders_of(pipeline).items():
            seen[name] = weakref.ref(encoder), [weakref.ref(p) for p in (*encoder.parameters(), *encoder.buffers())]
            seen[name] += ({n for n, p in encoder.named_parameters() if p.device.type == "meta"},)
        return pipeline

    with monkeypatch.context() as patch:
        patch.setattr(Family, "load_text_pipeline", spy)
        yield seen


def embed(family: Family, dtype: torch.dtype = torch.float32, **settings: Any) -> dict[str, Any]:
    embeds, _ = encode_prompts(family, PROMPTS, dtype=dtype, device="cpu", **settings)
    return embeds


def assert_same_embeds(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for prompt, embeds in expected.items():
        assert actual[prompt].keys() == embeds.keys()
        for name, tensor in embeds.items():
            assert actual[prompt][name].dtype == tensor.dtype
            assert torch.equal(actual[prompt][name], tensor), (prompt, name)


def test_streamed_encoders_give_the_same_embeddings_and_nothing_of_an_encoder_stays(
    tiny: TinyFamily, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit the same, large tables included; afterwards no tensor of an encoder is alive, streamed or not."""
    monkeypatch.setattr(text_encoders, "LARGE_TABLE_BYTES", 1)
    family, embeds = tiny.make_family(), {}
    for streamed in (False, True):
        with seen_encoders(monkeypatch) as seen:
            embeds[streamed] = embed(family, streamed=streamed)
        assert seen and any(on_disk for _, _, on_disk in seen.values()) == streamed
        for name, (encoder, tensors, _) in seen.items():
            assert encoder() is None, name
            assert not any(tensor() is not None for tensor in tensors), name
        for tensors in embeds[streamed].values():
            for name, tensor in tensors.items():
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    assert len({str(tensors) for tensors in embeds[False].values()}) == len(PROMPTS)
    assert_same_embeds(embeds[True], embeds[False])


@pytest.mark.parametrize("name", fast_first(["flux-dev", "qwen-image", "sana"]))
def test_streamed_encoders_give_the_same_embeddings_in_half_precision(name: str):
    family = tiny_named(name).make_family()
    assert_same_embeds(embed(family, torch.bfloat16, streamed=True), embed(family, torch.bfloat16))


def test_large_tables_have_no_memory_and_factors_stay(monkeypatch: pytest.MonkeyPatch):
    """Gemma multiplies what it looks up by a factor; a table that an output layer shares is left alone."""
    monkeypatch.setattr(text_encoders, "LARGE_TABLE_BYTES", 1)
    family = tiny_named("sana").make_family()
    config = family.text_encoder_configs()["text_encoder"]
    source, _ = family.text_encoder_source("text_encoder")
    streamed = load_streamed_encoder(source, config, dtype=torch.float32, device="cpu")
    assert large_tables(empty_text_encoder(config, torch.float32)) == ["embed_tokens"]
    assert streamed.embed_tokens.weight.numel() == 0 and streamed.embed_tokens.embed_scale.item() > 1
    shared = torch.nn.ModuleDict({"in": torch.nn.Embedding(8, 4), "out": torch.nn.Linear(4, 8, bias=False)})
    shared["layers"] = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    assert large_tables(shared) == ["in"]
    shared["out"].weight = shared["in"].weight
    assert large_tables(shared) == []


def test_layers_that_a_class_keeps_in_float32_stay_so_when_streamed():
    """T5's output projections do in float16."""
    family = tiny_named("flux-dev").make_family()
    config = family.text_encoder_configs()["text_encoder_2"]
    source, _ = family.text_encoder_source("text_encoder_2")
    streamed = load_streamed_encoder(source, config, dtype=torch.float16, device="cpu")
    whole = type(streamed).from_pretrained(source, dtype=torch.float16).eval()
    assert {p.dtype for p in whole.parameters()} == {torch.float16, torch.float32}
    expected = {name: p.dtype for name, p in whole.named_parameters()}
    assert {name: p.dtype for name, p in streamed.named_parameters()} == expected
    tokens = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        assert torch.equal(streamed(tokens)[0], whole(tokens)[0])


def test_a_streamed_encoder_holds_one_layer_at_a_time(tiny: TinyFamily):
    """Before, between and after layers only what is outside of them has weights; inside, one layer more."""
    family = tiny.make_family()
    configs = family.text_encoder_configs()
    names = large_encoders(configs)
    pipeline = family.load_text_pipeline(torch.float32, "cpu", names)
    encoders = encoders_of(pipeline)
    assert names and set(names) <= set(encoders)
    for name in names:
        encoder = encoders[name]
        stacks = layer_stacks(encoder)
        layers = {f"{stack}.{n}" for stack in stacks for n, _ in encoder.get_submodule(stack).named_children()}
        ran: list[tuple[str, set[str]]] = []

        def loaded(encoder: torch.nn.Module = encoder, layers: set[str] = layers) -> set[str]:
            return {
                layer
                for layer in layers
                if any(p.device.type != "meta" for p in encoder.get_submodule(layer).parameters())
            }

        def note(layer: str, ran: Any = ran, loaded: Any = loaded) -> Any:
            # The innermost module of a layer runs when the layer's weights are there.
            return lambda *_: ran.append((layer, loaded()))

        for layer in layers:
            parts = [part for part in encoder.get_submodule(layer).modules() if isinstance(part, torch.nn.Linear)]
            parts[0].register_forward_pre_hook(note(layer))
        assert loaded() == set()
        family.encode_prompts(pipeline, PROMPTS[:1])
        assert ran and all(there == {layer} for layer, there in ran), name
        assert loaded() == set()


def test_encoders_that_are_small_or_train_stay_whole(monkeypatch: pytest.MonkeyPatch):
    family = tiny_named("flux-dev").make_family()
    family.check()
    configs = family.text_encoder_configs()
    sizes = {n: sum(p.numel() for p in empty_text_encoder(c, torch.float32).parameters()) for n, c in configs.items()}
    large = [name for name, size in sizes.items() if size >= sum(sizes.values()) / 10]
    with seen_encoders(monkeypatch) as seen:
        embed(family, streamed=True)
    assert [name for name, (_, _, on_disk) in seen.items() if on_disk] == large
    with seen_encoders(monkeypatch) as seen:
        _, trained = encode_prompts(
            family, PROMPTS, dtype=torch.float32, device="cpu", keep_trainable=True, streamed=True
        )
        assert trained is not None and list(trained.encoders) == ["text_encoder"]
        assert not seen["text_encoder"][2] and seen["text_encoder"][0]() is trained.encoders["text_encoder"]
        assert seen["text_encoder_2"][0]() is None


@pytest.mark.parametrize(("name", "large"), [("flux.1-dev", [1]), ("sd3.5-large", [1, 2]), ("qwen-image", [0])])
def test_a_small_clip_beside_a_large_encoder_is_not_worth_streaming(name: str, large: list[int]):
    assert large_encoders(dict(enumerate(load_preset(name).text_encoders))) == large


def test_checkpoints_may_name_layers_otherwise_than_the_model():
    """Vision-language encoders were published when their layers had other names; transformers still writes those."""
    family = tiny_named("qwen-image").make_family()
    (config,) = family.text_encoder_configs().values()
    source, _ = family.text_encoder_source("text_encoder")
    streamed = load_streamed_encoder(source, config, dtype=torch.float32, device="cpu")
    stored = load_file(Path(source) / "model.safetensors")
    assert stored.keys() != streamed.state_dict().keys()
    layer = streamed.model.language_model.layers[0]
    seen = []
    layer.mlp.register_forward_pre_hook(lambda mlp, *_: seen.append(mlp.up_proj.weight.detach().clone()))
    streamed(torch.tensor([[3, 4, 5]]))
    assert torch.equal(seen[0], stored["model.layers.0.mlp.up_proj.weight"])


def test_a_text_encoder_outside_of_the_model_is_streamed_too(tmp_path: Path):
    """HiDream's Llama comes from where a flag says."""
    tiny = tiny_named("hidream")
    without = tmp_path / "model"
    without.mkdir()
    for part in tiny.folder.iterdir():
        if part.name not in ("text_encoder_4", "tokenizer_4", "model_index.json"):
            (without / part.name).symlink_to(part)
    index = json.loads((tiny.folder / "model_index.json").read_text())
    (without / "model_index.json").write_text(
        json.dumps({**index, "text_encoder_4": [None, None], "tokenizer_4": [None, None]})
    )
    flags = {
        f"pretrained_{part}_4_name_or_path": str(tiny.folder / f"{part}_4") for part in ("text_encoder", "tokenizer")
    }
    settings = {"max_sequence_length": tiny.text_tokens, "resolution": tiny.resolution, **flags}
    family = tiny.family(without, flags=settings)
    assert "text_encoder_4" in family.text_encoder_configs()
    pipeline = family.load_text_pipeline(torch.float32, "cpu", ["text_encoder_4"])
    assert any(p.device.type == "meta" for p in pipeline.text_encoder_4.parameters())
    del pipeline
    assert_same_embeds(embed(family, streamed=True), embed(tiny.make_family()))


def request_for(name: str, skipped: tuple[int, int]) -> PlanRequest:
    preset = load_preset(name)
    config = BlockSkipConfig(leading=skipped[0], trailing=skipped[1])
    targets = preset.lora_targets(config)
    return PlanRequest(
        family=preset.family,
        transformer_config=preset.transformer_config,
        config=config,
        patch=PatchSamplingConfig(min_size=256, max_size=256, multiple=preset.family.latent_token_size),
        rank=16,
        lora_targets=targets,
        recorded_layers=preset.recorded_layers(config, targets),
        precompute_batch_size=1,
        num_samples=500,
        text_encoders=preset.text_encoders,
    )


@pytest.mark.parametrize(("name", "skipped"), fast_rows([("flux.1-dev", (19, 9)), ("sd3.5-medium", (8, 6))]))
def test_encoding_is_planned_within_the_training_peak(name: str, skipped: tuple[int, int]):
    plan = plan_run(request_for(name, skipped))
    assert stage(plan, "encode")["streamed"] is True
    assert stage(plan, "encode")["peak_device_bytes"] < stage(plan, "train")["peak_device_bytes"]
    assert "read layer by layer" in format_plan(plan)


def test_encoders_are_planned_whole_where_they_fit_or_may_not_be_streamed():
    request = request_for("flux.1-dev", (19, 9))
    whole, streamed = planner._encode_text(request, 10 * GIB)
    assert streamed is False and 9 * GIB < whole.peak_bytes < 10 * GIB
    usage, streamed = planner._encode_text(request, 8 * GIB)
    assert streamed is True and usage.peak_bytes < GIB
    # Only CLIP may be, and T5 is what is large.
    assert planner._encode_text(replace(request, streamable_encoders=[0]), 8 * GIB) == (whole, False)


@pytest.mark.fast_for("flux2-dev", "sd3.5")
def test_encoders_are_planned_as_the_pipeline_calls_them(tiny: TinyFamily):
    """Whether they keep the hidden states of all layers, and go without a cache."""
    family, calls = tiny.make_family(), dict[str, dict[str, bool]]()
    pipeline = family.load_text_pipeline(torch.float32, "cpu")
    configs = family.text_encoder_configs()
    for component in configs:

        def note(module: Any, args: Any, kwargs: dict[str, Any], component: str = component) -> None:
            names = [name for name, default in CALL.items() if kwargs.get(name, default) != default]
            calls[component] = {name: kwargs[name] for name in names}

        getattr(pipeline, component).register_forward_pre_hook(note, with_kwargs=True)
    family.encode_prompts(pipeline, [script.PROMPT])
    # Ideogram 4 calls the layers themselves.
    assert calls == {name: family.text_call(config) for name, config in configs.items() if name in calls}
    assert set(calls) == set(configs) or tiny.name == "ideogram4"


def test_the_planned_peak_is_the_rest_with_one_layer_and_activations(tiny: TinyFamily):
    for name, config in tiny.make_family().text_encoder_configs().items():
        encoder = empty_text_encoder(config, torch.float32)
        layers = [child for stack in layer_stacks(encoder) for child in encoder.get_submodule(stack).children()]

        def size(module: torch.nn.Module) -> int:
            tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
            return sum(t.numel() * t.element_size() for t in tensors.values())

        def parameter_size(module: torch.nn.Module) -> int:
            return sum(p.numel() * p.element_size() for p in module.parameters())

        usage = simulate_text_encoder(config, 1, 8, torch.float32, streamed=True, device="cpu")
        rest = size(encoder) - sum(map(size, layers))
        assert usage.parameter_bytes == pytest.approx(rest + max(map(parameter_size, layers)), rel=0.01), name
        whole = simulate_text_encoder(config, 1, 8, torch.float32, device="cpu")
        assert usage.product_flops == whole.product_flops
        assert usage.peak_bytes < whole.peak_bytes


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(128, 128), (128, 128)])


def test_the_script_streams_as_planned_and_trains_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tiny encoders count as small; planned as if they were not, they are streamed, and the run is the same."""
    tiny = tiny_named("flux-dev")
    used: list[bool] = []

    def spy(*args: Any, streamed: bool = False, **kwargs: Any) -> Any:
        used.append(streamed)
        return encode_prompts(*args, streamed=streamed, **kwargs)

    monkeypatch.setattr(prompts, "encode_prompts", spy)
    monkeypatch.setattr(class_images, "encode_prompts", spy)
    flags = ("--skip_blocks", "1,2", "--max_train_steps", "2", "--with_prior_preservation", "--num_class_images", "1")
    flags += ("--class_data_dir", str(tmp_path / "classes"), "--class_prompt", "a cat")
    run = functools.partial(script.train, tiny.folder, photos, text_tokens=tiny.text_tokens)
    original = planner._encode_text
    with monkeypatch.context() as patch:
        patch.setattr(planner, "SMALL_ENCODE_BYTES", 0)
        patch.setattr(planner, "_encode_text", lambda request, training_peak: original(request, 0))
        streamed = run(tmp_path / "streamed", *flags)
    assert used == [True, True]
    whole = run(tmp_path / "whole", *flags)
    assert used == [True, True, False]
    plans = [json.loads((output / "plan.json").read_text()) for output in (streamed, whole)]
    assert [stage(plan, "encode")["streamed"] for plan in plans] == [True, False]
    assert script.losses(streamed) == script.losses(whole)
    script.assert_same_weights(streamed, whole)


def test_the_embedded_model_is_encoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So the run without a model named is not slowed down."""
    assert script.load_script().main(["--skip_blocks", "auto", "--plan_only", "--output_dir", str(tmp_path)]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert stage(plan, "encode")["streamed"] is False
    assert stage(plan, "encode")["peak_device_bytes"] < planner.SMALL_ENCODE_BYTES
