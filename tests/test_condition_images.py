"""Condition images: pairs are cropped alike, their tokens join as in the stock pipeline, E1 to E6 hold."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image, ImageOps
from safetensors.torch import load_file

from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.data.dataset import load_dataset_photos
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.data.summary import summarize_photos
from blockskip_hooks.families import Family
from blockskip_hooks.inference.streamed_model import ImageFlags, image_settings
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.residuals.batches import PhotoSource, SampleMaker
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from blockskip_hooks.utils.seeds import derived_seed
from tests import script
from tests.plain_loop import PlainLoop, noise_of
from tests.script import PROMPT, assert_same_weights, losses, save_photos
from tests.tiers import fast_first
from tests.tiny import TINY_FAMILIES, TinyFamily


SIZES = [(160, 128), (128, 128), (128, 192)]
PAIRED = [tiny for tiny in TINY_FAMILIES if tiny.name in ("flux-kontext", "flux2-dev", "flux2-klein")]
KONTEXT = next(tiny for tiny in PAIRED if tiny.name == "flux-kontext")
BLOCKS = KONTEXT.num_blocks
SPANS = [(n, m) for n in range(BLOCKS) for m in range(BLOCKS - n)]
each_family = pytest.mark.parametrize("tiny", PAIRED, ids=lambda tiny: tiny.name)
fast_for_kontext = pytest.mark.fast_for("flux-kontext")


def save_pairs(folder: Path, conditions: Path | None = None) -> Path:
    """Noise pictures, and their negatives as condition images beside them or in a folder of their own."""
    save_photos(folder, SIZES)
    (conditions or folder).mkdir(exist_ok=True)
    for number in range(len(SIZES)):
        name = f"{number}.png" if conditions else f"{number}_cond.png"
        with Image.open(folder / f"{number}.png") as image:
            ImageOps.invert(image).save((conditions or folder) / name)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("pairs"))


def train(tiny: TinyFamily, photos: Path, output: Path, *flags: str) -> Path:
    settings = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    return script.train(tiny.folder, photos, output, "--cond_data_dir", str(photos), *flags, **settings)


# The sequence


def condition_inputs(tiny: TinyFamily, batch_size: int = 2) -> tuple[Family, dict[str, Any], int]:
    """The family, arguments of the transformer with a condition image larger than the image, and its tokens."""
    family, inputs = tiny.make_family(), tiny.make_inputs(batch_size)
    side = 3 * family.latent_token_size
    condition = torch.randn((batch_size, *family.latent_shape(side, side)), generator=torch.Generator().manual_seed(2))
    return family, family.with_condition(inputs, condition), 9


def assert_same_gradients(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert expected and expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-12), name


def image_tokens(prediction: torch.Tensor) -> torch.Tensor:
    return prediction[:, :4]


@each_family
@fast_for_kontext
def test_residuals_reproduce_the_full_model_with_condition_tokens(tiny: TinyFamily):
    """E1 for every (n, m); leading records have the condition's tokens, trailing ones do not."""
    _, inputs, tokens = condition_inputs(tiny)
    transformer = tiny.make_transformer()
    with torch.no_grad():
        expected = image_tokens(transformer(**inputs, return_dict=False)[0])
        without = image_tokens(transformer(**tiny.make_inputs(2), return_dict=False)[0])
    assert (expected - without).abs().max() > 1e-2
    for leading, trailing in SPANS:
        config = BlockSkipConfig(leading=leading, trailing=trailing)
        model = DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)
        residuals = model.capture_residuals(**inputs, condition_tokens=tokens)
        with torch.no_grad():
            actual = model(**inputs, condition_tokens=tokens, residuals=residuals, return_dict=False)[0]
        assert (image_tokens(actual) - expected).abs().max() <= 1e-5, (leading, trailing)
        if leading:
            # In one sequence with the text, where blocks return no text.
            text = 0 if residuals.leading_encoder_hidden_states is not None else 5
            assert residuals.leading_hidden_states.shape[1] == 4 + tokens + text
        if trailing:
            whole = model.capture_residuals(**inputs).trailing_hidden_states
            assert whole.shape[1] == residuals.trailing_hidden_states.shape[1] + tokens
            assert torch.equal(whole[:, :-tokens], residuals.trailing_hidden_states)


