"""Every family through the training script, on its tiny pipeline: truths E4-E6 and what users do with a run.

Truths E1-E3 of every family are in ``test_block_skip.py``. Each test that is a cell of the family table carries the
name of its column.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image
from safetensors import safe_open

from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.residuals import batches as training_data
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from blockskip_hooks.utils.seeds import derived_seed
from tests import script
from tests.plain_loop import PlainLoop, noise_of
from tests.script import PROMPT, WEIGHTS, assert_same_weights, losses, weights
from tests.tiny import TINY_FAMILIES, TinyFamily


SPANS = "1,2"
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(160, 128), (128, 128), (128, 192)])


@pytest.fixture
def train(tiny: TinyFamily, photos: Path, tmp_path: Path) -> Train:
    """Run the script on the family's tiny pipeline."""

    def run(*flags: str, name: str = "out") -> Path:
        extra = [part for flag, value in tiny.flags.items() for part in (f"--{flag}", str(value))]
        return script.train(
            tiny.folder,
            photos,
            tmp_path / name,
            *extra,
            *flags,
            resolution=tiny.resolution,
            text_tokens=tiny.text_tokens,
        )

    return run


_finished: dict[str, Path] = {}


@pytest.fixture
def finished(tiny: TinyFamily, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with skipped blocks, checkpoints and validation images, shared by the tests of a family."""
    if tiny.name not in _finished:
        output = tmp_path_factory.mktemp(tiny.name) / "out"
        flags = ("--validation_prompt", f"{PROMPT} on the beach", "--num_validation_images", "1")
        made = train("--skip_blocks", SPANS, "--checkpointing_steps", "2", "--upcast_before_saving", *flags)
        shutil.copytree(made, output)
        _finished[tiny.name] = output
    return _finished[tiny.name]


@contextmanager
def seen_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[training_data.Batch]]:
    """Every batch that is built, in precompute and in training."""
    batches: list[training_data.Batch] = []
    original = training_data.SampleMaker.batch

    def spy(self, *args, **kwargs):
        batches.append(original(self, *args, **kwargs))
        return batches[-1]

    with monkeypatch.context() as patch:
        patch.setattr(training_data.SampleMaker, "batch", spy)
        yield batches


def kept_layers(output: Path) -> str:
    """The layers that a run trained, as ``--lora_layers``."""
    names = {name.partition(".lora_")[0].removeprefix("transformer.") for name in weights(output)}
    return ",".join(sorted(names))


def pictures(tiny: TinyFamily, lora: Path | None) -> torch.Tensor:
    """An image of the stock pipeline, with or without a LoRA."""
    pipeline = tiny.family.pipeline_class.from_pretrained(tiny.folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    kwargs = json.loads((tiny.folder / "blockskip_defaults.json").read_text())["pipeline_kwargs"]
    call = {**tiny.make_family().prompt_inputs(PROMPT), **kwargs}
    return torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0), output_type="np").images)


@pytest.mark.column("E4")
@pytest.mark.fast_for("flux-dev", "sana")
def test_the_lora_differs_from_the_full_model_by_the_trailing_approximation_only(tiny: TinyFamily, finished: Path):
    """With fresh residuals of the trained model the two agree to rounding; the base model's are another thing."""
    transformer = tiny.make_transformer()
    transformer.load_lora_adapter(finished / WEIGHTS, prefix="transformer")
    model = DiTBlockSkipTransformer(transformer, BlockSkipConfig(leading=1, trailing=2), tiny.family.block_stacks)
    family = tiny.make_family()
    inputs = tiny.make_inputs(2)
    transformer.disable_adapters()
    base = model.capture_residuals(**inputs)
    transformer.enable_adapters()
    fresh = model.capture_residuals(**inputs)
    side = 2 * family.latent_token_size
    like = torch.empty(2, *family.latent_shape(side, side))
    with torch.no_grad():
        full, with_fresh, with_base = (
            family.prediction_to_latents(model(**inputs, residuals=r, return_dict=False)[0], like)
            for r in (None, fresh, base)
        )
    assert (with_fresh - full).abs().max() <= 1e-5 * max(1.0, float(full.abs().max()))
    assert (with_base - full).abs().max() > 1e-5
    leading = {name: tensor for name, tensor in base.tensors().items() if name.startswith("leading")}
    assert leading and all(torch.equal(fresh.tensors()[name], tensor) for name, tensor in leading.items())


@pytest.mark.column("export")
@pytest.mark.fast_for("flux-dev", "sana")
def test_the_lora_is_a_stock_one(tiny: TinyFamily, finished: Path):
    """Kept blocks only, names of the full model, metadata; the stock pipeline loads it and its image changes."""
    model = DiTBlockSkipTransformer(
        tiny.make_transformer(), BlockSkipConfig(leading=1, trailing=2), tiny.family.block_stacks
    )
    kept = tuple(f"transformer.{block.name}." for block in model.spans.kept)
    exported = weights(finished)
    assert exported and all(name.startswith(kept) for name in exported)
    assert {name.rpartition(".lora_")[2] for name in exported} == {"A.weight", "B.weight"}
    assert all(value.any() for value in exported.values())
    with safe_open(finished / WEIGHTS, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.r"] == 2 and metadata["transformer.lora_alpha"] == 4
    assert (pictures(tiny, finished) - pictures(tiny, None)).abs().max() > 1e-4


@pytest.mark.column("E5")
@pytest.mark.fast_for("flux-dev", "sana")
def test_a_resumed_run_equals_the_one_that_was_never_stopped(train: Train, finished: Path, tmp_path: Path):
    halves = tmp_path / "halves"
    shutil.copytree(finished / "checkpoint-2", halves / "checkpoint-2")
    flags = ("--skip_blocks", SPANS, "--upcast_before_saving", "--resume_from_checkpoint", "latest")
    train(*flags, name="halves")
    assert_same_weights(halves, finished)
    assert losses(halves) == losses(finished) and len(losses(halves)) == 4


@pytest.mark.column("validation")
@pytest.mark.fast_for("flux-dev", "sana")
def test_validation_images_are_made(finished: Path):
    report = json.loads((finished / "run_report.json").read_text())
    assert "validate" in [stage["name"] for stage in report["stages"]]
    with Image.open(finished / "image_0.png") as image:
        assert len(set(image.convert("RGB").tobytes())) > 1


@pytest.mark.column("E6")
@pytest.mark.fast_for("flux-dev", "sana")
def test_plain_mode_is_a_straightforward_loop(tiny: TinyFamily, train: Train, photos: Path):
    """The same losses as a loop over the stock model, on the same samples."""
    output = train("--skip_blocks", "none", "--patch_sampling", "none")

    family = tiny.make_family()
    size = tiny.resolution
    scheme = family.flags.get("weighting_scheme", "none")
    patch = PatchSamplingConfig(min_size=size, max_size=size, multiple=family.latent_token_size)
    draws = {key: family.flags[key] for key in ("logit_mean", "logit_std") if key in family.flags}
    plan = SamplePlan(
        seed=3,
        num_images={"instance": 3},
        timesteps=family.scheduler.timesteps,
        patch=patch,
        weighting_scheme=scheme,
        **draws,
    )
    pictures = PhotoSet(scan_photos(photos), size)
    pipeline = family.load_text_pipeline(torch.float32, "cpu")
    embeds = family.collate_embeds(family.encode_prompts(pipeline, [PROMPT]) * 2)
    loop = PlainLoop(tiny)
    vae, transformer = loop.vae, loop.transformer
    expected = []
    for step in range(4):
        samples = [plan.sample(2 * step), plan.sample(2 * step + 1)]
        crops = [
            pictures.crop(s.image, patch_size=size, top=s.top, left=s.left, flip=s.flip, output_size=size)
            for s in samples
        ]
        with torch.no_grad():
            mean, std = family.posterior(vae, torch.stack(crops))
            noises = [derived_seed(sample.noise_seed, "posterior") for sample in samples]
            latents = family.scale_latents(vae, mean + std * noise_of(noises, mean.shape[1:]))
        noise = noise_of([sample.noise_seed for sample in samples], latents.shape[1:])
        indices = [sample.timestep_index for sample in samples]
        noisy, sigmas = family.add_noise(latents, noise, indices), family.sigmas(indices)
        inputs = family.transformer_inputs(
            dict(transformer.config), noisy, family.scheduler.timesteps[indices], embeds
        )
        velocity = family.prediction_to_latents(transformer(**inputs, return_dict=False)[0], latents)
        prediction, target = family.loss_terms(velocity, latents, noise, noisy, sigmas)
        loss = (compute_loss_weighting_for_sd3(scheme, sigmas) * (prediction - target) ** 2).flatten(1).mean()
        expected.append(loop.step(loss))
    assert losses(output) == pytest.approx(expected, rel=1e-4)


@pytest.mark.column("text encoder")
@pytest.mark.fast_for("flux-dev", "sana")
def test_text_encoders_train_where_the_family_has_it(
    tiny: TinyFamily, train: Train, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    flags = ("--skip_blocks", SPANS, "--train_text_encoder", "--text_encoder_lr", "1e-2")
    if not tiny.trains_text:
        with pytest.raises(AssertionError, match="ended with 2"):
            train(*flags)
        assert f"--train_text_encoder is not available for {tiny.family.name}" in capsys.readouterr().err
        return
    output = train(*flags)
    trained = {name.partition(".")[0] for name in weights(output)}
    pipeline = tiny.make_family().load_text_pipeline(torch.float32, "cpu")
    assert trained == {"transformer", *tiny.make_family().trainable_text_encoders(pipeline)}
    assert all(value.any() for value in weights(output).values())
    assert (pictures(tiny, output) - pictures(tiny, None)).abs().max() > 1e-4


@pytest.mark.column("prior preservation")
@pytest.mark.fast_for("flux-dev")
def test_prior_preservation_pairs_class_images_with_their_prompt(
    tiny: TinyFamily, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Class images come from the pipeline; in batches of two each sample has its own prompt's embeddings."""
    classes = tmp_path / "classes"
    flags = ("--with_prior_preservation", "--class_data_dir", str(classes), "--class_prompt", "a photo of cat")
    # Then the batches of training are the last ones.
    flags += ("--no-refresh_residuals",)
    with seen_batches(monkeypatch) as batches:
        output = train("--skip_blocks", SPANS, *flags, "--num_class_images", "2", "--sample_batch_size", "2")
    assert len(list(classes.glob("*.jpg"))) == 2
    assert len(losses(output)) == 4
    training = batches[-4:]
    assert all(batch.prompts == [PROMPT] * 2 + ["a photo of cat"] * 2 for batch in training)
    for tensor in training[0].embeds.values():
        assert torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[2], tensor[3])
    assert any(not torch.equal(tensor[0], tensor[2]) for tensor in training[0].embeds.values())


@pytest.mark.column("captions")
@pytest.mark.fast_for("sd3")
def test_captions_of_different_lengths_train_as_without_skipping(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Residuals are captured per caption and padded in batches; with m = 0 that must change nothing (E2)."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    captions = ["a photo of sks dog on the beach", "sks dog", "a red dog"]
    for path, caption in zip(sorted(photos.iterdir()), captions):
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(caption)
    flags = ("--instance_data_dir", str(folder), "--patch_sampling", "none", "--upcast_before_saving")
    with seen_batches(monkeypatch) as batches:
        skipped = train("--skip_blocks", "2,0", *flags, name="skipped")
    assert all(
        prompt == captions[sample.image] for batch in batches for sample, prompt in zip(batch.samples, batch.prompts)
    )
    assert any(len(set(batch.prompts)) == 2 for batch in batches)
    plain = train("--skip_blocks", "none", *flags, "--lora_layers", kept_layers(skipped), name="plain")
    assert losses(skipped) == pytest.approx(losses(plain), rel=1e-3)


@pytest.mark.column("buckets")
@pytest.mark.fast_for("sana")
@pytest.mark.parametrize("patch_sampling", ["none", "dynamic"])
def test_aspect_ratio_buckets(tiny: TinyFamily, train: Train, patch_sampling: str, monkeypatch: pytest.MonkeyPatch):
    """Batches of one shape, each photo in the bucket of its aspect ratio."""
    size = tiny.resolution
    buckets = f"{size},{size};{3 * size // 2},{size}"
    flags = ("--aspect_ratio_buckets", buckets, "--patch_sampling", patch_sampling)
    with seen_batches(monkeypatch) as batches:
        output = train("--skip_blocks", SPANS, *flags)
    family = tiny.make_family()
    scale = 1 if patch_sampling == "none" else 2
    shapes = {
        (number, family.latent_shape(height // scale, size // scale))
        for number, height in enumerate((size, 3 * size // 2))
    }
    assert {(sample.bucket, tuple(b.latents.shape[1:])) for b in batches for sample in b.samples} == shapes
    # Photo 2 is the upright one.
    assert all((sample.image == 2) == (sample.bucket == 1) for b in batches for sample in b.samples)
    assert len(losses(output)) == 4


@pytest.mark.parametrize("name", sorted({tiny.family.name for tiny in TINY_FAMILIES}))
def test_a_family_is_one_small_file(name: str):
    family = next(tiny.family for tiny in TINY_FAMILIES if tiny.family.name == name)
    module = Path(__import__(family.__module__, fromlist=["_"]).__file__)
    code = [line for line in module.read_text().splitlines() if line.strip()]
    assert len(code) <= 200
