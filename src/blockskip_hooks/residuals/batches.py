"""From the sample plan to what one training step needs: crops, latents, noise and, with skipped blocks, residuals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ..data.photo_set import PhotoSet
from ..data.sample_plan import Sample, SampleKind, SamplePlan
from ..families import Family, PromptEmbeds
from ..families.prompts import Pair, place_embeds
from ..positions import patch_positions
from ..state import SpanResiduals
from ..utils.seeds import derived_seed
from .dtype import ResidualDtype, unpack_record
from .store import Record, ResidualStore


SHARED_TEXT = "leading_encoder_hidden_states"
"""The tensor that the samples of a prompt share where the leading span sees the text alone."""


@dataclass(frozen=True)
class PhotoSource:
    """Photos of one kind and the prompts they are trained with.

    Attributes:
        photos: The decoded photos.
        prompt: Prompt of photos without a caption.
        use_captions: Whether captions replace the prompt.
    """

    photos: PhotoSet
    prompt: str
    use_captions: bool = True

    def prompt_for(self, image: int) -> str:
        caption = self.photos.caption(image) if self.use_captions else None
        return caption or self.prompt

    def prompts(self) -> dict[str, list[str]]:
        """Every prompt once, in order of first use, with the names of its photos."""
        found: dict[str, list[str]] = {}
        for image in range(len(self.photos)):
            found.setdefault(self.prompt_for(image), []).append(self.photos.name(image))
        return found


@dataclass
class Batch:
    """One step's inputs; instance samples first, then, with prior preservation, as many class samples.

    Attributes:
        samples: The samples, B of them.
        latents: Clean scaled latents, ``(B, C, H, W)``.
        noise: Gaussian noise of the same shape.
        noisy_latents: What the schedule makes of both.
        timesteps: ``(B,)``, in the scheduler's units.
        sigmas: Noise levels, ``(B, 1, 1, 1)``.
        embeds: Prompt embeddings with a batch dimension.
        prompts: Their prompts.
        residuals: What the skipped spans contribute, or ``None`` when no record holds it.
        condition: Clean scaled latents of the condition images, ``(B, C, H, W)``; ``None`` without.
        positions: Rows and columns of the image tokens in the whole crop's token grid, ``(B, tokens, 2)``; ``None``
            where they are those of an image of the latents' size.
    """

    samples: list[Sample]
    latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    embeds: PromptEmbeds
    prompts: list[str]
    residuals: SpanResiduals | None
    condition: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def arguments(self, family: Family, transformer_config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of :class:`~blockskip_hooks.transformer.DiTBlockSkipTransformer` beside the residuals."""
        inputs = family.transformer_inputs(transformer_config, self.noisy_latents, self.timesteps, self.embeds)
        if self.positions is not None:
            inputs = family.with_positions(inputs, self.positions)
        if self.condition is None:
            return inputs
        joined = family.with_condition(inputs, self.condition)
        tokens = [family.image_tokens(transformer_config, arguments) for arguments in (inputs, joined)]
        return {**joined, "condition_tokens": tokens[1] - tokens[0]}

    def loss_terms(self, family: Family, prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the loss compares, ``(B, C, H, W)`` each, given the predicted velocity in the latents' layout."""
        return family.loss_terms(prediction, self.latents, self.noise, self.noisy_latents, self.sigmas)

    @property
    def recorded_latents(self) -> torch.Tensor:
        """The clean latents as :meth:`SampleMaker.encode` makes them."""
        return self.latents if self.condition is None else torch.stack([self.latents, self.condition], dim=1)


class SampleMaker:
    """Builds batches from samples, from their records where there are any.

    Args:
        plan: The sample plan.
        sources: Photos and prompts by kind.
        family: The model's family.
        embeds: Embeddings of every prompt, on the CPU.
        device: Where batches go.
        dtype: Dtype of latents and embeddings.
        records_modulation: Whether records hold the outputs of modulation layers.
        residual_dtype: How records hold residuals.
        shares_text: Whether the text after the leading span is that of the prompt, so that its samples share it.
    """

    def __init__(
        self,
        plan: SamplePlan,
        sources: dict[SampleKind, PhotoSource],
        family: Family,
        embeds: dict[str, PromptEmbeds],
        device: torch.device | str,
        dtype: torch.dtype,
        records_modulation: bool = False,
        residual_dtype: ResidualDtype = "auto",
        shares_text: bool = False,
    ) -> None:
        self.residual_dtype = residual_dtype
        self.records_modulation = records_modulation
        self.shares_text = shares_text
        self.plan = plan
        self.sources = sources
        self.family = family
        self.embeds = embeds
        self.device = torch.device(device)
        self.dtype = dtype
        self.are_pairs = sources["instance"].photos.are_pairs
        self._reads_pairs = self.are_pairs and family.reads_condition
        self._posteriors: dict[tuple[SampleKind, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def samples(self, indices: Iterable[int]) -> list[Sample]:
        """The samples of a step: ``indices`` of every kind, instance first."""
        indices = list(indices)
        return [self.plan.sample(index, kind) for kind in self.sources for index in indices]

    def describe(self, sample: Sample) -> str:
        """A sample in words: its number and its photo."""
        return f"{sample.kind} sample {sample.index} ({self.sources[sample.kind].photos.name(sample.image)})"

    def crop(self, sample: Sample) -> torch.Tensor:
        """The sample's image as the VAE sees it, ``(3, h, w)`` in [-1, 1] at its bucket's training shape.

        Of a pair ``(2, 3, h, w)``: the image and its condition image.
        """
        patch = self.plan.patch
        return self.sources[sample.kind].photos.crop(
            sample.image,
            patch_size=patch.patch_shape(sample.bucket, sample.patch_size),
            top=sample.top,
            left=sample.left,
            flip=sample.flip,
            center=self.plan.center_crop,
            output_size=patch.training_shape(sample.bucket),
            bucket=sample.bucket,
        )

    def positions(self, sample: Sample) -> torch.Tensor:
        """Where the tokens of the sample's crop lie, ``(tokens, 2)``: in the whole crop, or side by side."""
        if not sample.is_placed:
            # As a patch that is not resized, from the first token on.
            return patch_positions(self.plan.patch, self.plan.patch.training_resolution, 0.0, 0.0, sample.bucket)
        top, left = (0.5, 0.5) if self.plan.center_crop else (sample.top, sample.left)
        left = 1.0 - left if sample.flip else left
        return patch_positions(self.plan.patch, sample.patch_size, top, left, sample.bucket)

    def prompt(self, sample: Sample) -> str:
        """The sample's prompt; empty where caption dropout takes it away."""
        return "" if sample.drop_caption else self.sources[sample.kind].prompt_for(sample.image)

    def shared_ids(self, sample: Sample) -> dict[str, str]:
        """Names of the records that other samples read too, by the tensor that each of them holds.

        Modulation is that of a prompt and a timestep; text that no block has brought together with the image is that
        of a prompt.
        """
        prompt = f"{derived_seed('prompt', self.prompt(sample)):016x}"
        shared = {}
        if self.records_modulation:
            shared["modulation"] = f"modulation-{prompt}-{sample.timestep_index:04d}"
        if self.shares_text:
            shared[SHARED_TEXT] = f"text-{prompt}"
        return shared

    def record_ids(self, sample: Sample) -> list[str]:
        """Names of all records that the sample needs."""
        return [sample.id, *self.shared_ids(sample).values()]

    def embeds_key(self, sample: Sample) -> str:
        """The key of the sample's embeddings: its prompt, and its photo where text encoders see condition images."""
        return f"{self.prompt(sample)} [photo {sample.image + 1}]" if self._reads_pairs else self.prompt(sample)

    def pairs(self) -> dict[str, Pair]:
        """Prompts and condition images that text encoders see together, by :meth:`embeds_key`; else nothing.

        Each is made when it is asked for: all of them would fill as much memory as the photos do.
        """
        if not self._reads_pairs:
            return {}
        # Crops are fixed, so any sample of a photo has the photo's.
        samples = [self.plan.sample(index) for index in range(self.plan.epoch_length)]
        first = {self.embeds_key(sample): sample for sample in reversed(samples)}
        return {key: partial(self._pair, sample) for key, sample in first.items()}

    def _pair(self, sample: Sample) -> tuple[str, Image.Image]:
        return self.prompt(sample), as_picture(self.crop(sample)[1])

    def is_recorded(self, sample: Sample, store: ResidualStore) -> bool:
        """Whether the store holds everything of the sample."""
        return all(record in store for record in self.record_ids(sample))

    def read_record(self, sample: Sample, store: ResidualStore) -> Record:
        """The sample's tensors, those that it shares with others included."""
        records = [unpack_record(store.read(record), self.dtype) for record in self.record_ids(sample)]
        return {name: tensor for record in records for name, tensor in record.items()}

    def shape_key(self, sample: Sample) -> tuple:
        """What decides the shapes of the sample's tensors; equal keys can share a forward without padding."""
        return sample.bucket, *(tuple(tensor.shape) for tensor in self.embeds[self.embeds_key(sample)].values())

    @torch.no_grad()
    def encode(self, vae: ModelMixin, samples: Sequence[Sample], crops: torch.Tensor | None = None) -> torch.Tensor:
        """Crops through the VAE: scaled latents ``(B, C, H, W)``, each drawn from the posterior with its own seed.

        Of pairs ``(B, 2, C, H, W)``.

        Args:
            vae: The VAE.
            samples: The samples.
            crops: Their crops, ``(B, 3, h, w)`` or ``(B, 2, 3, h, w)``, if they were made already.
        """
        if self.plan.fixed_crops:
            posteriors = [self._fixed_posterior(vae, sample) for sample in samples]
            mean, std = (torch.stack(parts).to(vae.device) for parts in zip(*posteriors, strict=True))
        else:
            if crops is None:
                crops = torch.stack([self.crop(sample) for sample in samples])
            mean, std = self._posterior(vae, crops)
        noise = [
            torch.randn(
                mean.shape[1:], generator=torch.Generator().manual_seed(derived_seed(s.noise_seed, "posterior"))
            )
            for s in samples
        ]
        drawn = mean + std * torch.stack(noise).to(mean)
        if not self.are_pairs:
            return self.family.scale_latents(vae, drawn).to(self.dtype)
        return torch.stack([self.family.scale_latents(vae, part) for part in drawn.unbind(1)], dim=1).to(self.dtype)

    def _posterior(self, vae: ModelMixin, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of crops; pairs are as in the crops."""
        # In half precision the VAE's weights are; under autocast its norms would make float32 of the largest images.
        with torch.autocast(vae.device.type, enabled=False):
            if not self.are_pairs:
                return self.family.posterior(vae, crops)
            photos, conditions = (self.family.posterior(vae, part) for part in crops.unbind(1))
        mean, std = (torch.stack(parts, dim=1) for parts in zip(photos, conditions, strict=True))
        if self.family.condition_on_mode:
            std[:, 1] = 0.0
        return mean, std

    def _fixed_posterior(self, vae: ModelMixin, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior of an image whose crop never changes, computed once and kept on the CPU."""
        key = (sample.kind, sample.image, sample.bucket)
        if key not in self._posteriors:
            mean, std = self._posterior(vae, self.crop(sample)[None])
            self._posteriors[key] = (mean[0].cpu(), std[0].cpu())
        return self._posteriors[key]

    def batch(self, samples: Sequence[Sample], latents: torch.Tensor, residuals: SpanResiduals | None = None) -> Batch:
        """Complete clean latents, as :meth:`encode` makes them, with noise, noise levels and prompts."""
        latents = latents.to(self.device, self.dtype)
        latents, condition = latents.unbind(1) if self.are_pairs else (latents, None)
        scheduler = self.family.scheduler
        indices = [sample.timestep_index for sample in samples]
        # Noise is drawn on the CPU in float32, so that every device and dtype trains on the same sample.
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(s.noise_seed)) for s in samples]
        )
        prompts = [self.prompt(sample) for sample in samples]
        embeds = self.family.collate_embeds([self.embeds[self.embeds_key(sample)] for sample in samples])
        noise, positions = noise.to(latents), None
        if self.plan.patch.positions == "photo":
            positions = torch.stack([self.positions(sample) for sample in samples]).to(self.device)
        return Batch(
            samples=list(samples),
            latents=latents,
            noise=noise,
            noisy_latents=self.family.add_noise(latents, noise, indices),
            timesteps=scheduler.timesteps[indices].to(self.device),
            sigmas=self.family.sigmas(indices).to(latents),
            embeds=place_embeds(embeds, self.device, self.dtype),
            prompts=prompts,
            residuals=None if residuals is None else residuals.to(self.device),
            condition=condition,
            positions=positions,
        )

    def batch_from_records(self, samples: Sequence[Sample], records: Sequence[Record]) -> Batch:
        """A batch whose latents and residuals were precomputed.

        Residuals of prompts of different lengths are padded like the prompts, at the end.
        """
        stacked = {name: pad_sequence([record[name] for record in records], batch_first=True) for name in records[0]}
        latents = stacked.pop("latents")
        return self.batch(samples, latents, SpanResiduals(**stacked) if stacked else None)


def as_picture(crop: torch.Tensor) -> Image.Image:
    """A crop ``(3, h, w)`` in [-1, 1] as the picture that it was cut from."""
    return Image.fromarray((crop * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
