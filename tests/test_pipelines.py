"""Every family against its stock pipeline: the same embeddings, transformer call, objective, latents and images.

The stock pipeline is the judge throughout. What it calls latents may be packed into tokens; they are brought into the
family's layout by the pipeline's own unpacking, on its way to the VAE's decoder.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import DiffusionPipeline

from blockskip_hooks.families import Family, PromptEmbeds
from blockskip_hooks.loading.component_config import load_config
from tests.tiny import TINY_FAMILIES, TinyFamily


PROMPT = "a photo of sks dog on the beach"
OTHER = "a red cat"

# Arguments that leave the prediction for the prompt alone. SANA-Sprint is always told a value, that of its pipeline.
UNGUIDED = {
    "krea2": {"guidance_scale": 0.0},
    "qwen-image": {"true_cfg_scale": 1.0},
    "qwen-image-2.1": {"true_cfg_scale": 1.0},
    "sana-sprint": {"guidance_scale": 4.5, "intermediate_timesteps": None},
    "z-image": {"guidance_scale": 0.0},
}
# Krea 2's embeddings come with the run's choice of guidance; the other pipelines guide unless told not to.
GUIDED = {"krea2": {"guidance_scale": 4.5}}


@pytest.fixture(scope="module", params=TINY_FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> TinyFamily:
    """Every family in turn, all tests of one together: they share its pipelines."""
    return request.param


@pytest.fixture(scope="module")
def family(tiny: TinyFamily) -> Family:
    return tiny.make_family(guidance_scale=1.0)


@pytest.fixture(scope="module")
def stock(family: Family) -> DiffusionPipeline:
    pipeline = family.load_pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def text_pipeline(family: Family) -> DiffusionPipeline:
    return family.load_text_pipeline(torch.float32, "cpu")


@pytest.fixture(scope="module")
def embeds(family: Family, text_pipeline: DiffusionPipeline) -> dict[str, PromptEmbeds]:
    """Embeddings of prompts, encoded in one call."""
    prompts = [PROMPT, OTHER, family.negative_prompt or ""]
    return dict(zip(prompts, family.encode_prompts(text_pipeline, prompts), strict=True))


def image_kwargs(tiny: TinyFamily) -> dict[str, Any]:
    return json.loads((tiny.folder / "blockskip_defaults.json").read_text())["pipeline_kwargs"]


# Images


def images(pipeline: DiffusionPipeline, num_images: int, **kwargs: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(number) for number in range(num_images)]
    output = pipeline(**kwargs, num_images_per_prompt=num_images, generator=generators, output_type="pt")
    return output.images


@pytest.mark.parametrize("num_images", [1, 2])
def test_embeddings_make_the_image_that_the_prompt_makes(
    tiny: TinyFamily, family: Family, stock: DiffusionPipeline, embeds: dict[str, PromptEmbeds], num_images: int
):
    kwargs = {**GUIDED.get(family.name, {}), **image_kwargs(tiny)}
    expected = images(stock, num_images, **{**family.prompt_inputs(PROMPT), **kwargs})
    pipeline = family.image_pipeline(tiny.make_transformer(), family.load_vae(torch.float32, "cpu"))
    guided = family.negative_prompt is not None

    def from_embeds(prompt: str, negative: str | None) -> torch.Tensor:
        negative_embeds = family.collate_embeds([embeds[negative or ""]]) if guided else None
        inputs = family.pipeline_inputs(family.collate_embeds([embeds[prompt]]), negative_embeds)
        return images(pipeline, num_images, **{**inputs, **kwargs})

    assert len(expected) == num_images
    torch.testing.assert_close(from_embeds(PROMPT, family.negative_prompt), expected, rtol=0, atol=1e-4)
    others = [from_embeds(OTHER, family.negative_prompt), *([from_embeds(PROMPT, OTHER)] if guided else [])]
    assert all((other - expected).abs().max() > 1e-3 for other in others)


# The transformer call and the objective


class _Decoded(Exception):
    """Ends a pipeline call where it would decode its latents."""


Step = Callable[..., tuple[torch.Tensor, ...]]


def latents_to_decode(pipeline: DiffusionPipeline, call: Mapping[str, Any], step: Step) -> torch.Tensor:
    """What the pipeline hands to ``vae.decode``, with another ``scheduler.step``."""

    def stop(latents: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Decoded(latents)

    # Pipelines look at the signature of step.
    replaced = patch.object(pipeline.scheduler, "step", functools.wraps(pipeline.scheduler.step)(step))
    with patch.object(pipeline.vae, "decode", stop), replaced, pytest.raises(_Decoded) as stopped:
        pipeline(**call, generator=torch.Generator().manual_seed(0))
    return stopped.value.args[0]


def decoded_if_last(pipeline: DiffusionPipeline, packed: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
    """What the pipeline hands to ``vae.decode`` when the scheduler ends with these latents."""
    return latents_to_decode(pipeline, call, lambda *args, **kwargs: (packed, packed))


@dataclass(frozen=True)
class LastStep:
    """The last denoising step of a stock pipeline call, without guidance; latents are in the family's layout.

    Attributes:
        timestep: Timestep that belongs to the noise level.
        sigma: Noise level, as that of the flow with the same signal-to-noise ratio.
        noisy: Latents before the step.
        prediction: What the pipeline took for the transformer's prediction.
        clean: Latents after the step, which the pipeline decodes.
        packed: Latents before the step, as the pipeline has them.
        decoded_shape: Shape of what the VAE decodes.
    """

    timestep: torch.Tensor
    sigma: torch.Tensor
    noisy: torch.Tensor
    prediction: torch.Tensor
    clean: torch.Tensor
    packed: torch.Tensor
    decoded_shape: torch.Size


def as_flow(angle: torch.Tensor, noisy: torch.Tensor, prediction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``cos(t) x + sin(t) noise`` and its derivative, as noise level, latents and velocity of a flow."""
    sine, cosine = angle.sin(), angle.cos()
    clean, noise = cosine * noisy - sine * prediction, sine * noisy + cosine * prediction
    sigma = sine / (sine + cosine)
    return sigma, (1.0 - sigma) * clean + sigma * noise, noise - clean


