"""What trackers log of a run: figures of every step, of the LoRA and of the machine, and validation images."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from ..data.sample_plan import Sample
from ..lora import TRAINED
from ..training.run import Run
from ..training.validation import EVERY
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError, first_line, one_line
from ..utils.monitor import StageMonitor


logger = logging.getLogger(__name__)


def start_trackers(run: Run, accelerator: Accelerator) -> None:
    """Start the trackers of ``--report_to`` and give them the flags.

    Trackers write their files to ``--logging_dir``, or where their own variables say.

    Raises:
        UserError: if a tracker cannot start.
    """
    folder = run.output_dir / run.settings.logging_dir
    if accelerator.log_with:
        folder.mkdir(parents=True, exist_ok=True)
    places = {
        name: {argument: place}
        for name, argument, place, variable in (
            ("wandb", "dir", str(folder), "WANDB_DIR"),
            ("swanlab", "logdir", str(folder / "swanlab"), "SWANLAB_LOG_DIR"),
        )
        if not os.environ.get(variable)
    }
    try:
        accelerator.init_trackers(f"dreambooth-{run.family.name}-lora", _trackable_settings(run), places)
    except Exception as error:  # every service has errors of its own, of the network and of logging in
        logger.debug("A tracker did not start.", exc_info=True)
        accelerator.trackers.clear()
        hints = {
            "wandb": "run `wandb login`, or set WANDB_MODE=offline",
            "comet_ml": "run `comet login`, or set COMET_START_ONLINE=0",
            "swanlab": "run `swanlab login`, or set SWANLAB_MODE=local",
        }
        wanted = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
        advice = [hints[name] for name in wanted if name in hints]
        raise UserError(
            f"--report_to {','.join(wanted)}: a tracker does not start ({one_line(first_line(error))}); "
            f"{'; '.join([*advice, 'or'])} give --report_to none."
        ) from error


def _trackable_settings(run: Run) -> dict[str, Any]:
    """The flags as trackers take them: plain values, and no token."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in run.settings.plain().items()
        if name != "hub_token"
    }


class Tracking:
    """Logs the figures of a run; does nothing without trackers, which only the main process has.

    Args:
        accelerator: Holds the trackers.
        monitor: Measures memory and stages.
        model: The model with the LoRA.
    """

    def __init__(self, accelerator: Accelerator, monitor: StageMonitor, model: DiTBlockSkipTransformer) -> None:
        self.accelerator, self.monitor, self.model = accelerator, monitor, model
        self._patch_sizes: list[int] = []

    @property
    def is_on(self) -> bool:
        """Whether this process has trackers."""
        return bool(self.accelerator.trackers)

    @property
    def main_is_on(self) -> bool:
        """Whether the main process has trackers; the same in every process."""
        return bool(self.accelerator.log_with)

    @property
    def is_on_somewhere(self) -> bool:
        """Whether some process has trackers whose figures need this process, because weights are shared."""
        return self.is_on or (self.model.is_sharded and self.main_is_on)

    def log_step(
        self, step: int, samples: Sequence[Sample], figures: Mapping[str, float], quarters: Mapping[str, float]
    ) -> None:
        """Log an optimiser step.

        Args:
            step: Its number, from 1.
            samples: This process's samples of it.
            figures: Loss, learning rate, gradient norm.
            quarters: Mean loss by range of timesteps, over all processes.
        """
        if not self.is_on:
            return
        self._patch_sizes += [sample.patch_size for sample in samples]
        values = {**figures, **{f"loss_by_timestep/{timesteps}": loss for timesteps, loss in quarters.items()}}
        if step % EVERY == 0:
            values |= self._slow_figures()
            self._log_patch_sizes(step)
        self.accelerator.log(values, step=step)

    def log_stages(self, step: int) -> None:
        """Log seconds and peak memory of the stages so far."""
        if not self.is_on:
            return
        values = {}
        for stage in self.monitor.as_list():
            values[f"stage_seconds/{stage['name']}"] = stage["seconds"]
            peak = stage["peak_device_bytes"] if stage["peak_device_bytes"] is not None else stage["peak_rss_bytes"]
            values[f"stage_peak_bytes/{stage['name']}"] = peak
        self.accelerator.log(values, step=step)

    def log_trailing_error(self, step: int, error: float) -> None:
        """Log the relative distance of recorded trailing residuals from what the span computes now."""
        self.accelerator.log({"trailing_error": error}, step=step)

    def log_images(
        self,
        phase: str,
        step: int,
        epoch: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
        base: Sequence[Sequence[Image.Image]],
        now: Sequence[Sequence[Image.Image]],
    ) -> None:
        """Log images of the trained model as upstream's scripts do, and for each prompt and seed a pair.

        A pair is the base model's image, and the trained model's to its right. Trackers that show no images get none.

        Args:
            phase: ``"validation"`` during training, ``"test"`` after it.
            step: The step after which they were made.
            epoch: Its epoch, from 0: tensorboard's steps of upstream's images.
            prompts: The prompts.
            seeds: The seed of each image of a prompt.
            base: The base model's images of each prompt.
            now: The trained model's images of each prompt.
        """
        images = {
            f"{number}: {prompt}": image
            for number, (prompt, image) in enumerate((p, i) for p, row in zip(prompts, now, strict=True) for i in row)
        }
        for tracker in self.accelerator.trackers:
            _log_as_upstream(tracker, phase, images, epoch, step)
        for number, (prompt, before, after) in enumerate(zip(prompts, base, now, strict=True)):
            pairs = [make_image_grid(list(pair), rows=1, cols=2) for pair in zip(before, after, strict=True)]
            # Some trackers take few characters in a name; the whole prompt is in the caption.
            name = f"{phase}/{number} {re.sub('[^0-9a-zA-Z _-]', '_', prompt)[:80]}"
            captions = [f"{prompt} (seed {seed}: base model, step {step})" for seed in seeds]
            for tracker in self.accelerator.trackers:
                _log_pairs(tracker, name, seeds, pairs, captions, step)

    def _slow_figures(self) -> dict[str, float]:
        now, peak = self.monitor.memory()
        norms = block_norms(self.model)
        return {"memory/now": now, "memory/peak": peak, **{f"lora_norm/{name}": norm for name, norm in norms.items()}}

    def _log_patch_sizes(self, step: int) -> None:
        """Log the patch sizes since the last call: a histogram where the tracker has one, else the share of each."""
        sizes, self._patch_sizes = self._patch_sizes, []
        if not sizes:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.add_histogram("patch_size", np.array(sizes), step)
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"patch_size": wandb.Histogram(sizes)}, step=step)
            elif tracker.name == "comet_ml":
                tracker.tracker.log_histogram_3d(sizes, name="patch_size", step=step)
            else:
                counts = Counter(sizes)
                tracker.log({f"patch_size/{size}": count / len(sizes) for size, count in counts.items()}, step=step)


