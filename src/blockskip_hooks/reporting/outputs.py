"""What a run leaves behind: report, page, model card, and the upload."""

from __future__ import annotations

import inspect
import json
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, metadata_load
from PIL import Image

from ..lora import WEIGHTS_NAME
from ..planning.simulation import empty_model
from ..residuals.store import folder_digest
from ..training.comfyui import COMFYUI_NAME
from ..training.history import History
from ..training.merged import MERGED_NAME
from ..training.records import RecordSource
from ..training.run import Run
from ..training.validation import Images
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import first_line
from ..utils.files import write_json
from ..utils.formatting import format_seconds
from ..utils.machine import describe_machine, versions
from ..utils.monitor import StageMonitor
from .model_card import License, read_license, usage_snippet, write_model_card
from .page import ReportImages, contact_sheet, write_report


MAX_PHOTOS = 8
CROPS_SHOWN = 12
SHEET_PIXELS = 128
UPLOADED = (WEIGHTS_NAME, "README.md", "plan.json", "run_report.json", COMFYUI_NAME)
"""What is uploaded beside the images of the card, as far as the run has made it."""


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that its reports tell of.

    Attributes:
        run: The run.
        monitor: Measured its stages.
        device: Where the model trains.
        model: The transformer, LoRA added.
        records: Where the batches come from.
        history: The steps so far.
        num_processes: Processes that share the work.
    """

    run: Run
    monitor: StageMonitor
    device: torch.device
    model: DiTBlockSkipTransformer
    records: RecordSource
    history: History
    num_processes: int

    @property
    def samples_per_step(self) -> int:
        return self.run.samples_per_step(self.num_processes)

    @property
    def dtype(self) -> str:
        """Name of the dtype of frozen weights."""
        return str(self.records.maker.dtype).removeprefix("torch.")


def run_report(parts: RunParts, made: tuple[int, int] | None = None) -> dict[str, Any]:
    """The contents of ``run_report.json``; the schema is in the README.

    Args:
        parts: The parts of the run.
        made: Records that all processes have made, and their bytes; ``None`` before the end, when there is no exported
            LoRA to tell of either.
    """
    run, history = parts.run, parts.history
    uses_residuals = run.skips
    packed = run.stores_residuals and run.settings.residual_dtype == "float8"
    return {
        "schema": 1,
        "model": run.model_name,
        "family": run.family.name,
        "created_at": parts.monitor.started.isoformat(timespec="seconds"),
        "base_revision": run.settings.revision,
        "weights": "sha256:" + folder_digest(run.family.model_path / "transformer"),
        "skip": run.selection.as_dict(),
        "patch": {
            "mode": run.patch.mode,
            "min": run.patch.min_size,
            "max": run.patch.max_size,
            "training_resolution": run.patch.training_resolution,
        },
        "stages": parts.monitor.as_list(),
        "train": {
            "steps": history.step,
            "samples": history.step * parts.samples_per_step,
            "step_seconds_median": statistics.median(history.step_seconds) if history.step_seconds else None,
            "loss": history.losses,
            "loss_by_timestep": history.loss_by_timestep,
            "step_seconds": history.step_seconds,
            "step_memory": _step_memory(history),
            "dtype": parts.dtype,
            "quantization": run.quantization.name if run.quantization else None,
        },
        "lora": _lora(parts) if made else None,
        "residuals": {
            "mode": run.config.residuals if uses_residuals else None,
            "records": made[0] if made else 0,
            "bytes": made[1] if made else 0,
            "stretches": len(parts.records.stretches) if run.uses_store else 0,
            "dtype": "float8_e4m3fn" if packed else parts.dtype,
        },
        "settings": {name: value for name, value in sorted(run.settings.plain().items()) if name != "hub_token"},
        "machine": describe_machine(parts.device),
        "versions": versions(),
    }


def _step_memory(history: History) -> dict[str, list[int]] | None:
    """Bytes on the device after each step; ``None`` without a device."""
    if not history.step_memory:
        return None
    allocated, reserved = zip(*history.step_memory)
    return {"allocated_bytes": list(allocated), "reserved_bytes": list(reserved)}


def _lora(parts: RunParts) -> dict[str, int]:
    """How large the transformer's LoRA is, and the whole transformer with it."""
    run = parts.run
    trainable = sum(p.numel() for p in parts.model.transformer.parameters() if p.requires_grad)
    # In training skipped blocks have no parameters.
    whole = empty_model(run.transformer_config, run.family.transformer_class(run.transformer_config))
    return {
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in whole.parameters()) + trainable,
        "file_bytes": (run.output_dir / WEIGHTS_NAME).stat().st_size,
    }