@pytest.fixture(scope="module")
def call(tiny: TinyFamily, family: Family) -> dict[str, Any]:
    """Arguments of a stock pipeline call without guidance: a short prompt, an image that is not square."""
    unguided = UNGUIDED.get(family.name, {"guidance_scale": 1.0})
    # HiDream's pipeline resizes to an area of its own: at 1:4 both sides are whole patches. The last of three steps
    # starts from unequal parts of image and noise.
    size = {"height": 32, "width": 128}
    return {**family.prompt_inputs(OTHER), **image_kwargs(tiny), **unguided, **size, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def last_step(family: Family, stock: DiffusionPipeline, call: dict[str, Any]) -> LastStep:
    scheduler = stock.scheduler
    step, objective = scheduler.step, scheduler.config.get("prediction_type")
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(prediction: torch.Tensor, timestep: torch.Tensor, packed: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        level = scheduler.sigmas[len(seen)] if hasattr(scheduler, "sigmas") else timestep.new_tensor(math.nan)
        seen.append((timestep.flatten()[0], level, packed, prediction))
        return step(prediction, timestep, packed, *args, **kwargs)

    decoded = latents_to_decode(stock, call, spy)
    assert len(seen) == 3
    timestep, sigma, packed, _ = seen[-1]
    noisy, prediction = (
        family.scale_latents(stock.vae, decoded_if_last(stock, latents, call)) for latents in seen[-1][2:]
    )
    if objective == "trigflow":
        sigma, noisy, prediction = as_flow(timestep, noisy, prediction)
        timestep = sigma * scheduler.config.num_train_timesteps
    elif objective == "epsilon":
        # The scheduler has the ratio of noise to signal.
        sigma = sigma / (1.0 + sigma)
    clean = family.scale_latents(stock.vae, decoded)
    return LastStep(timestep, sigma, noisy, prediction, clean, packed, decoded.shape)


@pytest.fixture
def family_at_last_step(tiny: TinyFamily, last_step: LastStep) -> Family:
    """The family with the noise level of the pipeline's last step first in its schedule."""
    family = tiny.make_family(guidance_scale=1.0)
    family.scheduler.timesteps[0] = last_step.timestep
    family.scheduler.sigmas[0] = last_step.sigma
    return family


@torch.no_grad()
def our_prediction(tiny: TinyFamily, family: Family, embeds: PromptEmbeds, noisy: torch.Tensor) -> torch.Tensor:
    config = load_config(tiny.folder / "transformer")
    inputs = family.transformer_inputs(config, noisy, family.scheduler.timesteps[[0]], family.collate_embeds([embeds]))
    return family.prediction_to_latents(tiny.make_transformer()(**inputs, return_dict=False)[0], noisy)


def test_the_prediction_is_the_one_that_the_pipeline_steps_with(
    tiny: TinyFamily, family_at_last_step: Family, embeds: dict[str, PromptEmbeds], last_step: LastStep
):
    ours = our_prediction(tiny, family_at_last_step, embeds[OTHER], last_step.noisy)
    assert ours.abs().max() > 1e-2
    torch.testing.assert_close(ours, last_step.prediction, rtol=1e-4, atol=1e-4)


def test_a_timestep_is_the_same_noise_level_in_training(family: Family, last_step: LastStep):
    """To the distance of neighbours in the schedule, which may be shifted differently."""
    index = int((family.scheduler.timesteps - last_step.timestep).abs().argmin())
    torch.testing.assert_close(family.sigmas([index]).flatten()[0], last_step.sigma, rtol=0, atol=5e-3)


def test_the_loss_is_zero_for_the_latents_that_the_pipeline_arrives_at(
    tiny: TinyFamily, family_at_last_step: Family, embeds: dict[str, PromptEmbeds], last_step: LastStep
):
    """The last step goes to the clean latents that the prediction implies; for these nothing is left to learn."""
    family, noisy, clean = family_at_last_step, last_step.noisy, last_step.clean
    zeros, ones = torch.zeros_like(clean), torch.ones_like(clean)
    noise = (noisy - family.add_noise(clean, zeros, [0])) / family.add_noise(zeros, ones, [0])
    prediction = our_prediction(tiny, family, embeds[OTHER], noisy)
    predicted, target = family.loss_terms(prediction, clean, noise, noisy, family.sigmas([0]))
    torch.testing.assert_close(predicted, target, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_batch_in_training_predicts_what_each_prompt_alone_does(
    tiny: TinyFamily, family: Family, embeds: dict[str, PromptEmbeds]
):
    """Prompts of two lengths, which some families pad before; images that are not square."""
    config, transformer = load_config(tiny.folder / "transformer"), tiny.make_transformer()
    shape = family.latent_shape(2 * family.latent_token_size, 3 * family.latent_token_size)
    embeds = family.align_embeds(embeds) if family.aligns_prompts else embeds
    noisy = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    timesteps = family.scheduler.timesteps[[100, 700]]

    def predict(rows: list[int]) -> torch.Tensor:
        prompts = family.collate_embeds([embeds[(PROMPT, OTHER)[row]] for row in rows])
        inputs = family.transformer_inputs(config, noisy[rows], timesteps[rows], prompts)
        return family.prediction_to_latents(transformer(**inputs, return_dict=False)[0], noisy[rows])

    alone = torch.cat([predict([0]), predict([1])])
    transformer.train()
    together = predict([0, 1])
    assert together.shape == noisy.shape
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


# Latents


@torch.no_grad()
def test_the_pipeline_undoes_the_scale_and_layout_of_latents(
    tiny: TinyFamily,
    family: Family,
    stock: DiffusionPipeline,
    call: dict[str, Any],
    embeds: dict[str, PromptEmbeds],
    last_step: LastStep,
):
    height, width = (side * family.vae_scale_factor for side in last_step.decoded_shape[-2:])
    pixels = torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = family.posterior(stock.vae, pixels)
    latents = family.scale_latents(stock.vae, mean)
    assert mean.shape == std.shape == (1, *family.vae_latent_shape(height, width)) == last_step.decoded_shape
    assert latents.shape == (1, *family.latent_shape(height, width))

    config = load_config(tiny.folder / "transformer")
    inputs = family.transformer_inputs(
        config, latents, family.scheduler.timesteps[[0]], family.collate_embeds([embeds[OTHER]])
    )
    # The image is the first input, followed by the text where the two are one sequence.
    image = torch.stack(list(next(iter(inputs.values()))))
    packed = image[:, : last_step.packed.shape[1]].reshape(last_step.packed.shape)
    final = packed * getattr(stock.scheduler.config, "sigma_data", 1.0)
    torch.testing.assert_close(decoded_if_last(stock, final, call), mean, rtol=1e-5, atol=1e-5)


# Embeddings


def shapes(embeds: PromptEmbeds) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in embeds.items()}


@pytest.mark.parametrize("prompts", [[PROMPT], [OTHER], [PROMPT, PROMPT]], ids=["long", "short", "two"])
def test_empty_embeddings_are_shaped_like_those_of_a_prompt(
    tiny: TinyFamily, family: Family, embeds: dict[str, PromptEmbeds], prompts: list[str]
):
    config = load_config(tiny.folder / "transformer")
    real = shapes(family.collate_embeds([embeds[prompt] for prompt in prompts]))
    empty = [
        shapes(family.collate_embeds([family.empty_embeds(config, tokens, torch.float32)] * len(prompts)))
        for tokens in range(1, tiny.text_tokens + 1)
    ]
    assert real in empty


def test_a_prompt_is_encoded_the_same_beside_any_others(
    family: Family, text_pipeline: DiffusionPipeline, embeds: dict[str, PromptEmbeds]
):
    for prompt, together in embeds.items():
        (alone,) = family.encode_prompts(text_pipeline, [prompt])
        assert shapes(alone) == shapes(together)
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-5)
    assert any(
        long.shape != short.shape or not torch.equal(long, short)
        for long, short in zip(embeds[PROMPT].values(), embeds[OTHER].values(), strict=True)
    )
