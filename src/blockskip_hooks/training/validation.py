"""Checks of a run while it goes: images of the whole model, and how true the records still are."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from diffusers.training_utils import free_memory
from PIL import Image

from ..families import PromptEmbeds
from ..inference.generate import generate_images
from ..loading.lora_files import copy_lora
from ..lora import TRAINED, add_lora, only_adapters
from ..planning.plan import PlannedStage
from ..transformer import DiTBlockSkipTransformer
from .adapters import Adapters
from .context import Context
from .records import RecordSource
from .run import Run
from .samples import schedule


if TYPE_CHECKING:
    from ..reporting.trackers import Tracking


EVERY = 10
"""Steps between two logs of the figures that take time: of the LoRA, the patches, memory, and the records."""

Images = list[list[Image.Image]]


class Validation:
    """Validation images and the trailing approximation of a run; the same seeds each time.

    Processes share the images: each makes a part of the pipeline's calls that one process would make, and all get
    every image. Where they share the model's weights instead, each makes all of them.

    Args:
        run: The run, its seed resolved.
        context: Its surroundings.
        model: The transformer.
        adapters: Its LoRA.
        records: Has the prompts' embeddings, the VAE and the records.
        tracking: Takes images and figures.
        planned: How the plan has it make images.
        embeds: Embeddings of the prompts by the text encoders of a model that makes the images in place of the
            trained one.

    Attributes:
        shown: The images that were made last during training: their step, prompts, the base model's and the LoRA's.
    """

    def __init__(
        self,
        run: Run,
        context: Context,
        model: DiTBlockSkipTransformer,
        adapters: Adapters,
        records: RecordSource,
        tracking: Tracking,
        planned: PlannedStage,
        embeds: Mapping[str, PromptEmbeds] | None = None,
    ) -> None:
        self._run, self._context, self._model, self._adapters = run, context, model, adapters
        self._records, self._tracking = records, tracking
        self._planned, self._embeds = planned, embeds
        # Before encoders that train along have changed any.
        self._base_embeds = dict(records.maker.embeds) if embeds is None else embeds
        self.shown: tuple[int, list[str], Images, Images] | None = None
        self._seeds = [run.seed + number for number in range(run.settings.num_validation_images)]
        self._base: dict[str, list[Image.Image]] = {}
        self._checked_step = 0

    def during(self, step: int) -> None:
        """Make the images of a validation during training and log them; every process must call this."""
        prompts = self._run.prompts
        if self._seeds:
            trained = self._images(prompts, with_adapters=True)
            base: Images = []
            if self._tracking.main_is_on:
                base = self._base_images(prompts)
                self._log_images("validation", step, prompts, base, trained)
            self.shown = step, prompts, base, trained
        self.log_trailing_error(step)

    def final(self, step: int) -> tuple[Images, Images]:
        """Make the base model's and the trained model's images after training, log and return them.

        Every process must call this.
        """
        prompts = self._run.final_prompts
        if not prompts or not self._seeds:
            return [], []
        base, trained = self._base_images(prompts), self._images(prompts, with_adapters=True)
        self._log_images("test", step, prompts, base, trained)
        return base, trained

    def _log_images(self, phase: str, step: int, prompts: Sequence[str], base: Images, trained: Images) -> None:
        steps_per_epoch, _ = schedule(self._run, self._records.maker.plan, self._context.accelerator.num_processes)
        epoch = (step - 1) // steps_per_epoch
        self._tracking.log_images(phase, step, epoch, prompts, self._seeds, base, trained)

    def log_trailing_error(self, step: int, *, is_last: bool = False) -> None:
        """Log the trailing error of the stretch that was trained on, unless that was done a few steps ago.

        It takes one forward of the whole model, streamed as in precompute, so it is for trackers only and no more
        often than their other figures.
        """
        run = self._run
        if not (self._tracking.is_on_somewhere and run.stores_residuals and run.config.trailing):
            return
        if step - self._checked_step < EVERY and not is_last:
            return
        self._checked_step = step
        with self._context.monitor.stage("validate"):
            error = self._records.trailing_error()
        if error is not None:
            self._tracking.log_trailing_error(step, error)

    def _base_images(self, prompts: Sequence[str]) -> Images:
        """Images of the base model, made once."""
        missing = [prompt for prompt in prompts if prompt not in self._base]
        if missing:
            self._base |= dict(zip(missing, self._images(missing, with_adapters=False), strict=True))
        return [self._base[prompt] for prompt in prompts]

    def _images(self, prompts: Sequence[str], *, with_adapters: bool) -> Images:
        family, negative, context = self._run.image_family, self._run.image_negative_prompt, self._context
        embeds = self._base_embeds
        if with_adapters and self._embeds is None:
            embeds = self._adapters.current(
                self._records.maker.embeds, [*prompts, *([] if negative is None else [negative])]
            )
        sharded, accelerator = self._model.is_sharded, context.accelerator
        others = 1 if sharded else accelerator.num_processes
        at_once = self._planned.batch_size or len(self._seeds)
        name = f"validate ({'after' if with_adapters else 'before'})"
        with (
            # A run that is stopped saves: the model that trains must be back on the device by then.
            context.stop.held() if sharded or self._run.validation_family else contextlib.nullcontext(),
            context.monitor.stage("validate"),
            self._models(with_adapters) as models,
            context.accelerator.autocast(),
            context.progress.stage(name, images=-(-len(prompts) * len(self._seeds) // others)) as progress,
        ):

            def made(images: int) -> None:
                progress.update(images)
                if sharded:
                    context.check_stop_together()

            images = generate_images(
                [embeds[prompt] for prompt in prompts],
                family=family,
                **models,
                negative=None if negative is None else embeds[negative],
                seeds=self._seeds,
                pipeline_kwargs=self._run.image_kwargs,
                images_at_once=at_once,
                together=1 if sharded else self._planned.together,
                placement=self._planned.vae,
                progress=made,
                calls=lambda number: number % others == accelerator.process_index % others,
            )
            images = images if others == 1 else self._from_all(images, at_once)
        if self._run.validation_family:
            context.stop.check()
        return images

    @contextlib.contextmanager
    def _models(self, with_adapters: bool) -> Iterator[dict[str, Any]]:
        """Within this context ``model`` and ``vae`` that make images, with or without the LoRA that trains.

        Where they are another model's, the trained model's frozen weights are in host memory meanwhile. Only what this
        yields may hold on to them: they are gone before those weights come back.
        """
        run, trained, records = self._run, self._model, self._records
        names = [TRAINED] if with_adapters else []
        if run.validation_family is None:
            with records.vae() as vae, only_adapters(trained.transformer, names):
                models = {"model": trained, "vae": vae}
                del vae
                yield models
                models.clear()
            return
        family, dtype, device = run.validation_family, records.maker.dtype, self._context.accelerator.device
        with trained.on_host():
            options = run.model_options(dtype, device, family=family)
            model = DiTBlockSkipTransformer.from_pretrained(family.model_path, run.config, **options)
            if with_adapters:
                lora: dict[str, Any] = {"rank": run.settings.rank, "alpha": run.settings.lora_alpha, "dropout": 0.0}
                add_lora(model.transformer, run.targets, **lora, seed=run.seed)
                copy_lora(trained.transformer, model.transformer)
            models = {"model": model, "vae": family.load_vae(dtype, device)}
            del model
            yield models
            models.clear()
            free_memory()

    @staticmethod
    def _from_all(images: Images, at_once: int) -> Images:
        """The images of all processes, each of which made every so many-th call of the pipeline."""
        made: list[Images] = gather_object([images])
        calls = itertools.count()
        together: Images = []
        for prompt in range(len(images)):
            left = [list(process[prompt]) for process in made]
            together.append([])
            while any(left):
                owner = left[next(calls) % len(left)]
                together[-1] += owner[:at_once]
                del owner[:at_once]
        return together