@torch.no_grad()
def block_norms(model: DiTBlockSkipTransformer) -> dict[str, float]:
    """Norm of the LoRA's update of all weights of each kept block, by name of the block."""
    squares: dict[str, list[torch.Tensor]] = {}
    for block in model.spans.kept:
        for layer in block.module.modules():
            if isinstance(layer, BaseTunerLayer) and TRAINED in layer.scaling:
                down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
                # Norm of B @ A, computed from rank-sized matrices.
                square = ((up.T @ up) * (down @ down.T)).sum() * layer.scaling[TRAINED] ** 2
                squares.setdefault(block.name, []).append(square)
    if not squares:
        return {}
    # One transfer from the device for all of them; rounding can leave a little less than zero.
    norms = torch.stack([torch.stack(parts).sum() for parts in squares.values()]).clamp_min(0).sqrt().tolist()
    return dict(zip(squares, norms, strict=True))


def _log_as_upstream(tracker: Any, phase: str, images: Mapping[str, Image.Image], epoch: int, step: int) -> None:
    """Tags and steps that dashboards made for diffusers' scripts look for; those know these two trackers."""
    if tracker.name == "tensorboard":
        tracker.log_images(
            {phase: np.stack([np.asarray(image) for image in images.values()])}, epoch, dataformats="NHWC"
        )
    elif tracker.name == "wandb":
        import wandb

        tracker.log({phase: [wandb.Image(image, caption=caption) for caption, image in images.items()]}, step=step)


def _log_pairs(
    tracker: Any, name: str, seeds: Sequence[int], pairs: Sequence[Image.Image], captions: Sequence[str], step: int
) -> None:
    if tracker.name == "tensorboard":
        named = {f"{name}/seed {seed}": np.asarray(pair)[None] for seed, pair in zip(seeds, pairs, strict=True)}
        tracker.log_images(named, step=step, dataformats="NHWC")
        # Its images have no captions.
        tracker.log({f"{name}/caption": "  \n".join(captions)}, step=step)
    elif tracker.name in ("wandb", "swanlab"):
        service = import_module(tracker.name)
        images = [service.Image(pair, caption=caption) for pair, caption in zip(pairs, captions, strict=True)]
        tracker.log({name: images}, step=step)
    elif tracker.name == "comet_ml":
        for pair, caption in zip(pairs, captions, strict=True):
            tracker.tracker.log_image(pair, name=caption, step=step)
