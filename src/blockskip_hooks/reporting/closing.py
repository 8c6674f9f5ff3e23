"""The last screen of a run: what came out, how to use it, how alike it is, and where to look."""

from __future__ import annotations

import itertools
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.metrics import subject_fidelity
from ..inference.image_encoders import SubjectImageEncoder
from ..loading.lora_files import WEIGHTS_NAME
from ..training.comfyui import COMFYUI_NAME
from ..training.merged import MERGED_NAME
from ..training.run import Run
from ..utils.formatting import format_bytes, format_seconds
from .outputs import PICTURE_NAME, Images, RunOutputs, training_photos


def closing_words(outputs: RunOutputs, report: Mapping[str, Any], before: Images, after: Images) -> str:
    """The last lines a user sees.

    Args:
        outputs: What a run leaves.
        report: From its :meth:`RunOutputs.report`.
        before: The base model's images of each final prompt.
        after: The trained model's images of each final prompt.
    """
    run, losses, steps = outputs.run, report["train"]["loss"], report["train"]["steps"]
    seconds = sum(stage["seconds"] for stage in report["stages"])
    loss = f", loss {losses[-1]:.4f}" if losses else ""
    files = {"LoRA": WEIGHTS_NAME}
    if run.settings.save_format == "comfyui":
        files["ComfyUI"] = COMFYUI_NAME
    if run.settings.export_merged:
        files["Merged"] = MERGED_NAME
    files["Page"] = "report.html"
    if before and after:
        files["Picture"] = PICTURE_NAME
    # With whole paths, unlike the page, which may be shared: these lines are to run here.
    snippet = outputs.snippet(run.settings.hub_model_id or str(run.output_dir), str)
    return "\n".join(
        [
            f"Trained {steps} steps in {format_seconds(seconds)}{loss}, {_memory(report)}.",
            *(f"{name:<9}{run.output_dir / file}" for name, file in files.items()),
            *_alike(run, training_photos(outputs.maker), before, after),
            "Use it:",
            # As Python takes them when they are copied: at the beginning of a line.
            *filter(None, snippet.splitlines()),
        ]
    )


def open_page(folder: Path) -> str | None:
    """Show a run's page in the browser of this machine; what to say where there is none."""
    page = (folder / "report.html").resolve()
    return None if webbrowser.open(page.as_uri()) else f"No browser could be started here; open {page}."


def _memory(report: Mapping[str, Any]) -> str:
    stages = report["stages"]
    if any(stage["peak_device_bytes"] is not None for stage in stages):
        return f"at most {format_bytes(max(stage['peak_device_bytes'] or 0 for stage in stages))} on the device"
    return f"the process at most {format_bytes(max(stage['peak_rss_bytes'] for stage in stages))}"


def _alike(run: Run, photos: Sequence[Image.Image], before: Images, after: Images) -> list[str]:
    """How alike images and photos are: measured on the embedded model, whose encoder is there; else how to measure."""
    if not after:
        return []
    if not run.embedded:
        return ["Measure  blockskip evaluate compares images with your photos (--help)"]
    encoder = SubjectImageEncoder()
    embedded = encoder.embed(photos)
    before_training, after_training = (
        float(subject_fidelity(encoder.embed(list(itertools.chain(*images))), embedded).mean())
        for images in (before, after)
    )
    # No image can be expected to be more like the photos than they are like each other.
    pairs = len(photos) * (len(photos) - 1)
    among = float((embedded @ embedded.T).sum() - len(photos)) / pairs if pairs else 0.0
    most = f"photos to each other {among:.2f}" if pairs else "1 is the same"
    return [f"Alike    images to photos {before_training:.2f} before, {after_training:.2f} after; {most}"]
