"""Condition images in the model: their tokens join as in the stock pipeline, and E1 and E2 hold."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image

from blockskip_hooks.config import BlockSkipConfig, PatchSamplingConfig
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.lora import add_lora, lora_targets
from blockskip_hooks.transformer import DiTBlockSkipTransformer
from tests.pairs import KONTEXT, PAIRED, assert_same_gradients, condition_inputs, image_tokens, train
from tests.plain_loop import PlainLoop, noise_of
from tests.script import PROMPT, losses
from tests.tiny import TinyFamily


BLOCKS = KONTEXT.num_blocks
SPANS = [(n, m) for n in range(BLOCKS) for m in range(BLOCKS - n)]
each_family = pytest.mark.parametrize("tiny", PAIRED, ids=lambda tiny: tiny.name)
fast_for_kontext = pytest.mark.fast_for("flux-kontext")


# The sequence


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
