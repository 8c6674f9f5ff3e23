"""Condition images that the text encoder sees, too: they stand within the text of the sequence (Qwen-Image 2.1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.families import Family
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.residuals.batches import PhotoSource, SampleMaker
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from blockskip_hooks.utils.seeds import derived_seed
from tests import script
from tests.pairs import assert_same_gradients
from tests.plain_loop import PlainLoop, noise_of
from tests.script import PROMPT, losses
from tests.tiny import TINY_FAMILIES, TinyFamily


TINY = next((tiny for tiny in TINY_FAMILIES if tiny.family.reads_condition), None)
pytestmark = pytest.mark.skipif(TINY is None, reason="diffusers lacks the family's classes")
IMAGE_TOKENS = 16


@pytest.fixture
def tiny() -> TinyFamily:
    assert TINY is not None
    return TINY


def with_condition(family: Family, inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the transformer with a condition image that is larger than the image."""
    shape = (2, *family.latent_shape(96, 64))
    return family.with_condition(inputs, torch.randn(shape, generator=torch.Generator().manual_seed(2)))


def image_part(output: tuple[torch.Tensor]) -> torch.Tensor:
    return output[0][:, -IMAGE_TOKENS:]


def test_residuals_reproduce_the_full_model(tiny: TinyFamily):
    """E1 for every (n, m), with prompts of two lengths; records have every token."""
    family = tiny.make_family()
    inputs = with_condition(family, tiny.make_inputs(2, text_tokens=(5, 3)))
    assert family.image_tokens({}, inputs) == IMAGE_TOKENS
    with torch.no_grad():
        expected = image_part(tiny.make_transformer()(**inputs, return_dict=False))
        without = image_part(tiny.make_transformer()(**tiny.make_inputs(2, text_tokens=(5, 3)), return_dict=False))
    assert (expected - without).abs().max() > 1e-2
    for leading in range(tiny.num_blocks):
        for trailing in range(tiny.num_blocks - leading):
            config = BlockSkipConfig(leading=leading, trailing=trailing)
            model = DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)
            residuals = model.capture_residuals(**inputs)
            with torch.no_grad():
                actual = image_part(model(**inputs, residuals=residuals, return_dict=False))
            assert (actual - expected).abs().max() <= 1e-5, (leading, trailing)
            assert all(tensor.shape[1] == 5 + 24 + IMAGE_TOKENS for tensor in residuals.tensors().values())


@pytest.mark.slow
def test_gradients_equal_the_full_model(tiny: TinyFamily):
    """E2: m = 0."""
    inputs = with_condition(tiny.make_family(), tiny.make_inputs(2, text_tokens=(5, 3)))

    def gradients(skip: bool) -> dict[str, torch.Tensor]:
        config = BlockSkipConfig(leading=2)
        skeleton = DiTBlockSkipTransformer(tiny.make_transformer(), config, tiny.family.block_stacks)
        model: Any = tiny.make_transformer()
        add_lora(model, lora_targets(skeleton, tiny.family.lora_layers), rank=2, alpha=2, dropout=0.0, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        kwargs: dict[str, Any] = {}
        if skip:
            model = DiTBlockSkipTransformer(model, config, tiny.family.block_stacks)
            kwargs = {"residuals": model.capture_residuals(**inputs)}
        image_part(model(**inputs, **kwargs, return_dict=False)).square().mean().backward()
        transformer = model.transformer if skip else model
        return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}

    expected, actual = gradients(False), gradients(True)
    assert_same_gradients(actual, expected)


# Against the stock pipeline