def training_pictures(parts: RunParts) -> tuple[list[Image.Image], list[tuple[str, Image.Image]]]:
    """The instance photos, and a few samples as the model saw them, from low to high timestep."""
    maker = parts.records.maker
    plan, photos = maker.plan, maker.sources["instance"].photos
    samples = [plan.sample(index) for index in range(max(parts.history.step, 1) * parts.samples_per_step)[:256]]
    by_timestep = sorted(samples, key=lambda sample: -sample.timestep_index)
    shown = by_timestep[:: max(1, len(by_timestep) // CROPS_SHOWN)][:CROPS_SHOWN]
    crops = [
        (
            f"t = {float(plan.timesteps[sample.timestep_index]):.0f}, patch {sample.patch_size} px",
            _picture(maker.crop(sample)),
        )
        for sample in shown
    ]
    whole = [
        _picture(photos.crop(i, patch_size=(shape := photos.shapes[photos.bucket(i)]), output_size=shape, center=True))
        for i in range(min(len(photos), MAX_PHOTOS))
    ]
    return whole, crops


def _picture(pixels: Any) -> Image.Image:
    """A tensor ``(3, h, w)`` in [-1, 1] as an image."""
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def write_outputs(
    parts: RunParts,
    report: Mapping[str, Any],
    plan: Mapping[str, Any],
    command: str,
    before: Images,
    after: Images,
) -> None:
    """Write ``run_report.json``, ``report.html``, ``before_after.png`` and the model card with its images."""
    run = parts.run
    write_json(run.output_dir / "run_report.json", report)
    photos, crops = training_pictures(parts)
    if before and after:
        before_row, after_row = ([image for images in rows for image in images] for rows in (before, after))
        width = min(len(after_row), MAX_PHOTOS)
        contact_sheet(
            [[photo.resize(after_row[0].size) for photo in photos[:width]], before_row[:width], after_row[:width]],
            ["training photos", "before", "after"],
            run.output_dir / "before_after.png",
            scale=max(1, SHEET_PIXELS // after_row[0].width),
        )
    images = ReportImages(photos=photos, crops=crops, prompts=run.final_prompts, before=before, after=after)
    result = run.settings.hub_model_id or run.settings.output_dir
    snippet = _snippet(parts, run.model_name, result)
    _write_page(run, report, plan, command, images, snippet)
    write_model_card(
        run.output_dir,
        report,
        [(prompt, image) for prompt, row in zip(run.final_prompts, after) for image in row],
        repo_id=run.settings.hub_model_id or run.output_dir.name,
        base_license=License("apache-2.0") if run.embedded else read_license(run.family.model_path, run.model_name),
        tags=run.family.tags,
        # Where the base model lies on this machine is of no use to those who find the card on the Hub.
        snippet=_snippet(parts, _nameless(run.model_name), result) if run.settings.push_to_hub else snippet,
    )


def write_progress(
    parts: RunParts, plan: Mapping[str, Any], command: str, shown: tuple[int, list[str], Images, Images] | None
) -> None:
    """Write ``report.html`` of a run that goes on: what there is so far, without making anything for it.

    Args:
        parts: The parts of the run.
        plan: Its plan.
        command: The command that started it.
        shown: The latest validation images, with their step and prompts.
    """
    run, report = parts.run, run_report(parts)
    # What all processes have made is added up at the end.
    report["residuals"] = {"mode": report["residuals"]["mode"]}
    photos, crops = training_pictures(parts)
    step, prompts, before, after = shown or (None, [], [], [])
    images = ReportImages(photos=photos, crops=crops, prompts=prompts, before=before, after=after, step=step)
    snippet = _snippet(parts, run.model_name, run.output_dir / f"checkpoint-{parts.history.step}")
    _write_page(run, report, plan, command, images, snippet, total_steps=parts.records.stretches.num_steps)


def _write_page(
    run: Run,
    report: Mapping[str, Any],
    plan: Mapping[str, Any],
    command: str,
    images: ReportImages,
    snippet: str,
    total_steps: int | None = None,
) -> None:
    write_report(
        run.output_dir,
        report,
        plan,
        images=images,
        command=command,
        snippet=snippet,
        curves={"leading": run.table.leading, "trailing": run.table.trailing} if run.table else None,
        total_steps=total_steps,
    )


def _snippet(parts: RunParts, model: str, lora: str | Path) -> str:
    run = parts.run
    prompts = (*run.final_prompts, *run.prompts, run.settings.instance_prompt)
    return usage_snippet(
        model,
        lora,
        next((prompt for prompt in prompts if prompt), "a photo"),
        snippet_kwargs(run),
        # Always named: transformers and diffusers have different defaults, which do not mix.
        parts.dtype,
        embedded=run.embedded,
    )


def snippet_kwargs(run: Run) -> dict[str, Any]:
    """Arguments of a pipeline call, beside the prompt, that gives images like the report's."""
    kwargs = {**run.family.prompt_inputs(""), **run.pipeline_kwargs}
    stock = inspect.signature(run.family.pipeline_class.__call__).parameters
    return {
        name: value
        for name, value in kwargs.items()
        if name != "prompt" and not (name in stock and stock[name].default == value)
    }


def open_repository(run: Run) -> str:
    """Make the repository of ``--push_to_hub``, or find it, and return its full name.

    Done before the work begins: a token that may not write should not be found out after hours.

    Raises:
        ValueError: if there is none that can be written.
    """
    wanted = _repository(run)
    try:
        return HfApi(token=run.settings.hub_token).create_repo(wanted, exist_ok=True).repo_id
    except Exception as error:  # the hub client and the network below it raise their own kinds
        raise ValueError(
            f"--push_to_hub cannot open the repository {wanted} ({_hub_reason(error)}); log in by `hf auth login`, "
            "give --hub_model_id OWNER/NAME, or leave --push_to_hub out."
        ) from error


def push_to_hub(run: Run) -> str:
    """Upload the LoRA, its card with the card's images, and the figures; return the repository's id.

    ``report.html`` and ``before_after.png`` stay here, as they show the training photos; so do checkpoints, records
    and logs. Folders of this machine are left out of the figures.

    Raises:
        ValueError: if that fails; the results are on disk.
    """
    repo_id, folder = _repository(run), run.output_dir
    widget = (metadata_load(folder / "README.md") or {}).get("widget") or []
    files: dict[str, Path | bytes] = {entry["output"]["url"]: folder / entry["output"]["url"] for entry in widget}
    files |= {name: folder / name for name in UPLOADED if (folder / name).is_file()}
    for name in ("plan.json", "run_report.json"):
        figures = _nameless(json.loads((folder / name).read_text(encoding="utf-8")))
        files[name] = (json.dumps(figures, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        HfApi(token=run.settings.hub_token).create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="End of training",
        )
    except Exception as error:  # as above
        raise ValueError(
            f"The upload to {repo_id} failed ({_hub_reason(error)}). Everything is in {folder}; log in by "
            f"`hf auth login` and run: hf upload {repo_id} {folder} --include "
            f"{' '.join(map(shlex.quote, [*UPLOADED, 'image_*.png']))}"
        ) from error
    return repo_id


def closing_words(run: Run, report: dict[str, Any]) -> str:
    """The last lines a user sees: what came out, and how to use it."""
    losses = report["train"]["loss"]
    loss = f", loss {losses[-1]:.4f}" if losses else ""
    seconds = sum(stage["seconds"] for stage in report["stages"])
    files = {"LoRA": WEIGHTS_NAME}
    if run.settings.save_format == "comfyui":
        files["ComfyUI"] = COMFYUI_NAME
    if run.settings.export_merged:
        files["Merged"] = MERGED_NAME
    files["Report"] = "report.html"
    width = max(map(len, files)) + 2
    return "\n".join(
        [
            f"Trained {report['train']['steps']} steps in {format_seconds(seconds)}{loss}.",
            *(f"{f'{name}:':<{width}}{run.output_dir / file}" for name, file in files.items()),
        ]
    )


def _nameless(value: Any) -> Any:
    """``value`` as others may see it: of every path that starts at this machine's root only the last part."""
    if isinstance(value, dict):
        return {key: _nameless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nameless(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _hub_reason(error: Exception) -> str:
    """The first line of what the client says, and what the hub itself said, if it did."""
    said = (getattr(error, "server_message", None) or "").strip().rstrip(".")
    return f"{first_line(error)}: {said}" if said and said not in first_line(error) else first_line(error)


def _repository(run: Run) -> str:
    return run.settings.hub_model_id or run.output_dir.resolve().name


__all__ = [
    "closing_words",
    "open_repository",
    "push_to_hub",
    "run_report",
    "training_pictures",
    "write_outputs",
    "write_progress",
]