@each_family
@fast_for_kontext
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_equal_the_full_model_with_condition_tokens(tiny: TinyFamily, checkpointing: bool):
    """E2: m = 0."""
    _, inputs, tokens = condition_inputs(tiny)

    def gradients(skip: bool) -> dict[str, torch.Tensor]:
        skeleton = DiTBlockSkipTransformer(
            tiny.make_transformer(), BlockSkipConfig(leading=2), tiny.family.block_stacks
        )
        targets = lora_targets(skeleton, tiny.family.lora_layers, tiny.family.text_stream_layers)
        model: Any = tiny.make_transformer()
        add_lora(model, targets, rank=2, alpha=2, dropout=0.0, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if checkpointing:
            model.enable_gradient_checkpointing()
        kwargs: dict[str, Any] = {}
        if skip:
            model = DiTBlockSkipTransformer(model, BlockSkipConfig(leading=2), tiny.family.block_stacks)
            kwargs = {"residuals": model.capture_residuals(**inputs, condition_tokens=tokens)}
            kwargs["condition_tokens"] = tokens
        image_tokens(model(**inputs, **kwargs, return_dict=False)[0]).square().mean().backward()
        transformer = model.transformer if skip else model
        return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}

    expected, actual = gradients(False), gradients(True)
    assert_same_gradients(actual, expected)


@each_family
@fast_for_kontext
def test_captures_with_condition_images_of_several_sizes_go_in_step(tiny: TinyFamily):
    """A forward that is halted keeps how many condition tokens it has, bit for bit."""
    family = tiny.make_family()
    config = BlockSkipConfig(leading=1, trailing=2)
    model = DiTBlockSkipTransformer.from_pretrained(tiny.folder, config, stacks=family.block_stacks)
    calls = []
    for side in (2, 3, 0):
        inputs, pixels = tiny.make_inputs(1), side * family.latent_token_size
        latents = torch.randn((1, *family.latent_shape(pixels, pixels)), generator=torch.Generator().manual_seed(side))
        inputs = family.with_condition(inputs, latents) if side else inputs
        calls.append(partial(model.capture_residuals, **inputs, condition_tokens=side**2))
    alone = [call().tensors() for call in calls]
    for expected, together in zip(alone, model.together(calls), strict=True):
        actual = together.tensors()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


# Against the stock pipeline


