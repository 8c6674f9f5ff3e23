"""FLUX.3: one record of the text per prompt, nothing held for references, and pictures of the stock blocks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux3AutoBlocks, Flux3ModularPipeline, Flux3Transformer2DModel
from PIL import Image

from blockskip_hooks import BlockSkipConfig, DiTBlockSkipTransformer
from blockskip_hooks.blocks import idle_modules, list_blocks, split_blocks
from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.data.photo import Photo
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.families import detect_family, unread_components
from blockskip_hooks.families.flux3 import TEXT_WINDOW
from blockskip_hooks.families.flux3_pipeline import TextProcessor
from blockskip_hooks.families.prompts import check_embeds
from blockskip_hooks.loading.component_config import load_config, read_index
from blockskip_hooks.loading.download import check_weights, resolve_model
from blockskip_hooks.loading.models import empty_model
from blockskip_hooks.loading.streaming import Streamer
from blockskip_hooks.lora import lora_targets
from blockskip_hooks.planning.presets import preset_facts
from blockskip_hooks.planning.request import PlanRequest
from blockskip_hooks.planning.stages import RECORD_OVERHEAD, plan_run
from blockskip_hooks.reporting.model_card import usage_snippet
from blockskip_hooks.residuals import precompute
from blockskip_hooks.residuals.batches import SHARED_TEXT, PhotoSource, SampleMaker
from blockskip_hooks.residuals.store import ResidualStore
from blockskip_hooks.utils.formatting import format_bytes
from tests import script
from tests.fake_hub import USER, fake_hub
from tests.script import PROMPT, assert_same_weights, losses
from tests.tiny import TINY_FAMILIES, TinyFamily


TINY = next((tiny for tiny in TINY_FAMILIES if tiny.name == "flux3"), None)
pytestmark = pytest.mark.skipif(TINY is None, reason="diffusers has FLUX.3 from 0.42 on")
CAPTIONS = [PROMPT, "a red cat", PROMPT]


def tiny() -> TinyFamily:
    assert TINY is not None
    return TINY


def wrapped(leading: int, trailing: int) -> DiTBlockSkipTransformer:
    return DiTBlockSkipTransformer(tiny().make_transformer(), BlockSkipConfig(leading=leading, trailing=trailing))


# Records


def record(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leading: int,
    trailing: int,
    shares_text: bool = True,
    together: int = 1,
) -> tuple[SampleMaker, ResidualStore, list[int]]:
    """Records of six samples of three photos with two prompts, and how many samples were in each forward."""
    family, size = tiny().make_family(), tiny().resolution
    photos = [
        Photo(str(number), text, lambda: Image.new("RGB", (64, 64), "red")) for number, text in enumerate(CAPTIONS)
    ]
    plan = SamplePlan(
        seed=0,
        num_images={"instance": 3},
        timesteps=family.scheduler.timesteps,
        patch=PatchSamplingConfig(min_size=size, max_size=size, multiple=family.latent_token_size),
    )
    generator = torch.Generator().manual_seed(0)
    config = load_config(tiny().folder / "transformer")
    embeds = {}
    for prompt in CAPTIONS[:2]:
        shape = family.empty_embeds(config, 5, torch.float32)["prompt_embeds"].shape
        embeds[prompt] = {"prompt_embeds": torch.randn(shape, generator=generator)}
    sources: Any = {"instance": PhotoSource(PhotoSet(photos, size), PROMPT)}
    maker = SampleMaker(plan, sources, family, embeds, "cpu", torch.float32, shares_text=shares_text)
    store = ResidualStore(tmp_path / f"{leading},{trailing},{shares_text}", {})
    forwards: list[int] = []
    original = precompute.capture

    def counted(model: DiTBlockSkipTransformer, maker: SampleMaker, batch: Any) -> Any:
        forwards.append(len(batch.samples))
        return original(model, maker, batch)

    samples = maker.samples(range(6))
    shape = family.latent_shape(size, size)
    latents = {sample.id: torch.randn(shape, generator=generator) for sample in samples}
    with monkeypatch.context() as patch:
        patch.setattr(precompute, "capture", counted)
        made = precompute.precompute_records(
            samples,
            latents,
            model=wrapped(leading, trailing),
            maker=maker,
            store=store,
            batch_size=2,
            together=together,
        )
    assert made == 6 and all(maker.is_recorded(sample, store) for sample in samples)
    return maker, store, forwards


@pytest.mark.parametrize(
    ("spans", "own", "forwards"),
    [
        ((2, 0), {"latents"}, [1, 1]),
        ((3, 0), {"latents", "leading_hidden_states"}, [2, 2, 2]),
        ((1, 1), {"latents", "trailing_hidden_states"}, [2, 2, 2]),
    ],
    ids=("2,0", "3,0", "1,1"),
)
def test_a_prompt_has_one_record_of_its_text(
    spans: tuple[int, int], own: set[str], forwards: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the text's blocks alone there is a forward per prompt, and nothing of a sample but its latents."""
    assert wrapped(*spans).spans.shares_text
    maker, store, made = record(tmp_path, monkeypatch, *spans)
    alone, whole, _ = record(tmp_path, monkeypatch, *spans, shares_text=False)
    samples = maker.samples(range(6))
    assert made == forwards
    assert len(store) == 6 + 2 and len(whole) == 6
    for sample in samples:
        assert set(store.read(sample.id)) == own
        shared, each = maker.read_record(sample, store), alone.read_record(sample, whole)
        assert shared.keys() == each.keys() == own | {"leading_encoder_hidden_states"}
        for name, tensor in each.items():
            torch.testing.assert_close(shared[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spans", [(2, 0), (3, 0)], ids=str)
def test_a_text_that_is_gone_takes_one_batch_to_make_again(
    spans: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    maker, store, _ = record(tmp_path, monkeypatch, *spans)
    samples = maker.samples(range(6))
    texts = sorted({maker.shared_ids(sample)[SHARED_TEXT] for sample in samples})
    before = {name: store.read(name) for name in texts}
    store.forget(texts[0])
    lost = sum(sample.id not in store for sample in samples)
    encoded: list[int] = []

    def encode(vae: Any, part: Any) -> torch.Tensor:
        encoded.append(len(part))
        return torch.zeros(len(part), *tiny().make_family().latent_shape(tiny().resolution, tiny().resolution))

    monkeypatch.setattr(maker, "encode", encode)
    latents = precompute.encode_latents(samples, maker=maker, vae=wrapped(0, 0), store=store, batch_size=2)
    made = precompute.precompute_records(
        samples, latents, model=wrapped(*spans), maker=maker, store=store, batch_size=2
    )
    # A batch of samples writes its text beside its own records; the text alone is written alone.
    assert encoded == [2] and made == lost == (0 if spans == (2, 0) else 2)
    assert all(maker.is_recorded(sample, store) for sample in samples)
    for name in texts:
        torch.testing.assert_close(store.read(name), before[name], rtol=0, atol=0)


def test_texts_are_made_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    groups: list[int] = []
    original = DiTBlockSkipTransformer.together

    def noted(self: DiTBlockSkipTransformer, tasks: Any, between: Any = None) -> Any:
        groups.append(len(tasks))
        return original(self, tasks, between)

    monkeypatch.setattr(DiTBlockSkipTransformer, "together", noted)
    maker, alone, _ = record(tmp_path / "alone", monkeypatch, 2, 0)
    assert groups == [1] * 5
    groups.clear()
    _, in_step, forwards = record(tmp_path / "in_step", monkeypatch, 2, 0, together=2)
    # Two prompts in step; there is nothing to run for the batches of samples then.
    assert groups == [2, 1, 1, 1] and forwards == [1, 1]
    for sample in maker.samples(range(6)):
        torch.testing.assert_close(
            maker.read_record(sample, in_step), maker.read_record(sample, alone), rtol=0, atol=0
        )


def test_text_that_has_met_the_image_is_that_of_a_sample():
    spans = split_blocks(list_blocks(tiny().make_transformer()), BlockSkipConfig(leading=5))
    assert not spans.shares_text
    assert [block.only for block in spans.leading] == ["text", "text", "image", "image", None]


@pytest.mark.parametrize("leading", [1, 2])
def test_a_capture_of_text_alone_runs_no_block_of_the_image(leading: int):
    model = wrapped(leading, 0)
    for block in model.spans.leading[leading:] + model.spans.kept[2 - leading :]:
        block.module.register_forward_pre_hook(lambda *_: pytest.fail("the image's blocks ran"))
    residuals = model.capture_residuals(**tiny().make_inputs(2))
    assert set(residuals.tensors()) == {"leading_encoder_hidden_states"}


# What trains, and what is held


def targets(leading: int, trailing: int) -> set[str]:
    names = lora_targets(wrapped(leading, trailing), tiny().family.lora_layers)
    return {name.partition(".attn")[0].rpartition(".")[0] for name in names}


def test_text_that_no_block_reads_does_not_train():
    assert targets(1, 2) == {"txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks"}
    assert targets(1, 3) == {"mode_blocks.image"}
    with pytest.raises(ValueError, match="matches no layer of a kept block"):
        targets(1, 5)
    assert targets(0, 0) == {"txt_mode_blocks", "mode_blocks.image", "single_transformer_blocks"}


@torch.no_grad()
def test_what_only_references_need_holds_no_weights_and_still_runs():
    inputs = tiny().make_inputs(1)
    model = DiTBlockSkipTransformer.from_pretrained(tiny().folder, BlockSkipConfig(leading=1, trailing=1))
    idle = idle_modules(model.transformer)
    assert "mode_blocks.image_cond.1" in idle and "x_embedders.image_cond" in idle
    assert all(parameter.is_meta for module in idle.values() for parameter in module.parameters())
    reference = {"image_cond_hidden_states": torch.ones(1, 4, 16), "image_cond_ids": torch.ones(4, 4)}
    for given in (inputs, {**inputs, **reference}):
        with model.full_model() as transformer:
            expected = tiny().make_transformer()(**given, return_dict=False)[0]
            assert torch.equal(transformer(**given, return_dict=False)[0], expected)
    assert all(parameter.is_meta for module in idle.values() for parameter in module.parameters())


@torch.no_grad()
def test_what_only_references_need_is_not_read(monkeypatch: pytest.MonkeyPatch):
    model = DiTBlockSkipTransformer.from_pretrained(tiny().folder, BlockSkipConfig(leading=3, trailing=1))
    idle = set(idle_modules(model.transformer).values())
    fetched: list[torch.nn.Module] = []
    fetch = Streamer._fetch

    def noted(self: Streamer, module: torch.nn.Module, left: Any) -> Any:
        fetched.append(module)
        return fetch(self, module, left)

    monkeypatch.setattr(Streamer, "_fetch", noted)
    with model.full_model() as transformer:
        made = transformer(**tiny().make_inputs(1), return_dict=False)[0]
        assert not idle & set(fetched)
        assert {block.module for block in model.spans.skipped} <= set(fetched)
    assert torch.equal(made, tiny().make_transformer()(**tiny().make_inputs(1), return_dict=False)[0])


# The stock pipeline, and what is refused


def test_the_index_of_a_modular_pipeline_names_the_family(tmp_path: Path):
    index = read_index(tiny().folder)
    assert index["_class_name"] == "Flux3ModularPipeline"
    assert index["text_encoder"] == ["transformers", "Qwen3VLForConditionalGeneration"]
    (tmp_path / "modular_model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_index(tmp_path)


@pytest.mark.parametrize("variant", [None, "bf16"])
def test_a_modular_model_is_downloaded_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str | None
):
    with fake_hub("token") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        name, folder = f"{USER}/flux3", tiny().folder
        hub.repositories.append(name)
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        others = {f"{part}/model.safetensors": b"" for part in ("other", "prompt_upsampler")}
        hub.files[name] = {file: path.read_bytes() for file, path in files.items()} | others
        place: dict[str, Any] = {"cache_dir": str(tmp_path), "token": "token", "unread": unread_components}
        if variant:
            # Beside the usual weights, which are not asked for.
            files = {re.sub(r"(model)(?=\.safetensors)", rf"\1.{variant}", file): at for file, at in files.items()}
            hub.files[name] |= {file: path.read_bytes() for file, path in files.items()}
            with pytest.raises(ValueError, match="transformer holds no safetensors weights of --variant fp16"):
                check_weights(resolve_model(name, variant="fp16", **place), tiny().family.text_components, "fp16")
        found = resolve_model(name, variant=variant, **place)
        with pytest.raises(ValueError, match="could not be downloaded"):
            resolve_model(f"{USER}/none", cache_dir=str(tmp_path), token="token")
        hub.gated.append(name)
        advice = f"{name} is gated: accept its licence on {hub.endpoint}/{name}, then run: hf auth login"
        for part in ({"configs_only": True}, {"variant": variant}):
            with pytest.raises(ValueError, match=advice):
                resolve_model(name, **part, **(place | {"cache_dir": str(tmp_path / "other")}))
    assert detect_family(found) is tiny().family
    downloaded = {str(path.relative_to(found)) for path in found.rglob("*.safetensors")}
    assert downloaded == {file for file in files if file.endswith(".safetensors")}
    check_weights(found, tiny().family.text_components, variant)
    stored = torch.bfloat16 if variant else torch.float32
    pipeline = tiny().family(found, variant).load_pipeline(stored)
    assert pipeline.vae.dtype == pipeline.text_encoder.dtype == stored
    for file in files.keys() - {"blockskip_defaults.json"}:
        assert (found / file).read_bytes() == files[file].read_bytes()


def test_pictures_are_those_of_the_stock_pipeline():
    """Its own blocks, loaded its own way; of the upsampler, which is another model, it is free here too."""
    family = tiny().make_family()
    blocks = Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    stock = Flux3ModularPipeline(blocks=blocks, pretrained_model_name_or_path=str(tiny().folder))
    stock.load_components()
    stock.register_components(tokenizer=TextProcessor(stock.tokenizer))
    size = {"height": 32, "width": 48, "num_inference_steps": 2}
    call = {**family.prompt_inputs(PROMPT), **size, "output_type": "pt"}
    expected = stock(**call, generator=torch.Generator().manual_seed(0), output="images")
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = [
        pipeline(**call, **guidance, generator=torch.Generator().manual_seed(0)).images
        for guidance in ({}, {"guidance_scale": 1.0})
    ]
    assert torch.equal(made[0], expected)
    assert (made[1] - expected).abs().max() > 1e-3


def test_the_code_on_a_card_loads_the_pipeline():
    snippet = usage_snippet(
        str(tiny().folder),
        "lora",
        PROMPT,
        dtype="float32",
        pipeline_class=("blockskip_hooks.families.flux3_pipeline", "Flux3ImagePipeline"),
        components=tiny().make_family().missing_components(),
    )
    loading = [line for line in snippet.splitlines() if "import" in line or ".from_pretrained" in line]
    found: dict[str, Any] = {}
    exec("\n".join(loading), found)
    assert found["pipeline"].scheduler.config.shift == tiny().make_family().scheduler.config.shift > 6


def test_prompts_of_two_windows_cannot_share_a_batch():
    family = tiny().make_family(max_sequence_length=3 * TEXT_WINDOW)
    config = load_config(tiny().folder / "transformer")
    embeds = {str(tokens): family.empty_embeds(config, tokens, torch.float32) for tokens in (5, 70, 100)}
    check_embeds(family, config, embeds, torch.float32)
    check_embeds(family, config, embeds, torch.float32, ["5", "70"])
    with pytest.raises(ValueError, match="80 to 160 tokens .* --train_batch_size 1, or --max_sequence_length 80"):
        check_embeds(family, config, embeds, torch.float32, ["5", "100"])


def test_a_distilled_model_is_refused(tmp_path: Path):
    folder = shutil.copytree(tiny().folder, tmp_path / "model")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "flow_map": True}))
    family = tiny().family(folder)
    with pytest.raises(ValueError, match="is distilled to few steps"):
        family.check()


