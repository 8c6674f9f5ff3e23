"""``report.html``: one self-contained page about a run."""

from __future__ import annotations

import base64
import functools
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ..utils.files import write_text
from ..utils.formatting import format_bytes, format_seconds, format_setting
from ..utils.pictures import flattened
from .charts import draw_harm, draw_losses, draw_losses_by_timestep, loss_curve
from .hub import nearby, without_folders


# Longest side of an embedded picture. Base64 of untouched camera photos would make a page of a hundred megabytes.
RESULT_PIXELS = 1024
PHOTO_PIXELS = 512
# Pictures up to this side are shown with hard pixel edges: smoothing would hide what the model really made.
PIXEL_ART_SIDE = 128

_SECRET_KEY = re.compile(r"(^|_)(hub_token|api_key|password|secret)$")
_SECRET_TEXT = re.compile(r"(--(?:hub_token|\w*api_key|\w*password|\w*secret)[=\s]+)\S+|\bhf_\w{20,}")


@dataclass(frozen=True)
class ReportImages:
    """Pictures of a run.

    Args:
        photos: The training photos.
        crops: Training samples as the model saw them, each with a caption such as "t = 731, patch 56 px".
        prompts: Validation prompts.
        before: Images of the base model, one list for each prompt; may be empty.
        after: Images with the trained LoRA, one list for each prompt.
        step: The step after which ``after`` was made; ``None`` for the last.
    """

    photos: Sequence[Image.Image] = ()
    crops: Sequence[tuple[str, Image.Image]] = ()
    prompts: Sequence[str] = ()
    before: Sequence[Sequence[Image.Image]] = ()
    after: Sequence[Sequence[Image.Image]] = ()
    step: int | None = None


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    src: str
    alt: str
    width: int
    height: int
    pixelated: bool


def write_report(
    output_dir: str | Path,
    run_report: Mapping[str, Any],
    plan: Mapping[str, Any],
    *,
    images: ReportImages,
    command: str,
    snippet: str,
    settings: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[float]] | None = None,
    total_steps: int | None = None,
) -> Path:
    """Write report.html into ``output_dir``. Parts that are missing from the inputs are left out of the page.

    Args:
        output_dir: Folder of the run.
        run_report: Contents of run_report.json. Tokens in its settings are masked.
        plan: Contents of plan.json.
        images: Pictures to show.
        command: Command line that repeats the run. Tokens in it are masked, and folders shortened.
        snippet: Python code that loads and runs the LoRA, see `usage_snippet`.
        settings: The settings to list; by default all of the report's.
        curves: Harm of masking 0, 1, ... blocks of the ends ``"leading"`` and ``"trailing"``, where it was measured.
        total_steps: Number of steps of the whole run, for the page of a run that has not ended.

    Returns:
        Path of the page.
    """
    output_dir = Path(output_dir)
    model = str(run_report.get("model") or "path/to/base-model")
    # The page may be shared; where things lie on this machine stays in run_report.json.
    run_report, plan = without_folders(dict(run_report)), without_folders(dict(plan))
    command, shown_command = command.strip(), _with_near_paths(command)
    shown_settings = without_folders(dict(settings or run_report.get("settings") or {}))
    settings = run_report.get("settings") or {}
    skip = run_report.get("skip") or plan.get("skip") or {}
    train = run_report.get("train") or {}
    changed = train.get("changed_settings") or {}
    loss = loss_curve(train.get("loss") or [])
    timesteps, timestep_colours = draw_losses_by_timestep(train.get("loss_by_timestep") or {})
    content = {
        "run": run_report,
        "plan": plan,
        "model": Path(model).name if Path(model).is_absolute() else model,
        "instance_prompt": settings.get("instance_prompt"),
        "rank": settings.get("rank"),
        "skip": _skip(skip),
        "harm": draw_harm(curves or {}, {end: skip.get(end) or 0 for end in ("leading", "trailing")}),
        "patch": run_report.get("patch") or plan.get("patch") or {},
        "train": train,
        "stages": _stages(run_report.get("stages") or [], plan.get("stages") or []),
        "loss": loss,
        "loss_chart": draw_losses(loss) if loss else "",
        "timestep_chart": timesteps,
        "timestep_colours": timestep_colours,
        "results": _results(images),
        "results_step": images.step,
        "total_steps": total_steps,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "photos": [_picture(photo, f"Training photo {i}", PHOTO_PIXELS) for i, photo in enumerate(images.photos, 1)],
        "crops": [(text, _picture(crop, f"Training sample, {text}", PHOTO_PIXELS)) for text, crop in images.crops],
        "settings": [
            (key, _mask(key, format_setting(value, changed.get(key, ()))))
            for key, value in shown_settings.items()
            if value is not None
        ],
        "command": [word for word in re.split(r"(\s+)", _SECRET_TEXT.sub(r"\1***", shown_command)) if word],
        "shortened": shown_command != command,
        "snippet": snippet,
    }
    write_text(output_dir / "report.html", _environment().get_template("report.html").render(content))
    return output_dir / "report.html"


