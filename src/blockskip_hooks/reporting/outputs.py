"""What a run leaves beside its weights: ``run_report.json``, the report page, ``before_after.png``, the model card."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image

from ..loading.lora_files import WEIGHTS_NAME
from ..loading.models import empty_model
from ..residuals.batches import SampleMaker, as_picture
from ..residuals.stretches import Stretches
from ..training.history import History
from ..training.run import Run
from ..utils.digests import folder_digest
from ..utils.files import write_json
from ..utils.machine import describe_machine, versions
from ..utils.monitor import StageMonitor
from ..utils.pictures import SheetRow, contact_sheet
from .hub import nearby, without_folders
from .model_card import License, read_license, usage_snippet, write_model_card
from .page import ReportImages, write_report
from .settings_list import listed_settings


Images = Sequence[Sequence[Image.Image]]
"""Images of each prompt."""

_ANY_PIPELINE = ("diffusers", "DiffusionPipeline")
MAX_PHOTOS = 8
CROPS_SHOWN = 12
PICTURE_NAME = "before_after.png"
SHEET_PIXELS = 128
"""Least side of an image in it."""


@dataclass(frozen=True)
class RunOutputs:
    """Writes the files that tell of a run.

    Attributes:
        run: The prepared run.
        maker: Has the photos and the sample plan.
        monitor: Has the stages' time and memory.
        plan: Contents of plan.json.
        command: The command line that repeats the run.
        stretches: Its stretches.
    """

    run: Run
    maker: SampleMaker
    monitor: StageMonitor
    plan: Mapping[str, Any]
    command: str
    stretches: Stretches

    def report(
        self, history: History, made: tuple[int, int] | None = None, lora: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """The contents of ``run_report.json``; the schema is in the README.

        Args:
            history: The steps so far.
            made: Records that all processes have made, and their bytes; ``None`` before the end.
            lora: Size of the LoRA, see `lora_size`; ``None`` before the end.
        """
        run, dtype = self.run, str(self.maker.dtype).removeprefix("torch.")
        packed = run.stores_residuals and run.settings.residual_dtype == "float8"
        residuals: dict[str, Any] = {"mode": run.config.residuals if run.skips else None}
        if made is not None:
            residuals |= {
                "records": made[0],
                "bytes": made[1],
                "stretches": len(self.stretches) if run.uses_store else 0,
                "dtype": "float8_e4m3fn" if packed else dtype,
            }
        return {
            "schema": 1,
            "model": run.model_name,
            "family": run.family.name,
            "created_at": self.monitor.started.isoformat(timespec="seconds"),
            "base_revision": run.settings.revision,
            "weights": "sha256:" + folder_digest(run.family.model_path / "transformer"),
            "skip": run.selection.as_dict(),
            "patch": {
                "mode": run.patch.mode,
                "min": run.patch.min_size,
                "max": run.patch.max_size,
                "training_resolution": run.patch.training_resolution,
                "positions": run.patch.positions,
            },
            "stages": self.monitor.as_list(),
            "train": {
                **_train(history),
                "dtype": dtype,
                "quantization": run.quantization.name if run.quantization else None,
            },
            "lora": lora,
            "residuals": residuals,
            "settings": _settings(run),
            "machine": describe_machine(self.maker.device),
            "versions": versions(),
        }

    def write(self, report: Mapping[str, Any], before: Images, after: Images) -> None:
        """Write all files at the end of a run.

        Args:
            report: From :meth:`report`.
            before: The base model's images of each final prompt.
            after: The trained model's images of each final prompt.
        """
        run, folder = self.run, self.run.output_dir
        remove_pictures(folder)
        write_json(folder / "run_report.json", report)
        images = self._images(report, run.final_prompts, before, after)
        if before and after:
            first = after[0][0]
            rows = {
                "training photos": [photo.resize(first.size) for photo in images.photos],
                "before": [image for row in before for image in row],
                "after": [image for row in after for image in row],
            }
            contact_sheet(
                [SheetRow(label, row[:MAX_PHOTOS]) for label, row in rows.items()],
                folder / PICTURE_NAME,
                side=max(first.size) * max(1, SHEET_PIXELS // max(first.size)),
            )
        result = run.settings.hub_model_id or str(folder)
        self._write_page(report, images, self.snippet(result, nearby))
        # A name like "." says nothing elsewhere.
        shared = result if folder.name not in ("", "..") else folder.resolve().name
        base_license = License("apache-2.0") if run.embedded else read_license(run.family.model_path, run.model_name)
        write_model_card(
            folder,
            report,
            [(prompt, image) for prompt, row in zip(run.final_prompts, after) for image in row],
            repo_id=run.settings.hub_model_id or folder.resolve().name,
            base_license=base_license,
            tags=run.family.tags,
            # Where things lie on this machine is of no use to those who find the card, and nobody's business.
            snippet=self.snippet(shared, without_folders),
        )

    def write_so_far(self, history: History, shown: tuple[int, Sequence[str], Images, Images] | None) -> None:
        """Write ``report.html`` of a run that goes on, with what there is so far.

        Args:
            history: The steps so far.
            shown: The validation images that were made last: their step, prompts, the base model's and the LoRA's.
        """
        report = self.report(history)
        step, prompts, before, after = shown or (None, [], [], [])
        images = self._images(report, prompts, before, after, step)
        checkpoint = self.run.output_dir / f"checkpoint-{history.step}"
        self._write_page(report, images, self.snippet(str(checkpoint), nearby), self.stretches.num_steps)

    def _images(
        self, report: Mapping[str, Any], prompts: Sequence[str], before: Images, after: Images, step: int | None = None
    ) -> ReportImages:
        """The given images, with the training photos and a few samples as the model saw them."""
        crops = sample_pictures(self.maker, report["train"]["samples"])
        return ReportImages(training_photos(self.maker), crops, prompts, before, after, step)

    def _write_page(
        self, report: Mapping[str, Any], images: ReportImages, snippet: str, total_steps: int | None = None
    ) -> None:
        table = self.run.table
        write_report(
            self.run.output_dir,
            report,
            self.plan,
            images=images,
            command=self.command,
            snippet=snippet,
            settings=listed_settings(self.run, self.plan, self.stretches, self.maker.dtype),
            curves={"leading": table.leading, "trailing": table.trailing} if table else None,
            total_steps=total_steps,
        )

    def snippet(self, lora: str, named: Callable[[str], str]) -> str:
        """Python code that makes an image with the model and a LoRA; ``named`` says how files are called in it."""
        run = self.run
        missing, pipeline = run.family.missing_components().items(), run.family.pipeline_class
        # diffusers finds its own classes by the model's index.
        is_stock = pipeline.__module__.startswith("diffusers.")
        prompts = (*run.final_prompts, *run.prompts, _settings(run)["instance_prompt"])
        return usage_snippet(
            named(run.model_name),
            named(lora),
            next((prompt for prompt in prompts if prompt), "a photo"),
            snippet_kwargs(run),
            # Always named: transformers and diffusers have different defaults, which do not mix.
            str(self.maker.dtype).removeprefix("torch."),
            pipeline_class=_ANY_PIPELINE if is_stock else (pipeline.__module__, pipeline.__name__),
            components={name: part and (part[0], named(part[1])) for name, part in missing},
            embedded=run.embedded,
            condition="condition.png" if run.settings.condition_flag else None,
        )


def remove_pictures(folder: Path) -> None:
    """Remove the pictures of an earlier run's LoRA, which this run's replaces; in other folders nothing is ours."""
    if (folder / "run_report.json").is_file():
        for picture in (folder / PICTURE_NAME, *folder.glob("image_[0-9]*.png")):
            picture.unlink(missing_ok=True)


def lora_size(run: Run, transformer: ModelMixin) -> dict[str, int]:
    """Size of the exported LoRA, and of the whole transformer with it.

    Args:
        run: The prepared run; its output folder has the LoRA.
        transformer: The transformer that was trained.
    """
    trainable = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    # In training skipped blocks have no parameters.
    whole = empty_model(run.transformer_config, run.family.transformer_class(run.transformer_config))
    return {
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in whole.parameters()) + trainable,
        "file_bytes": (run.output_dir / WEIGHTS_NAME).stat().st_size,
    }


def training_photos(maker: SampleMaker) -> list[Image.Image]:
    """The first instance photos, as large as their largest crop."""
    photos = maker.sources["instance"].photos
    shapes = [photos.shapes[photos.bucket(number)] for number in range(min(len(photos), MAX_PHOTOS))]
    return [
        _image(photos.crop(number, patch_size=shape, output_size=shape, center=True))
        for number, shape in enumerate(shapes)
    ]


def sample_pictures(maker: SampleMaker, num_samples: int) -> list[tuple[str, Image.Image]]:
    """A few of the samples trained on as the model saw them, with a caption, from low to high timestep."""
    plan = maker.plan
    samples = [plan.sample(index) for index in range(min(max(num_samples, 1), 256))]
    by_timestep = sorted(samples, key=lambda sample: -sample.timestep_index)
    shown = by_timestep[:: max(1, len(by_timestep) // CROPS_SHOWN)][:CROPS_SHOWN]
    return [
        (
            f"t = {float(plan.timesteps[sample.timestep_index]):.0f}, patch {sample.patch_size} px",
            _image(maker.crop(sample)),
        )
        for sample in shown
    ]


def snippet_kwargs(run: Run) -> dict[str, Any]:
    """Arguments of a pipeline call, beside the prompt, that gives images like the report's."""
    kwargs = {
        **run.family.prompt_inputs(""),
        **(run.pipeline_kwargs if run.validation_family else run.validation_kwargs),
    }
    stock = inspect.signature(run.family.pipeline_class.__call__).parameters
    return {
        name: value
        for name, value in kwargs.items()
        if name != "prompt" and not (name in stock and stock[name].default == value)
    }