@torch.no_grad()
def test_the_transformer_is_called_as_by_the_stock_pipeline(tiny: TinyFamily):
    """The same embeddings, condition latents, layout and prediction; image and condition image have other sizes."""
    family = tiny.make_family()
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((100, 60), 80).convert("RGB")
    size = {"height": 32, "width": 128, "output_resolution": 96}
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    forward = pipeline.transformer.forward

    def spy(**inputs: Any) -> Any:
        output = forward(**inputs)
        calls.append((inputs, output[0]))
        return output

    with patch.object(pipeline.transformer, "forward", spy):
        pipeline(PROMPT, image=picture, num_inference_steps=2, use_kv_cache=False, **size)
    theirs, predicted = calls[-1]

    shown = family.shown_condition(picture, size)
    assert shown.size == (128, 64)
    (embeds,) = family.encode_pairs(family.load_text_pipeline(torch.float32, "cpu"), [(PROMPT, shown)])
    vae = family.load_vae(torch.float32, "cpu")
    pixels = torch.frombuffer(bytearray(shown.convert("RGB").tobytes()), dtype=torch.uint8).reshape(1, 64, 128, 3)
    condition = family.scale_latents(vae, family.posterior(vae, pixels.permute(0, 3, 1, 2) / 127.5 - 1)[0])
    like = torch.empty(1, *family.latent_shape(32, 128))
    noisy = family.prediction_to_latents(theirs["hidden_states"], like)
    timesteps = theirs["timestep"] * family.scheduler.config["num_train_timesteps"]
    config = load_config(tiny.folder / "transformer")
    inputs = family.transformer_inputs(config, noisy, timesteps, family.collate_embeds([embeds]))
    ours = family.with_condition(inputs, condition)
    is_text = ~ours["img_mask"][0, : ours["encoder_hidden_states"].shape[1]]
    assert 0 < int((~is_text).sum()) == 8 and is_text[0] and is_text[-1]
    for name, value in ours.items():
        if name == "encoder_hidden_states":
            # The transformer puts latents in the place of the other tokens.
            torch.testing.assert_close(value[:, is_text], theirs[name][:, is_text], rtol=0, atol=1e-5)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name].to(value.dtype), rtol=0, atol=1e-5, msg=name)
        else:
            assert value == theirs[name]
    mine = family.prediction_to_latents(tiny.make_transformer()(**ours, return_dict=False)[0], like)
    torch.testing.assert_close(mine, family.prediction_to_latents(predicted, like), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_embeddings_make_the_image_that_prompt_and_image_make(tiny: TinyFamily):
    family = tiny.make_family()
    picture = Image.effect_noise((100, 60), 80).convert("RGB")
    kwargs = {"image": picture, "output_resolution": 64, "num_inference_steps": 2, "output_type": "pt"}

    def drawn(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in range(2)]
        return pipeline(**{**call, **kwargs}, num_images_per_prompt=2, generator=generators).images

    stock = family.load_pipeline(torch.float32)
    expected = drawn(stock, family.prompt_inputs(PROMPT))
    text = family.load_text_pipeline(torch.float32, "cpu")
    pipeline = family.image_pipeline(tiny.make_transformer(), family.load_vae(torch.float32, "cpu"))
    pairs = [(PROMPT, family.shown_condition(picture, kwargs)), ("a red cat", Image.new("RGB", (96, 32)))]
    aligned = family.align_embeds(dict(enumerate(family.encode_pairs(text, pairs))))  # type: ignore[arg-type]
    call = family.pipeline_inputs(family.collate_embeds([aligned[0]]), None)  # type: ignore[index]
    torch.testing.assert_close(drawn(pipeline, call), expected, rtol=0, atol=1e-4)


def test_a_condition_image_that_the_processor_scales_is_refused(tiny: TinyFamily):
    family = tiny.make_family()
    text = family.load_text_pipeline(torch.float32, "cpu")
    with pytest.raises(ValueError, match="544 x 544 px is scaled by the model's processor, to 256 tokens and not 289"):
        family.encode_pairs(text, [(PROMPT, Image.new("RGB", (544, 544)))])


# A run


def train(tiny: TinyFamily, photos: Path, output: Path, *flags: str) -> Path:
    settings = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    conditions = ("--cond_data_dir", str(photos), "--patch_sampling", "none")
    return script.train(tiny.folder, photos, output, *conditions, *flags, **settings)


def plan_of_pairs(family: Family, size: int, seed: int) -> SamplePlan:
    """Samples of three pairs, each with one crop and one side for the whole run."""
    return SamplePlan(
        seed=seed,
        num_images={"instance": 3},
        timesteps=family.scheduler.timesteps,
        patch=PatchSamplingConfig(min_size=size, max_size=size, multiple=family.latent_token_size),
        random_flip=True,
        fixed_crops=True,
    )


@pytest.mark.slow
def test_plain_training_is_a_straightforward_loop(tiny: TinyFamily, pairs: Path, tmp_path: Path):
    """E6: each sample has the embeddings of its prompt and its own condition image, whose latents are not drawn."""
    captions = ["a photo of sks dog on the beach", "sks dog", "a red dog"]
    for number, caption in enumerate(captions):
        (pairs / f"{number}.txt").write_text(caption)
    output = train(tiny, pairs, tmp_path / "out", "--skip_blocks", "none", "--random_flip")
    family, size = tiny.make_family(), tiny.resolution
    plan = plan_of_pairs(family, size, seed=3)
    photos = PhotoSet(scan_photos(pairs, conditions=pairs), size)
    text, loop, expected = family.load_text_pipeline(torch.float32, "cpu"), PlainLoop(tiny), []
    for step in range(4):
        samples = [plan.sample(2 * step), plan.sample(2 * step + 1)]
        crops = torch.stack(
            [
                photos.crop(s.image, patch_size=size, top=s.top, left=s.left, flip=s.flip, output_size=size)
                for s in samples
            ]
        )
        shown = [((crop[1] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for crop in crops]
        # Every prompt is as long as the longest, which no batch need have.
        every = [captions[s.image] for s in samples] + captions[:1]
        images = [Image.fromarray(pixels) for pixels in [*shown, shown[0]]]
        encoded = family.encode_pairs(text, list(zip(every, images, strict=True)))
        embeds = family.collate_embeds(list(family.align_embeds(dict(zip("abc", encoded))).values())[:2])
        with torch.no_grad():
            mean, std = family.posterior(loop.vae, crops[:, 0])
            seeds = [derived_seed(s.noise_seed, "posterior") for s in samples]
            drawn = mean + std * noise_of(seeds, (2, *mean.shape[1:]))[:, 0]
            latents = family.scale_latents(loop.vae, drawn)
            condition = family.scale_latents(loop.vae, family.posterior(loop.vae, crops[:, 1])[0])
        noise = noise_of([sample.noise_seed for sample in samples], latents.shape[1:])
        indices = [sample.timestep_index for sample in samples]
        noisy = family.add_noise(latents, noise, indices)
        inputs = family.transformer_inputs({}, noisy, family.scheduler.timesteps[indices], embeds)
        prediction = loop.transformer(**family.with_condition(inputs, condition), return_dict=False)[0]
        error = family.prediction_to_latents(prediction, latents) - (noise - latents)
        expected.append(loop.step((error**2).flatten(1).mean()))
    assert losses(output) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_run_with_skipped_blocks(tiny: TinyFamily, pairs: Path, tmp_path: Path):
    """Leading blocks change nothing, records are as large as planned, validation images see the validation image."""
    output, folder = tmp_path / "out", tmp_path / "records"
    flags = ("--residual_dir", str(folder), "--upcast_before_saving")
    images = ("--validation_prompt", f"{PROMPT} on the beach", "--num_validation_images", "1")
    train(tiny, pairs, output, "--skip_blocks", "1,2", *flags, *images, "--validation_image", str(pairs / "0.png"))
    planned = json.loads((output / "plan.json").read_text())["residuals"]["record_bytes"]
    sizes: dict[str, int] = {}
    for name, tensor in (item for path in folder.glob("*.safetensors") for item in load_file(path).items()):
        sizes[name.partition("/")[0]] = sizes.get(name.partition("/")[0], 0) + tensor.nbytes
    # The plan is of the longest prompt that is allowed.
    assert len(sizes) == 8 and all(0.5 * planned < size <= planned for size in sizes.values())
    assert 'image=load_image("condition.png")' in (output / "README.md").read_text()
    with Image.open(output / "image_0.png") as image:
        assert len(set(image.tobytes())) > 1

    skipped = train(tiny, pairs, tmp_path / "skipped", "--skip_blocks", "2,0", "--upcast_before_saving")
    layers = ",".join(sorted({n.partition(".lora_")[0].removeprefix("transformer.") for n in script.weights(skipped)}))
    plain = train(tiny, pairs, tmp_path / "plain", "--skip_blocks", "none", "--lora_layers", layers)
    assert losses(skipped) == pytest.approx(losses(plain), rel=1e-3)


def test_embeddings_belong_to_a_photo_whose_crop_is_fixed(tiny: TinyFamily, pairs: Path):
    """Each photo's condition image as it is cropped in every sample, to the last bit."""
    family, size = tiny.make_family(), tiny.resolution
    plan = plan_of_pairs(family, size, seed=0)
    sources: Any = {"instance": PhotoSource(PhotoSet(scan_photos(pairs, conditions=pairs), size), PROMPT, False)}
    maker = SampleMaker(plan, sources, family, {}, "cpu", torch.float32)
    with patch.object(PhotoSet, "crop", side_effect=AssertionError("all crops are in memory")):
        shown = maker.pairs()
    assert sorted(shown) == [f"{PROMPT} [photo {number}]" for number in (1, 2, 3)]
    for sample in maker.samples(range(9)):
        prompt, image = shown[maker.embeds_key(sample)]()
        crop = maker.crop(sample)[1]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
        assert prompt == PROMPT and torch.equal(((crop + 1) * 127.5).round().byte(), pixels.permute(2, 0, 1))


def test_patches_that_change_are_refused(tiny: TinyFamily, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    flags = ("--cond_data_dir", str(pairs), "--patch_sampling", "dynamic")
    settings = script.settings(tiny.folder, pairs, tmp_path / "out", *flags, resolution=tiny.resolution)
    with patch.object(Family, "load_text_pipeline", side_effect=AssertionError("a text encoder is loaded")):
        assert script.load_script().main(settings) == 2
    error = capsys.readouterr().err
    assert "--patch_sampling is dynamic; qwen-image-2.1's text encoder sees the condition image" in error
    assert "give --patch_sampling none" in error


# Prompts of several lengths


@torch.no_grad()
def test_prompts_of_one_length_are_those_of_a_list(tiny: TinyFamily):
    """Embeddings and masks of the stock pipeline for several prompts; alone, none is padded."""
    family, prompts = tiny.make_family(), [PROMPT, "a red cat"]
    text_pipeline = family.load_text_pipeline(torch.float32, "cpu")
    tokens, masks, *_ = text_pipeline.encode_prompt(prompts)
    natural = dict(zip(prompts, family.encode_prompts(text_pipeline, prompts), strict=True))
    aligned = family.collate_embeds(list(family.align_embeds(natural).values()))
    torch.testing.assert_close(aligned["prompt_embeds"], tokens)
    assert torch.equal(aligned["prompt_embeds_mask"], masks.bool()) and not masks.all()
    for prompt, embeds in family.align_embeds(natural).items():
        given = family.pipeline_inputs(family.collate_embeds([embeds]), None)["prompt_embeds"]
        assert torch.equal(given[0], natural[prompt]["prompt_embeds"])
    same = dict.fromkeys(prompts, natural[PROMPT])
    assert all(embeds.keys() == {"prompt_embeds"} for embeds in family.align_embeds(same).values())
