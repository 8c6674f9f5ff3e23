"""Checks of a run while it goes: images of the whole model, and how true the records still are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..data.sample_plan import Sample
from ..inference.generate import generate_images
from ..reporting.trackers import EVERY
from ..residuals.precompute import base_model, capture
from ..residuals.store import DamagedRecord


if TYPE_CHECKING:
    from .trainer import Trainer


CHECKED = 4
"""Samples that the trailing approximation is looked at with, at most."""

Images = list[list[Image.Image]]


class Validation:
    """Validation images and the trailing approximation of a run; the same seeds each time.

    Args:
        trainer: The run's trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run = trainer, trainer.run
        self.seeds = [trainer.maker.plan.seed + number for number in range(self.run.settings.num_validation_images)]
        self._base: dict[str, list[Image.Image]] = {}
        self._checked_step = 0

    def during(self) -> None:
        """Make the images of a validation during training and log them."""
        trainer, prompts = self.trainer, self.run.prompts
        trained = self.trained(prompts)
        base: Images = []
        if trainer.tracking.is_on_somewhere and self.seeds:
            base = self.base(prompts)
            trainer.tracking.log_images(trainer.step, prompts, self.seeds, base, trained)
        trainer.shown_images = trainer.step, prompts, base, trained
        self.check_records()

    def final(self) -> tuple[Images, Images]:
        """Make the base model's and the trained model's images after training, log and return them."""
        trainer, prompts = self.trainer, self.run.final_prompts
        if not prompts or not self.seeds:
            return [], []
        base, trained = self.base(prompts), self.trained(prompts)
        trainer.tracking.log_images(trainer.step, prompts, self.seeds, base, trained)
        return base, trained

    def base(self, prompts: Sequence[str]) -> Images:
        """Images of the base model, made once."""
        missing = [prompt for prompt in prompts if prompt not in self._base]
        if missing:
            self._base |= dict(zip(missing, self._images(missing, with_adapters=False), strict=True))
        return [self._base[prompt] for prompt in prompts]

    def trained(self, prompts: Sequence[str]) -> Images:
        """Images of the model as it is."""
        return self._images(prompts, with_adapters=True)

    def _images(self, prompts: Sequence[str], *, with_adapters: bool) -> Images:
        trainer, family, negative = self.trainer, self.run.family, self.run.negative_prompt
        embeds = dict(trainer.maker.embeds)
        if trainer.text and with_adapters:
            trainer.refresh_embeds(embeds, [*prompts, *([] if negative is None else [negative])])
        adapters = contextlib.nullcontext() if with_adapters else base_model(trainer.model.transformer)
        sharded = trainer.model.is_sharded
        name = f"validate ({'LoRA' if with_adapters else 'base model'})"
        with (
            trainer.stop.held() if sharded else contextlib.nullcontext(),
            trainer.monitor.stage("validate"),
            trainer.vae() as vae,
            adapters,
            trainer.accelerator.autocast(),
            trainer.progress.stage(name, images=len(prompts) * len(self.seeds)) as progress,
        ):

            def made(images: int) -> None:
                progress.update(images)
                if sharded:
                    trainer.check_stop_together()

            return generate_images(
                [embeds[prompt] for prompt in prompts],
                family=family,
                model=trainer.model,
                vae=vae,
                negative=None if negative is None else embeds[negative],
                seeds=self.seeds,
                pipeline_kwargs=self.run.pipeline_kwargs,
                images_at_once=trainer.images_at_once,
                placement=trainer.vae_placement.get("validate"),
                progress=made,
            )

    def check_records(self) -> None:
        """Log the trailing error of the stretch that was trained on, unless that was done a few steps ago.

        It takes one forward of the whole model, streamed as in precompute, so it is for trackers only and no more
        often than their other figures.
        """
        trainer = self.trainer
        if not (trainer.tracking.is_on_somewhere and trainer.run.stores_residuals and trainer.run.config.trailing):
            return
        if trainer.step - self._checked_step < EVERY and trainer.step < trainer.max_train_steps:
            return
        self._checked_step = trainer.step
        with trainer.monitor.stage("validate"):
            error = trailing_error(trainer, trainer.recorded_samples)
        if error is not None:
            trainer.tracking.log_trailing_error(trainer.step, error)


@torch.no_grad()
def trailing_error(trainer: Trainer, samples: Sequence[Sample]) -> float | None:
    """How far the recorded trailing residuals of a few samples are from what the span contributes with the LoRA now.

    Records are the base model's, or those of the LoRA as a refreshed stretch began; training goes on with them as if
    the trailing span added the same to whatever the kept blocks have come to say. Nothing of the training changes.

    Args:
        trainer: The run's trainer; its store has the samples' records.
        samples: Samples to choose from, evenly.

    Returns:
        Norm of the difference relative to that of the residual now; ``None`` if no record can be read.
    """
    store, maker = trainer.store, trainer.maker
    assert store is not None
    alike = [sample for sample in samples if maker.shape_key(sample) == maker.shape_key(samples[0])]
    chosen = alike[:: max(1, -(-len(alike) // min(CHECKED, trainer.largest_capture)))]
    try:
        records = [maker.read_record(sample, store) for sample in chosen]
    except (KeyError, DamagedRecord):
        records = []
    # Processes that share weights run the model together or not at all.
    if trainer.largest(not records) if trainer.model.is_sharded else not records:
        return None
    batch = maker.batch_from_records(chosen, records)
    assert batch.residuals is not None and batch.residuals.trailing_hidden_states is not None
    recorded = batch.residuals.trailing_hidden_states.float()
    if trainer.text:
        tokens = trainer.text.batch_tokens(batch.prompts, trainer.accelerator.device)
        batch.embeds = trainer.run.family.refresh_embeds(trainer.text.encoders, tokens, batch.embeds)
    with trainer.accelerator.autocast():
        now = capture(trainer.model, maker, batch).trailing_hidden_states
    assert now is not None
    return ((now.float() - recorded).norm() / now.float().norm().clamp_min(1e-12)).item()


__all__ = ["Validation", "trailing_error"]