def _train(history: History) -> dict[str, Any]:
    allocated, reserved = zip(*history.step_memory) if history.step_memory else ((), ())
    return {
        "steps": history.step,
        "samples": history.samples,
        "changed_settings": _changed_settings(history),
        "step_seconds_median": statistics.median(history.step_seconds) if history.step_seconds else None,
        "loss": history.losses,
        "loss_by_timestep": history.loss_by_timestep,
        "step_seconds": history.step_seconds,
        "step_memory": {"allocated_bytes": allocated, "reserved_bytes": reserved} if allocated else None,
    }


def _changed_settings(history: History) -> dict[str, list[dict[str, Any]]]:
    """Flags whose value changed when the run went on from a checkpoint: each value, and its first step."""
    changed: dict[str, list[dict[str, Any]]] = {}
    for name in history.legs[0]["settings"] if history.legs else ():
        values = [(leg["step"] + 1, leg["settings"].get(name)) for leg in history.legs]
        kept = [pair for pair, before in zip(values, [None, *values]) if before is None or pair[1] != before[1]]
        if len(kept) > 1:
            changed[name] = [{"from_step": step, "value": value} for step, value in kept]
    return changed


def _settings(run: Run) -> dict[str, Any]:
    """The run's settings by flag name, as JSON takes them."""
    return {name: value for name, value in sorted(run.settings.plain().items()) if name != "hub_token"}


def _image(pixels: torch.Tensor) -> Image.Image:
    """A crop ``(3, h, w)`` in [-1, 1] as an image; pairs ``(2, 3, h, w)`` side by side."""
    return as_picture(pixels if pixels.ndim == 3 else torch.cat(list(pixels), dim=-1))