def _with_near_paths(command: str) -> str:
    """A command line without the folders of this machine, see `nearby`."""
    words = []
    for word in shlex.split(command):
        name, given, value = word.partition("=")
        words.append(f"{name}={nearby(value)}" if given and Path(value).is_absolute() else nearby(word))
    return shlex.join(words)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        # Not PackageLoader: importlib.resources also finds the templates of a zipped package.
        loader=jinja2.FunctionLoader(
            lambda name: (resources.files(__package__) / "templates" / name).read_text(encoding="utf-8")
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _unbroken(format_bytes), "seconds": _unbroken(format_seconds)}
    return environment


def _picture(image: Image.Image, alt: str, longest: int) -> Picture:
    image = flattened(image)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small = max(image.size) <= 256
    # Small pictures are exact, and as PNG still no bigger than a JPEG's artefacts are worth.
    image.save(buffer, "PNG", optimize=True) if small else image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    src = f"data:image/{'png' if small else 'jpeg'};base64,{data}"
    return Picture(src, alt, image.width, image.height, max(image.size) <= PIXEL_ART_SIDE)


def _results(images: ReportImages) -> list[dict[str, Any]]:
    def pictures(kind: str, prompt: str, row: Sequence[Image.Image]) -> list[Picture]:
        numbers = [f", image {number}" if len(row) > 1 else "" for number in range(1, len(row) + 1)]
        return [_picture(image, f"{kind}{number}: {prompt}", RESULT_PIXELS) for number, image in zip(numbers, row)]

    results = []
    for prompt, before, after in zip_longest(images.prompts, images.before, images.after):
        prompt, before, after = prompt or "no prompt", before or [], after or []
        if before or after:
            sides = {"before": pictures("Base model", prompt, before), "after": pictures("With LoRA", prompt, after)}
            results.append({"prompt": prompt, **sides})
    return results


def _skip(skip: Mapping[str, Any]) -> dict[str, Any] | None:
    if not skip.get("blocks"):
        return None
    blocks, leading, trailing = skip["blocks"], skip.get("leading") or 0, skip.get("trailing") or 0
    origin = {
        "flag": "chosen with --skip_blocks",
        "table": f"from the table {skip.get('table') or 'shipped with the package'}",
        "rule": "from the general rule, as no table has this model",
    }
    spans = (("leading", 0, leading), ("kept", leading, blocks - trailing), ("trailing", blocks - trailing, blocks))
    return {
        "blocks": blocks,
        "leading": leading,
        "trailing": trailing,
        "kept": blocks - leading - trailing,
        "ratio": (leading + trailing) / blocks,
        "cells": ["kept" if leading <= index < blocks - trailing else "skipped" for index in range(blocks)],
        "spans": [{"name": name, "first": first, "count": end - first, "last": end - 1} for name, first, end in spans],
        "origin": origin.get(str(skip.get("source")), ""),
    }


def _stages(measured: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Measured and planned figures side by side, in the order of the run, planned-only stages last."""
    by_name = {stage["name"]: stage for stage in planned}
    names = list(dict.fromkeys([stage["name"] for stage in measured] + list(by_name)))
    if not names:
        return None
    runs = {stage["name"]: stage for stage in measured}
    total = sum(stage.get("seconds") or 0 for stage in measured)
    rows = []
    for name in names:
        run, plan = runs.get(name, {}), by_name.get(name, {})
        rows.append(
            {
                "name": name,
                "seconds": run.get("seconds"),
                "share": (run.get("seconds") or 0) / total if total else 0,
                "rss": run.get("peak_rss_bytes"),
                "device": run.get("peak_device_bytes"),
                "simulated": plan.get("peak_device_bytes"),
                "parameters": plan.get("parameter_bytes"),
                "activations": plan.get("activation_bytes"),
            }
        )
    columns = ("seconds", "rss", "device", "simulated")
    peaks = {key: max((row[key] or 0 for row in rows), default=0) or None for key in ("rss", "device", "simulated")}
    shown = {key for key in columns if any(row[key] is not None for row in rows)}
    return {"rows": rows, "total": total or None, "peaks": peaks, "shown": shown}


def _unbroken(formatter: Callable[[float | None], str]) -> Callable[[float | None], str]:
    # A line break between a number and its unit is hard to read.
    return lambda value: formatter(value).replace(" ", "\u00a0")


def _mask(key: str, value: Any) -> str:
    return "***" if _SECRET_KEY.search(key) else _SECRET_TEXT.sub(r"\1***", str(value))