@each_family
@fast_for_kontext
@torch.no_grad()
def test_the_transformer_is_called_as_by_the_stock_pipeline(tiny: TinyFamily):
    """The same condition latents, tokens, ids and prediction; image and condition image have other sizes."""
    family = tiny.make_family(guidance_scale=1.0)
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    height, width = 32, 128
    picture = Image.effect_noise((96, 64), 80).convert("RGB")
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    forward = pipeline.transformer.forward

    def spy(**inputs: Any) -> Any:
        output = forward(**inputs)
        calls.append((inputs, output[0]))
        return output

    kwargs = {"height": height, "width": width, "num_inference_steps": 2, "guidance_scale": 1.0}
    if tiny is KONTEXT:
        kwargs |= {"max_area": height * width, "_auto_resize": False}
    steps: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def seen_step(prediction: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append(prediction)
        return step(prediction, *args, **kwargs)

    with patch.object(pipeline.transformer, "forward", spy), patch.object(pipeline.scheduler, "step", seen_step):
        pipeline(image=picture, generator=torch.Generator().manual_seed(0), **family.prompt_inputs(PROMPT), **kwargs)
    theirs, predicted = calls[-1]

    vae = family.load_vae(torch.float32, "cpu")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(1, 64, 96, 3)
    mean, std = family.posterior(vae, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert not std.any()
    condition = family.scale_latents(vae, mean)
    like = torch.empty(1, *family.latent_shape(height, width))
    noisy = family.prediction_to_latents(theirs["hidden_states"], like)
    embeds = family.collate_embeds(family.encode_prompts(family.load_text_pipeline(torch.float32, "cpu"), [PROMPT]))
    timesteps = theirs["timestep"] * family.scheduler.config["num_train_timesteps"]
    config = load_config(tiny.folder / "transformer")
    ours = family.with_condition(family.transformer_inputs(config, noisy, timesteps, embeds), condition)
    assert ours.keys() <= theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name].to(value.dtype), rtol=0, atol=1e-5, msg=name)
        else:
            assert value is theirs[name] is None
    mine = family.prediction_to_latents(tiny.make_transformer()(**ours, return_dict=False)[0], like)
    torch.testing.assert_close(mine, family.prediction_to_latents(predicted, like), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, family.prediction_to_latents(steps[-1], like), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@each_family
def test_plain_training_on_pairs_is_a_straightforward_loop(tiny: TinyFamily, pairs: Path, tmp_path: Path):
    """E6: the same losses as a loop over the stock model; each picture of a pair is cropped by itself."""
    output = train(tiny, pairs, tmp_path / "out", "--skip_blocks", "none", "--patch_sampling", "none")
    family, size = tiny.make_family(), tiny.resolution
    patches = PatchSamplingConfig(min_size=size, max_size=size, multiple=family.latent_token_size)
    plan = SamplePlan(
        seed=3,
        num_images={"instance": 3},
        timesteps=family.scheduler.timesteps,
        patch=patches,
        weighting_scheme="none",
    )
    found = scan_photos(pairs)
    photos = [PhotoSet(found[start::2], size) for start in (0, 1)]
    embeds = family.collate_embeds(
        family.encode_prompts(family.load_text_pipeline(torch.float32, "cpu"), [PROMPT]) * 2
    )
    loop = PlainLoop(tiny)
    vae, transformer = loop.vae, loop.transformer
    expected = []
    for step in range(4):
        samples = [plan.sample(2 * step), plan.sample(2 * step + 1)]
        latents, condition = (
            family.scale_latents(vae, family.posterior(vae, torch.stack(crops))[0])
            for crops in (
                [of.crop(s.image, patch_size=size, top=s.top, left=s.left, output_size=size) for s in samples]
                for of in photos
            )
        )
        noise = noise_of([sample.noise_seed for sample in samples], latents.shape[1:])
        indices = [sample.timestep_index for sample in samples]
        noisy, sigmas = family.add_noise(latents, noise, indices), family.sigmas(indices)
        inputs = family.transformer_inputs(
            dict(transformer.config), noisy, family.scheduler.timesteps[indices], embeds
        )
        prediction = transformer(**family.with_condition(inputs, condition), return_dict=False)[0]
        error = family.prediction_to_latents(prediction, latents) - (noise - latents)
        loss = (compute_loss_weighting_for_sd3("none", sigmas) * error**2).flatten(1).mean()
        expected.append(loop.step(loss))
    assert losses(output) == pytest.approx(expected, rel=1e-4)


# A run


VALIDATION = ("--validation_prompt", f"{PROMPT} on the beach", "--num_validation_images", "1")


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    flags = ("--skip_blocks", "1,2", "--checkpointing_steps", "2", "--upcast_before_saving", *VALIDATION)
    kept = ("--residual_dir", str(output.parent / "records"), "--refresh_residuals")
    return train(KONTEXT, pairs, output, *flags, *kept, "--validation_image", str(pairs / "0.png"))


def test_the_card_and_the_page_show_pairs(finished: Path):
    """The card's code gives the pipeline an image; the page has both pictures of a pair side by side."""
    card = (finished / "README.md").read_text()
    assert 'image=load_image("condition.png")' in card and 'prompt="a photo' in card
    encoded = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', (finished / "report.html").read_text())
    shapes = {Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in encoded}
    assert any(width == 2 * height for width, height in shapes)


@pytest.mark.slow
def test_a_resumed_run_on_pairs_equals_the_one_that_was_never_stopped(finished: Path, pairs: Path, tmp_path: Path):
    """E5."""
    halves = tmp_path / "halves"
    shutil.copytree(finished / "checkpoint-2", halves / "checkpoint-2")
    flags = ("--skip_blocks", "1,2", "--upcast_before_saving", "--resume_from_checkpoint", "latest")
    train(KONTEXT, pairs, halves, *flags)
    assert_same_weights(halves, finished)
    assert losses(halves) == losses(finished) and len(losses(halves)) == 4


def test_records_are_as_large_as_planned(finished: Path):
    planned = json.loads((finished / "plan.json").read_text())["residuals"]
    shards = [load_file(path) for path in (finished.parent / "records").glob("*.safetensors")]
    sizes: dict[str, int] = {}
    for name, tensor in (item for shard in shards for item in shard.items()):
        sizes[name.partition("/")[0]] = sizes.get(name.partition("/")[0], 0) + tensor.nbytes
    of_samples = {size for name, size in sizes.items() if name.startswith("instance")}
    assert of_samples == {planned["record_bytes"]}


def test_the_lora_differs_from_the_full_model_by_the_trailing_approximation_only(finished: Path):
    """E4: with residuals of the trained model the two agree to rounding."""
    _, inputs, tokens = condition_inputs(KONTEXT)
    transformer = KONTEXT.make_transformer()
    transformer.load_lora_adapter(finished / script.WEIGHTS, prefix="transformer")
    model = DiTBlockSkipTransformer(transformer, BlockSkipConfig(leading=1, trailing=2))
    transformer.disable_adapters()
    base = model.capture_residuals(**inputs, condition_tokens=tokens)
    transformer.enable_adapters()
    fresh = model.capture_residuals(**inputs, condition_tokens=tokens)
    with torch.no_grad():
        full, with_fresh, with_base = (
            image_tokens(model(**inputs, residuals=r, condition_tokens=tokens, return_dict=False)[0])
            for r in (None, fresh, base)
        )
    assert (with_fresh - full).abs().max() <= 1e-5 * max(1.0, float(full.abs().max()))
    assert (with_base - full).abs().max() > 1e-5
    assert torch.equal(fresh.leading_hidden_states, base.leading_hidden_states)


@pytest.mark.slow
def test_validation_images_are_made_from_the_validation_image(finished: Path, pairs: Path, tmp_path: Path):
    other = train(
        KONTEXT,
        pairs,
        tmp_path / "out",
        *("--skip_blocks", "1,2", "--upcast_before_saving", *VALIDATION),
        *("--validation_image", str(pairs / "0_cond.png")),
    )
    assert_same_weights(other, finished)
    first, second = ((output / "image_0.png").read_bytes() for output in (finished, other))
    assert first != second


def test_images_of_an_evaluation_have_the_size_that_is_asked_for():
    """Without being told, the pipeline of FLUX.1 Kontext scales any size to a megapixel."""
    given = {"pretrained_model_name_or_path": str(KONTEXT.folder), "resolution": 64}
    flags = ImageFlags(**{**dict.fromkeys(field.name for field in fields(ImageFlags)), **given})
    kwargs = image_settings(flags).pipeline_kwargs
    assert (kwargs["height"], kwargs["width"], kwargs["max_area"]) == (64, 64, 64 * 64)


# Crops


def pair_set(folder: Path, conditions: Path, max_size: int = 64) -> PhotoSet:
    return PhotoSet(scan_photos(folder, conditions=conditions), max_size)


def test_both_pictures_of_a_pair_are_cropped_alike(pairs: Path):
    """Any patch size, place and flip: the crop of a negative is the negative of the crop, to rounding."""
    family = KONTEXT.make_family()
    photos = pair_set(pairs, pairs)
    patches = PatchSamplingConfig(mode="dynamic", min_size=32, max_size=64, multiple=8)
    plan = SamplePlan(
        seed=0,
        num_images={"instance": 3},
        timesteps=family.scheduler.timesteps,
        patch=patches,
        random_flip=True,
    )
    maker = SampleMaker(plan, {"instance": PhotoSource(photos, PROMPT)}, family, {}, "cpu", torch.float32)
    samples = maker.samples(range(24))
    assert len({sample.patch_size for sample in samples}) > 2 and {sample.flip for sample in samples} == {True, False}
    for sample in samples:
        crop = maker.crop(sample)
        assert crop.shape == (2, 3, 32, 32) and crop[0].std() > 0.1
        assert (crop[0] + crop[1]).abs().max() <= 2 / 127


def test_a_condition_image_of_another_size_covers_its_photo(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Half as large is the same crop; another shape is stretched, and named."""
    save_photos(tmp_path / "photos", [(128, 64), (128, 64)])
    (tmp_path / "conditions").mkdir()
    for name, size in (("0.jpg", (64, 32)), ("1.png", (64, 64))):
        left = Image.new("RGB", size, "black")
        left.paste("white", (0, 0, size[0] // 2, size[1]))
        left.save(tmp_path / "conditions" / name, quality=95)
    photos = pair_set(tmp_path / "photos", tmp_path / "conditions", max_size=32)
    for number in range(2):
        for place, value in ((0.0, 1.0), (0.999, -1.0)):
            crop = photos.crop(number, patch_size=16, output_size=16, left=place)
            assert (crop[1] - value).abs().max() < 0.1
    stretched = [record.message for record in caplog.records if "stretched" in record.message]
    assert len(stretched) == 1 and "1 (1.png)" in stretched[0]


@pytest.mark.parametrize("mode", ["mode", "sample"])
@torch.no_grad()
def test_latents_are_the_mode_or_drawn(pairs: Path, mode: str):
    """Both pictures of a pair, each with a draw of its own; cached crops give the same latents."""
    family = KONTEXT.make_family(vae_encode_mode=mode)
    vae = family.load_vae(torch.float32, "cpu")
    patches = PatchSamplingConfig(min_size=64, max_size=64, multiple=8)
    made = []
    for fixed in (False, True):
        plan = SamplePlan(
            seed=0,
            num_images={"instance": 3},
            timesteps=family.scheduler.timesteps,
            patch=patches,
            center_crop=True,
            fixed_crops=fixed,
        )
        sources = {"instance": PhotoSource(pair_set(pairs, pairs), PROMPT)}
        maker = SampleMaker(plan, sources, family, {}, "cpu", torch.float32)
        made.append((maker.samples(range(3)), maker.encode(vae, maker.samples(range(3)))))
    (samples, latents), (_, cached) = made
    assert latents.shape == (3, 2, *family.latent_shape(64, 64))
    torch.testing.assert_close(cached, latents)
    crops = torch.stack([maker.crop(sample) for sample in samples])
    mean, std = vae.encode(crops[:, 1]).latent_dist.mean, vae.encode(crops[:, 1]).latent_dist.std
    off = (latents[:, 1] - family.scale_latents(vae, mean)).abs().amax()
    assert off <= 1e-6 if mode == "mode" else off > std.min() / 10
    seeds = [derived_seed(sample.noise_seed, "posterior") for sample in samples]
    assert len(set(seeds)) == 3


# Where pairs come from


def names_of(photos: list[Any]) -> list[tuple[str, str]]:
    return [(photo.name, photo.condition.name) for photo in photos]


def test_pairs_of_a_folder_and_of_two(tmp_path: Path):
    one = save_pairs(tmp_path / "one")
    found = scan_photos(one, conditions=one)
    assert names_of(found) == [(f"{n}.png", f"{n}_cond.png") for n in range(3)]
    two = save_pairs(tmp_path / "two", tmp_path / "conditions")
    others = scan_photos(two, conditions=tmp_path / "conditions")
    assert names_of(others) == [(f"{n}.png", f"{n}.png") for n in range(3)]
    # The pictures of a pair decide what it is, not their names.
    assert [photo.digest for photo in found] == [photo.digest for photo in others]
    assert [photo.digest for photo in found] != [photo.digest for photo in scan_photos(two)]
    sets = [PhotoSet(photos, 64) for photos in (found, others, scan_photos(two))]
    digests = [[photos.digest(number) for number in range(3)] for photos in sets]
    assert digests[0] == digests[1] and not set(digests[0]) & set(digests[2])
    assert [photos.are_pairs for photos in sets] == [True, True, False]


def test_condition_images_that_are_taken_for_photos_are_named(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = parse_args(script.settings(KONTEXT.folder, pairs, tmp_path / "out"))
    assert len(prepare_run(settings).photos) == 6
    found = [record.message for record in caplog.records if "0_cond.png and others train as photos" in record.message]
    assert len(found) == 1 and f"--cond_data_dir {pairs} makes" in found[0]
    run = prepare_run(
        parse_args([*script.settings(KONTEXT.folder, pairs, tmp_path / "out"), "--cond_data_dir", str(pairs)])
    )
    assert len(run.photos) == 3 and len([r for r in caplog.records if "train as photos" in r.message]) == 1
    summary = summarize_photos(run.photos, [(64, 64)]).describe("here", PROMPT)
    assert summary.startswith("Photos   3 with condition images from here")


def test_pairs_of_a_dataset(tmp_path: Path, pairs: Path):
    columns = {
        "image": [str(pairs / f"{n}.png") for n in range(3)],
        "before": [str(pairs / f"{n}_cond.png") for n in range(3)],
    }
    table = datasets.Dataset.from_dict(columns)
    for column in columns:
        table = table.cast_column(column, datasets.Image())
    # With the pictures in it.
    table.map(lambda row: row).save_to_disk(tmp_path / "set")
    found = load_dataset_photos(str(tmp_path / "set"), cond_image_column="before")
    assert names_of(found) == [(f"{n:06d}", f"{n:06d} before") for n in range(3)]
    assert [photo.digest for photo in found] == [photo.digest for photo in scan_photos(pairs, conditions=pairs)]


# What is refused


REFUSED: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "prior preservation": (
        lambda pairs: ["--with_prior_preservation", "--class_data_dir", "classes", "--class_prompt", "a dog"],
        ["--with_prior_preservation does not go with condition images"],
    ),
    "a text encoder": (lambda pairs: ["--train_text_encoder"], ["--train_text_encoder does not go with"]),
    "caption dropout": (lambda pairs: ["--caption_dropout", "0.1"], ["--caption_dropout does not go with"]),
    "two sources": (
        lambda pairs: ["--cond_image_column", "before"],
        ["--cond_image_column and --cond_data_dir both name condition images"],
    ),
    "no image to validate with": (
        lambda pairs: ["--validation_prompt", "a dog on the beach"],
        ["--validation_prompt needs --validation_image"],
    ),
    "a validation image that is not there": (
        lambda pairs: [*VALIDATION, "--validation_image", "nowhere.png"],
        ["--validation_image nowhere.png", "cannot be read", "nowhere.png ("],
    ),
    "no such folder": (lambda pairs: ["--cond_data_dir", "nowhere"], ["--cond_data_dir nowhere is not a folder"]),
    "photos alone": (
        lambda pairs: ["--instance_data_dir", str(save_photos(pairs.parent / "more", [*SIZES, (64, 64), (64, 64)]))],
        ["--cond_data_dir", "2 of the photos (3.png, 4.png)", "add 3_cond.png or 3.png"],
    ),
}


def refusal(capsys: pytest.CaptureFixture, model: Path, photos: Path, output: Path, *flags: str) -> str:
    """The one line that a run ends with before anything is loaded."""
    with patch.object(Family, "load_text_pipeline", side_effect=AssertionError("a text encoder is loaded")):
        code = script.load_script().main(script.settings(model, photos, output, *flags))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize("case", fast_first(REFUSED, 3))
def test_what_does_not_go_with_pairs_is_refused(
    case: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    make, words = REFUSED[case]
    flags = make(tmp_path / "pairs")
    given = () if "--cond_data_dir" in flags else ("--cond_data_dir", str(pairs))
    line = refusal(capsys, KONTEXT.folder, pairs, tmp_path / "out", *given, *flags)
    for word in words:
        assert word in line


def test_pairs_are_refused_where_the_photos_are_of_the_other_kind(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    line = refusal(capsys, KONTEXT.folder, pairs, tmp_path / "out", "--cond_image_column", "before")
    assert "--cond_image_column before needs --dataset_name; give" in line and "--cond_data_dir with --inst" in line


def test_families_without_condition_images_refuse_them(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    line = refusal(capsys, TINY_FAMILIES[0].folder, pairs, tmp_path / "out", "--cond_data_dir", str(pairs))
    assert "it belongs to models of flux-kontext, flux2, flux2-klein, qwen-image-2.1 and does nothing for flux" in line
