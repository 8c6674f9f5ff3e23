"""Images from the whole model during and after training, with skipped blocks streamed where they hold no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import ModelMixin
from PIL import Image

from ..families import Family, PromptEmbeds
from ..families.prompts import place_embeds
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError
from ..utils.pictures import flattened


@dataclass(frozen=True, kw_only=True)
class VaePlacement:
    """How the VAE works where memory is short.

    Attributes:
        alone: VAE and transformer take turns on the device: one is in host memory while the other works.
        tiled: Images are decoded tile by tile and blended where tiles meet.
    """

    alone: bool = False
    tiled: bool = False


@torch.no_grad()
def generate_images(
    prompts: Sequence[PromptEmbeds],
    *,
    family: Family,
    model: DiTBlockSkipTransformer,
    vae: ModelMixin,
    negative: PromptEmbeds | None = None,
    seeds: Sequence[int],
    pipeline_kwargs: Mapping[str, Any] | None = None,
    images_at_once: int | None = None,
    together: int = 1,
    placement: VaePlacement | None = None,
    progress: Callable[[int], None] | None = None,
    calls: Callable[[int], bool] = lambda number: True,
) -> list[list[Image.Image]]:
    """Make images with the stock pipeline around the loaded modules.

    Calls of the pipeline go in step: in each of their forwards a skipped block is read once for all of them. An image
    has the same bits however many calls do, on a CPU.

    Args:
        prompts: Embeddings of each prompt, without a batch dimension.
        family: The model's family.
        model: The transformer; its adapters take part as they are.
        vae: The VAE.
        negative: Embeddings of the negative prompt, for pipelines that take one.
        seeds: One for each image of a prompt; an image has the same noise in every call.
        pipeline_kwargs: Further arguments of the pipeline call.
        images_at_once: Images per call of the pipeline; by default all of a prompt.
        together: Calls of the pipeline in step.
        placement: How the VAE works; by default beside the transformer and on whole images.
        progress: Called with the number of images that have been made since the call before.
        calls: Which of the pipeline's calls are made, by their number from 0: processes that share the images leave
            each other's out.

    Returns:
        For each prompt an image of each seed, but for those of calls that were left out.

    Raises:
        UserError: if the pipeline refuses what it is asked for, a size say.
    """
    kwargs = {k: v for k, v in (pipeline_kwargs or {}).items() if k not in ("negative_prompt", "max_sequence_length")}
    at_once = images_at_once or len(seeds)
    starts = range(0, len(seeds), at_once)
    every = [(prompt, seeds[start : start + at_once]) for prompt in range(len(prompts)) for start in starts]
    chosen = [call for number, call in enumerate(every) if calls(number)]

    # The VAE may be in host memory while the transformer works.
    device = vae.device

    def batched(embeds: PromptEmbeds) -> PromptEmbeds:
        return place_embeds(family.collate_embeds([embeds]), device, model.dtype)

    def make(pipeline: Any, prompt: int, part: Sequence[int]) -> list[Image.Image]:
        inputs = family.pipeline_inputs(batched(prompts[prompt]), None if negative is None else batched(negative))
        # What was asked for explicitly comes before a family's own settings.
        inputs |= {**kwargs, "num_images_per_prompt": len(part)}
        return _call(family, pipeline, inputs, part)

    pipelines = [family.image_pipeline(model.transformer, vae)]
    for _ in chosen[1:together]:
        # Those that go in step cannot share a schedule, which counts its steps.
        pipelines.append(copy(pipelines[0]))
        pipelines[-1].scheduler = deepcopy(pipelines[0].scheduler)
    images: list[list[Image.Image]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        with model.full_model(), _decoding(vae, model, placement or VaePlacement()):
            for start in range(0, len(chosen), together):
                group = chosen[start : start + together]
                tasks = [partial(make, pipeline, *call) for pipeline, call in zip(pipelines, group)]
                for (prompt, _), made in zip(group, model.together(tasks), strict=True):
                    images[prompt] += made
                if progress is not None:
                    # Those that go in step are done together: one after the other would tell a wrong rate.
                    progress(sum(len(part) for _, part in group))
    finally:
        model.train(was_training)
    return images


def _call(family: Family, pipeline: Any, inputs: dict[str, Any], seeds: Sequence[int]) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        images = pipeline(**inputs, generator=generators).images
    except ValueError as error:
        raise UserError(
            f"{family.pipeline_class.__name__} makes no images with these settings ({error}); correct "
            "--validation_resolution, or pipeline_kwargs in the model's blockskip_defaults.json."
        ) from error
    # Some VAEs make images with transparency.
    return [flattened(image) for image in images]


@contextmanager
def _decoding(vae: ModelMixin, model: DiTBlockSkipTransformer, placement: VaePlacement) -> Iterator[None]:
    """Within this context the VAE decodes one image at a time, in its own dtype, placed as asked."""
    autoencoder: Any = vae
    sliced, tiled = (getattr(autoencoder, name, None) for name in ("use_slicing", "use_tiling"))
    device, decode = vae.device.type, autoencoder.decode

    def in_own_dtype(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        model.free_streamed()
        # Under autocast norms and upsampling would make float32 of the largest images.
        with torch.autocast(device, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    autoencoder.decode = in_own_dtype
    if sliced is False:
        autoencoder.enable_slicing()
    if placement.tiled and tiled is False:
        autoencoder.enable_tiling()
    try:
        with _taking_turns(vae, model) if placement.alone else nullcontext():
            yield
    finally:
        # The attribute hid the class's method.
        del autoencoder.decode
        if sliced is False:
            autoencoder.disable_slicing()
        if placement.tiled and tiled is False:
            autoencoder.disable_tiling()


@contextmanager
def _taking_turns(vae: ModelMixin, model: DiTBlockSkipTransformer) -> Iterator[None]:
    """Within this context the VAE is in host memory but while it works, and the model is there meanwhile."""
    autoencoder: Any = vae
    device = vae.device
    # Condition images are encoded.
    methods = {name: getattr(autoencoder, name) for name in ("encode", "decode")}
    # diffusers' autoencoders fetch themselves to the hook's device when they are asked to encode or decode.
    autoencoder, offload = cpu_offload_with_hook(autoencoder, device)

    def alone(method: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **kwargs: Any) -> Any:
            with model.on_host():
                result = method(*args, **kwargs)
                offload.offload()
                return result

        return work

    for name, method in methods.items():
        setattr(autoencoder, name, alone(method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(autoencoder, name, method)
        remove_hook_from_module(autoencoder)
        autoencoder.to(device)
