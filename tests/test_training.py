"""Training through the script: truths E4-E6, resume, and the modes of residuals, on a tiny FLUX pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.families.flux import Flux
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.transformer import BlockSkipConfig, DiTBlockSkipTransformer
from tests import script
from tests.script import PROMPT, WEIGHTS, assert_same_weights, losses, weights
from tests.tiers import fast_first, fast_rows


@pytest.fixture
def train(model: Path, photos: Path, tmp_path: Path):
    """Run the script with small settings; returns its output folder."""

    def run(*flags: str, name: str = "out") -> Path:
        return script.train(model, photos, tmp_path / name, *flags)

    return run


def test_plain_mode_is_a_straightforward_loop(train, model: Path, photos: Path):
    """E6: the same losses as a loop over the stock model, on the same samples."""
    output = train("--skip_blocks", "none", "--patch_sampling", "none")

    from blockskip_hooks.config import PatchSamplingConfig
    from blockskip_hooks.data.sample_plan import SamplePlan
    from blockskip_hooks.utils.seeds import derived_seed

    family = Flux(model)
    patch = PatchSamplingConfig(mode="none", min_size=32, max_size=64, multiple=8)
    plan = SamplePlan(seed=3, num_images={"instance": 3}, timesteps=family.scheduler.timesteps, patch=patch)
    pictures = PhotoSet(scan_photos(photos), 64)
    pipeline = FluxPipeline.from_pretrained(model)
    tokens, pooled, text_ids = pipeline.encode_prompt([PROMPT] * 2, max_sequence_length=12)
    tokens, pooled = tokens.detach(), pooled.detach()
    transformer = pipeline.transformer
    targets = lora_targets(DiTBlockSkipTransformer(transformer, BlockSkipConfig()), family.lora_layers)
    parameters = add_lora(transformer, targets, rank=2, alpha=4, dropout=0.0, seed=3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-4)
    expected = []
    for step in range(4):
        samples = [plan.sample(2 * step), plan.sample(2 * step + 1)]
        crops = [
            pictures.crop(s.image, patch_size=64, top=s.top, left=s.left, flip=s.flip, output_size=64) for s in samples
        ]
        with torch.no_grad():
            posterior = pipeline.vae.encode(torch.stack(crops)).latent_dist
        draws = [
            torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(derived_seed(s.noise_seed, "posterior")))
            for s in samples
        ]
        latents = ((posterior.mean + posterior.std * torch.stack(draws)) - 0.1) * 0.8
        noise = torch.stack(
            [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(s.noise_seed)) for s in samples]
        )
        timesteps = family.scheduler.timesteps[[s.timestep_index for s in samples]]
        sigmas = (timesteps / 1000).reshape(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        prediction = transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, 2, 4, 16, 16),
            timestep=timesteps / 1000,
            guidance=torch.full((2,), 3.5),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=text_ids,
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 8, 8, "cpu", torch.float32),
            return_dict=False,
        )[0]
        prediction = FluxPipeline._unpack_latents(prediction, 64, 64, 4)
        loss = ((prediction - (noise - latents)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(output) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("residuals", fast_first(["precomputed", "online"]))
def test_without_trailing_span_training_is_lora_on_the_remaining_blocks(train, residuals: str):
    """E2 over whole runs: skipping the leading span changes neither losses nor weights."""
    flags = ("--patch_sampling", "none", "--lora_layers")
    skipped = train("--skip_blocks", "2,0", "--residuals", residuals, *flags, "attn.to_q,attn.to_v", name="skipped")
    kept = ",".join(f"single_transformer_blocks.{i}.attn.{p}" for i in range(3) for p in ("to_q", "to_v"))
    plain = train("--skip_blocks", "none", *flags, kept, name="plain")
    assert losses(skipped) == pytest.approx(losses(plain), rel=1e-4)
    for name, value in weights(plain).items():
        assert torch.allclose(weights(skipped)[name], value, atol=1e-5), name


@pytest.mark.parametrize(
    "flags",
    fast_first(
        [
            ("--skip_blocks", "1,2"),
            ("--skip_blocks", "1,1", "--gradient_accumulation_steps", "2", "--train_text_encoder"),
            ("--skip_blocks", "none"),
            ("--skip_blocks", "2,1", "--residual_budget", "40KB", "--lora_dropout", "0.3"),
            ("--skip_blocks", "1,1", "--optimizer", "prodigy", "--learning_rate", "1", "--lr_scheduler", "cosine"),
            ("--skip_blocks", "1,2", "--refresh_residuals", "--stretch_steps", "3", "--lora_dropout", "0.3"),
            ("--skip_blocks", "1,1", "--refresh_residuals", "--stretch_steps", "3", "--train_text_encoder"),
            ("--skip_blocks", "1,2", "--record_repeats", "2", "--stretch_steps", "3"),
        ],
        fast=2,
    ),
    ids=[
        "skip",
        "accumulation and text encoder",
        "plain",
        "stretches and dropout",
        "prodigy and cosine",
        "refreshed, with dropout",
        "refreshed, with a text encoder",
        "repeated records",
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(train, flags: tuple[str, ...]):
    """E5: bit for bit; the interrupted run stops after step 2 of 4, with its records gone."""
    whole = train(*flags, "--upcast_before_saving", name="whole")
    halves = train(*flags, "--checkpointing_steps", "2", name="halves")
    for leftover in [halves / WEIGHTS, *halves.glob("checkpoint-4/*")]:
        leftover.unlink()
    (halves / "checkpoint-4").rmdir()
    train(*flags, "--resume_from_checkpoint", "latest", "--upcast_before_saving", name="halves")
    assert_same_weights(halves, whole)
    assert losses(halves) == losses(whole)
    assert len(losses(halves)) == 4


def test_records_left_by_a_killed_run_are_used_again(train, tmp_path: Path):
    store = tmp_path / "records"
    first = train("--skip_blocks", "1,2", "--residual_dir", str(store), name="first")
    second = train("--skip_blocks", "1,2", "--residual_dir", str(store), name="second")
    assert json.loads((first / "run_report.json").read_text())["residuals"]["records"] == 8
    assert json.loads((second / "run_report.json").read_text())["residuals"]["records"] == 0
    assert_same_weights(first, second)


def test_stretches_bound_the_disk_and_change_nothing(train, tmp_path: Path):
    flags = ("--skip_blocks", "1,2", "--no-refresh_residuals")
    one = train(*flags, name="one")
    several = train(*flags, "--residual_budget", "30KB", name="several")
    residuals = json.loads((several / "run_report.json").read_text())["residuals"]
    assert residuals["stretches"] > 1
    assert_same_weights(one, several)
    assert not (several / "residuals").exists()


def test_refreshed_residuals_are_those_of_the_lora_so_far(train):
    """A stretch of one step is what a forward in every step gives; of all steps, what the base model gives."""
    flags = ("--skip_blocks", "1,2", "--learning_rate", "0.03")
    online = train(*flags, "--residuals", "online", name="online")
    each = train(*flags, "--refresh_residuals", "--stretch_steps", "1", name="each")
    assert losses(each) == pytest.approx(losses(online), rel=1e-5)
    base = train(*flags, "--no-refresh_residuals", name="base")
    assert losses(train(*flags, "--refresh_residuals", "--stretch_steps", "4", name="once")) == losses(base)
    assert losses(each)[:1] == losses(base)[:1] and losses(each)[1:] != pytest.approx(losses(base)[1:], rel=1e-6)
    report = json.loads((each / "run_report.json").read_text())
    assert report["residuals"]["stretches"] == 4 and report["residuals"]["records"] == 8


def test_records_of_another_lora_are_not_used(train, tmp_path: Path):
    """A refreshed run that starts again finds the records of its last stretch alone, and trains as before."""
    flags = ("--skip_blocks", "1,2", "--refresh_residuals", "--stretch_steps", "2", "--residual_dir")
    first = train(*flags, str(tmp_path / "records"), name="first")
    second = train(*flags, str(tmp_path / "records"), name="second")
    assert_same_weights(first, second)
    assert losses(first) == losses(second)


@pytest.mark.parametrize(
    ("flags", "stretches"),
    fast_rows(
        [
            (("--skip_blocks", "1,2"), 4),
            (("--skip_blocks", "1,2", "--residual_dir", "records"), 1),
            (("--skip_blocks", "3,0"), 1),
            (("--skip_blocks", "1,2", "--no-refresh_residuals"), 1),
        ],
        fast=2,
    ),
)
def test_trailing_residuals_are_refreshed_unless_records_are_kept(
    train, tmp_path: Path, monkeypatch, flags, stretches
):
    monkeypatch.chdir(tmp_path)
    report = json.loads((train(*flags) / "run_report.json").read_text())
    assert report["residuals"]["stretches"] == stretches


def test_repeated_records_are_made_once(train):
    output = train("--skip_blocks", "1,2", "--record_repeats", "2", "--no-refresh_residuals")
    report = json.loads((output / "run_report.json").read_text())
    assert report["residuals"]["records"] == 4 and report["train"]["samples"] == 8
    plan = json.loads((output / "plan.json").read_text())
    assert plan["residuals"]["records"] == 4


def test_residuals_matter(train):
    with_residuals = train("--skip_blocks", "1,2", name="with")
    without = train("--skip_blocks", "1,2", "--residuals", "none", name="without")
    assert losses(with_residuals) != pytest.approx(losses(without), rel=1e-2)


def test_cached_latents_give_the_same_training_on_fixed_crops(train):
    fixed = ("--skip_blocks", "none", "--center_crop")
    assert losses(train(*fixed, name="a")) == pytest.approx(
        losses(train(*fixed, "--cache_latents", name="b")), rel=1e-5
    )


def test_captions_belong_to_their_photos(train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A caption follows its photo however samples are drawn."""
    from blockskip_hooks.residuals import batches as training_data

    folder = tmp_path / "captioned"
    folder.mkdir()
    for path, word in zip(sorted(photos.iterdir()), ("red", "blue", "snow")):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text(f"a photo of sks dog {word}")
    seen = []
    original = training_data.SampleMaker.batch

    def spy(self, samples, latents, residuals=None):
        batch = original(self, samples, latents, residuals)
        for sample, prompt, tokens in zip(batch.samples, batch.prompts, batch.embeds["prompt_embeds"]):
            seen.append((sample.image, prompt, tokens))
        return batch

    monkeypatch.setattr(training_data.SampleMaker, "batch", spy)
    train("--skip_blocks", "1,1", "--instance_data_dir", str(folder))
    assert {image for image, _, _ in seen} == {0, 1, 2}
    for image, prompt, tokens in seen:
        assert prompt.endswith(("red", "blue", "snow")[image])
        assert all(torch.equal(tokens, other) == (image == other_image) for other_image, _, other in seen)


