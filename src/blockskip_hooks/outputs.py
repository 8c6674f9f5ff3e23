"""What a finished run leaves behind: report, page, model card, and the upload."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping
from typing import Any

from huggingface_hub import create_repo, upload_folder
from PIL import Image

from .comfyui import COMFYUI_NAME
from .errors import first_line
from .lora import WEIGHTS_NAME
from .model_card import usage_snippet, write_model_card
from .monitor import versions, write_json
from .report import ReportImages, contact_sheet, write_report
from .residual_store import folder_digest
from .run import Run
from .trainer import Trainer


MAX_PHOTOS = 8
CROPS_SHOWN = 12
SHEET_PIXELS = 128


def run_report(run: Run, trainer: Trainer, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of ``run_report.json``; the schema is in the README."""
    store = trainer.store
    uses_residuals = run.skips
    packed = run.stores_residuals and run.args.residual_dtype == "float8"
    return {
        "schema": 1,
        "model": run.model_name,
        "family": run.family.name,
        "base_revision": run.args.revision,
        "weights": "sha256:" + folder_digest(run.family.model_path / "transformer"),
        "skip": run.selection.as_dict(),
        "patch": {
            "mode": run.patch.mode,
            "min": run.patch.min_size,
            "max": run.patch.max_size,
            "training_resolution": run.patch.training_resolution,
        },
        "stages": stages,
        "train": {
            "steps": trainer.step,
            "samples": trainer.step * trainer.samples_per_step,
            "step_seconds_median": statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
            "loss": trainer.losses,
            "quantization": run.quantization.name if run.quantization else None,
        },
        "residuals": {
            "mode": run.config.residuals if uses_residuals else None,
            "records": trainer.records_made,
            "bytes": store.bytes_written if store else 0,
            "stretches": len(trainer.stretches) if store else 0,
            "dtype": "float8_e4m3fn" if packed else str(trainer.maker.dtype).removeprefix("torch."),
        },
        "versions": versions(),
    }


def training_pictures(trainer: Trainer) -> tuple[list[Image.Image], list[tuple[str, Image.Image]]]:
    """The instance photos, and a few samples as the model saw them, from low to high timestep."""
    plan, photos = trainer.maker.plan, trainer.maker.sources["instance"].photos
    samples = [plan.sample(index) for index in range(max(trainer.step, 1) * trainer.samples_per_step)[:256]]
    by_timestep = sorted(samples, key=lambda sample: -sample.timestep_index)
    shown = by_timestep[:: max(1, len(by_timestep) // CROPS_SHOWN)][:CROPS_SHOWN]
    crops = [
        (
            f"t = {float(plan.timesteps[sample.timestep_index]):.0f}, patch {sample.patch_size} px",
            _picture(trainer.maker.crop(sample)),
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
    run: Run,
    trainer: Trainer,
    report: Mapping[str, Any],
    plan: Mapping[str, Any],
    command: str,
    before: list[list[Image.Image]],
    after: list[list[Image.Image]],
) -> None:
    """Write ``run_report.json``, ``report.html``, ``before_after.png`` and the model card with its images."""
    write_json(run.output_dir / "run_report.json", report)
    photos, crops = training_pictures(trainer)
    if before and after:
        before_row, after_row = ([image for images in rows for image in images] for rows in (before, after))
        width = min(len(after_row), MAX_PHOTOS)
        contact_sheet(
            [[photo.resize(after_row[0].size) for photo in photos[:width]], before_row[:width], after_row[:width]],
            ["training photos", "before", "after"],
            run.output_dir / "before_after.png",
            scale=max(1, SHEET_PIXELS // after_row[0].width),
        )
    settings = {name: value for name, value in sorted(vars(run.args).items()) if name != "given"}
    snippet = usage_snippet(
        run.model_name,
        run.args.hub_model_id or run.args.output_dir,
        next((prompt for prompt in (*run.final_prompts, *run.prompts, run.args.instance_prompt) if prompt), "a photo"),
        snippet_kwargs(run),
        # Always named: transformers and diffusers have different defaults, which do not mix.
        str(trainer.maker.dtype).removeprefix("torch."),
        embedded=run.embedded,
    )
    write_report(
        run.output_dir,
        report,
        plan,
        images=ReportImages(photos=photos, crops=crops, prompts=run.final_prompts, before=before, after=after),
        command=command,
        settings=settings,
        snippet=snippet,
    )
    images = [image for images in after for image in images]
    prompts = [prompt for prompt, images in zip(run.final_prompts, after) for _ in images]
    write_model_card(
        run.output_dir,
        repo_id=run.args.hub_model_id or run.output_dir.name,
        base_model=run.model_name,
        base_license=_license(run),
        instance_prompt=run.args.instance_prompt,
        validation_prompt=prompts,
        images=images,
        run_report=report,
        train_text_encoder=run.args.train_text_encoder,
        tags=run.family.tags,
        snippet=snippet,
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


def _license(run: Run) -> str | None:
    """The licence in the model folder's card, if it has one."""
    card = run.family.model_path / "README.md"
    if run.embedded or not card.is_file():
        return "apache-2.0" if run.embedded else None
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(card).data.get("license")
    except ValueError:
        return None


def push_to_hub(run: Run) -> str:
    """Upload the run's results, without checkpoints and records, and return the repository's id.

    Raises:
        ValueError: if that fails; the results are on disk.
    """
    args = run.args
    wanted = args.hub_model_id or run.output_dir.resolve().name
    try:
        repo_id = create_repo(repo_id=wanted, exist_ok=True, token=args.hub_token).repo_id
        upload_folder(
            repo_id=repo_id,
            folder_path=str(run.output_dir),
            commit_message="End of training",
            allow_patterns=[
                WEIGHTS_NAME,
                COMFYUI_NAME,
                "README.md",
                "*.png",
                "plan.json",
                "run_report.json",
                "report.html",
            ],
            token=args.hub_token,
        )
    except Exception as error:  # the hub client and the network below it raise their own kinds
        raise ValueError(
            f"The upload to {wanted} failed ({first_line(error)}). Everything is in {run.output_dir}; log in by "
            f"`hf auth login` and run: hf upload {wanted} {run.output_dir}"
        ) from error
    return repo_id


__all__ = ["push_to_hub", "run_report", "training_pictures", "write_outputs"]