# What the page says


@pytest.mark.slow
def test_what_the_page_says_of_the_default_config(tmp_path: Path):
    """Bytes of 500 records and FLOPs of a capture, by the planner, for the default config of diffusers' class."""
    with torch.device("meta"):
        whole = Flux3Transformer2DModel()
    config: dict[str, Any] = {**whole.config, "_class_name": "Flux3Transformer2DModel"}
    for part, content in (("transformer", config), ("vae", preset_facts("flux.2-klein-4b")["vae"])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    family = tiny().family(tmp_path, flags={"max_sequence_length": TEXT_WINDOW})
    page = (script.ROOT / "docs" / "models.md").read_text()
    for spans, words in (((5, 0), "126 MiB instead of 360 MiB"), ((10, 0), "3.05 GiB instead of 3.28 GiB")):
        skip = BlockSkipConfig(leading=spans[0], trailing=spans[1])
        skeleton = DiTBlockSkipTransformer(empty_model(config), skip)
        plan = plan_run(
            PlanRequest(
                family=family,
                transformer_config=config,
                config=skip,
                patch=PatchSamplingConfig(min_size=512, max_size=512, multiple=16),
                rank=4,
                lora_targets=lora_targets(skeleton, family.lora_layers),
                text_tokens=TEXT_WINDOW,
                num_samples=500,
                precompute_batch_size=1,
            )
        )
        residuals = plan["residuals"]
        each = 500 * (residuals["text_bytes"] - RECORD_OVERHEAD)
        alone = residuals["bytes"] - residuals["text_bytes"] + each
        assert f"{format_bytes(residuals['bytes'])} instead of {format_bytes(alone)}" == words and words in page
        if spans == (5, 0):
            (stage,) = (stage for stage in plan["stages"] if stage["name"] == "precompute")
            work = stage["tflops_per_step"] + stage["attention_tflops_per_step"] - stage["vae_tflops"]
            assert f"{work:.2f}" == "0.23" and "0.23 TFLOP each" in page
    sizes = [sum(p.numel() for p in part.parameters()) for part in (whole, *idle_modules(whole).values())]
    assert f"{sum(sizes[1:]) / 1e9:.2f} of {sizes[0] / 1e9:.2f} billion" in page
    assert f"{format_bytes(2 * sum(sizes[1:]))}" == "1.25 GiB"


# Runs


@pytest.mark.slow
def test_a_run_with_records_of_prompts_is_resumed_bit_for_bit(tmp_path: Path):
    photos = script.save_photos(tmp_path / "photos", [(80, 64), (64, 64), (64, 96)])
    for path, caption in zip(sorted(photos.iterdir()), CAPTIONS):
        path.with_suffix(".txt").write_text(caption)

    def train(name: str, *flags: str) -> Path:
        common = ("--skip_blocks", "2,0", "--checkpointing_steps", "2", "--upcast_before_saving")
        return script.train(
            tiny().folder, photos, tmp_path / name, *common, *flags, resolution=64, text_tokens=tiny().text_tokens
        )

    whole = train("whole")
    report = json.loads((whole / "run_report.json").read_text())
    assert report["residuals"]["records"] == 8
    shutil.copytree(whole / "checkpoint-2", tmp_path / "halves" / "checkpoint-2")
    halves = train("halves", "--resume_from_checkpoint", "latest")
    assert_same_weights(halves, whole)
    assert losses(halves) == losses(whole)