def test_adapters_stay_float32_under_bfloat16(train):
    output = train("--skip_blocks", "1,1", "--mixed_precision", "bf16", "--checkpointing_steps", "4")
    assert {value.dtype for value in load_file(output / "checkpoint-4" / WEIGHTS).values()} == {torch.float32}
    assert {value.dtype for value in weights(output).values()} == {torch.bfloat16}


def test_checkpoint_limit(train):
    output = train("--skip_blocks", "1,1", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2")
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_plan_only_writes_the_plan_and_nothing_else(train):
    output = train("--skip_blocks", "auto", "--plan_only")
    assert [path.name for path in output.iterdir()] == ["plan.json"]
    plan = json.loads((output / "plan.json").read_text())
    assert plan["schema"] == 1 and plan["skip"]["source"] == "rule"
    assert {stage["name"] for stage in plan["stages"]} >= {"encode", "precompute", "train"}


def test_outputs_follow_the_schema(train):
    flags = ("--validation_prompt", "a photo of sks dog on the beach", "--num_validation_images", "1")
    output = train("--skip_blocks", "1,1", *flags)
    report = json.loads((output / "run_report.json").read_text())
    assert report["schema"] == 1
    assert set(report) == {
        "schema", "model", "family", "created_at", "base_revision", "weights", "skip", "patch", "stages", "train",
        "lora", "residuals", "settings", "machine", "versions",
    }  # fmt: skip
    assert [stage["name"] for stage in report["stages"]] == [
        "plan",
        "encode",
        "load",
        "precompute",
        "train",
        "validate",
    ]
    assert report["train"]["steps"] == 4 and len(report["train"]["loss"]) == 4
    page = (output / "report.html").read_text()
    assert page.count("data:image/") >= 6
    assert (output / "README.md").is_file() and (output / "image_0.png").is_file()


def test_text_encoders_are_gone_in_training(train, monkeypatch: pytest.MonkeyPatch):
    """No live module or tensor of the text encoders when the first step runs."""
    import gc

    from transformers import CLIPTextModel, T5EncoderModel

    from blockskip_hooks.training.records import RecordSource

    alive = []
    original = RecordSource.loader

    def spy(self, steps):
        gc.collect()
        alive.extend(o for o in gc.get_objects() if isinstance(o, (CLIPTextModel, T5EncoderModel)))
        return original(self, steps)

    before = {id(o) for o in gc.get_objects() if isinstance(o, (CLIPTextModel, T5EncoderModel))}
    monkeypatch.setattr(RecordSource, "loader", spy)
    train("--skip_blocks", "1,1")
    assert not [o for o in alive if id(o) not in before]
