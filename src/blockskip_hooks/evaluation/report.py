"""What an evaluation leaves: the contents of results.json, a markdown table, and a contact sheet."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ..inference.image_encoders import ImageEncoder
from ..inference.streamed_model import describe_images
from ..utils.digests import file_digest
from ..utils.errors import UserError
from ..utils.machine import versions
from ..utils.pictures import SheetRow, contact_sheet
from .images import EvaluationRequest
from .metrics import DIVERSITY, Evaluation
from .prompt_lists import EvaluationPrompt


ABOUT = {
    "retrieved": "share of images nearest to the photos of their own subject among all embedded subjects; few share a "
    "class, so another drawing of the class often counts",
    "background_right": "share of images whose background is the prompt's, by the embedded classifier",
    "class_right": "share of images of the prompt's class, by the embedded classifier",
    DIVERSITY: "mean distance of images of one prompt: 2 - 2 cos of the first encoder's features at each place, "
    "averaged over places and depths; low if the model knows one picture",
}

# Of the contact sheet: pixels of an image, rows below each other, and photos at least as far as there are some.
CELL, ROWS_PER_PANEL, PHOTOS_SHOWN = 192, 13, 4


def describe_measure(name: str) -> str:
    """What a measure is, in a line."""
    if name.endswith("-T"):
        return f"cosine of {name[:-2]}'s embeddings of image and prompt"
    return ABOUT.get(name, f"mean cosine of {name.removesuffix('-I')}'s embeddings of image and photos of the subject")


def result_row(request: EvaluationRequest, name: str, evaluation: Evaluation, files: Sequence[Path]) -> dict[str, Any]:
    """One LoRA's entry of ``results`` in results.json.

    Args:
        request: What was evaluated.
        name: The LoRA's name.
        evaluation: What was measured.
        files: The file of each image.
    """
    lora = request.loras[name]
    keys = [(number, seed) for number in range(len(request.prompts)) for seed in request.seeds]
    return {
        "name": name,
        "lora": None if lora is None else str(lora),
        "lora_digest": None if lora is None else "sha256:" + file_digest(lora),
        "aggregate": evaluation.aggregate(),
        "diversity_by_prompt": [evaluation.diversity.get(prompt.text) for prompt in request.prompts],
        "images": [
            {"prompt": number, "seed": seed, "file": file.relative_to(request.folder).as_posix(), "measures": values}
            for (number, seed), file, values in zip(keys, files, evaluation.images, strict=True)
        ],
    }


def results_document(
    request: EvaluationRequest,
    encoders: Mapping[str, ImageEncoder],
    photos: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    command: str,
) -> dict[str, Any]:
    """The contents of results.json.

    Args:
        request: What was evaluated.
        encoders: Encoders by label.
        photos: Names of the subject's photos.
        rows: From :func:`result_row`.
        command: The command line.
    """
    settings = request.settings
    measures = list(dict.fromkeys(name for row in rows for name in row["aggregate"]))
    return {
        "schema": 1,
        "model": settings.model_name,
        "family": settings.family.name,
        "settings": describe_images(settings.family, settings.pipeline_kwargs, settings.dtype),
        "photos": list(photos),
        "prompts": [asdict(prompt) for prompt in request.prompts],
        "seeds": list(request.seeds),
        "encoders": {label: encoder.name for label, encoder in encoders.items()},
        "encoder_quality": {label: encoder.quality for label, encoder in encoders.items() if encoder.quality},
        "diversity_encoder": next(iter(encoders)),
        "measures": {name: describe_measure(name) for name in measures},
        "interval": "bootstrap 95 %: prompts drawn first, then images of each",
        "results": list(rows),
        "date": datetime.date.today().isoformat(),
        "command": command,
        "versions": versions(),
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The table of results.md: one row for each LoRA, means with their intervals."""
    names = list(document["measures"])
    lines = [
        f"{document['model']}, {len(document['prompts'])} prompts x {len(document['seeds'])} images, "
        f"{len(document['photos'])} photos; means with bootstrap 95 % intervals",
        "",
        f"| | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for row in document["results"]:
        cells = []
        for name in names:
            value = row["aggregate"].get(name)
            text = "" if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            cells.append(text)
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    lines += ["", *(f"encoder_quality: {label} {text}" for label, text in document["encoder_quality"].items())]
    return "\n".join(lines).rstrip() + "\n"


def earlier_loras(folder: Path) -> list[str]:
    """Names of the LoRAs in the results.json of an earlier evaluation; none where there is no such file.

    Raises:
        UserError: if it is the file of something else, which an evaluation would replace.
    """
    file = folder / "results.json"
    try:
        return [str(row["name"]) for row in json.loads(file.read_text(encoding="utf-8"))["results"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} is of no evaluation and would be replaced; give another --output_dir.") from error


def draw_contact_sheet(
    photos: Sequence[Image.Image],
    images: Sequence[Sequence[Image.Image]],
    prompts: Sequence[EvaluationPrompt],
    seeds: Sequence[int],
    notes: Sequence[Sequence[str]],
    file: Path,
) -> None:
    """Write a PNG: the photos above, then a row for each prompt with an image of each seed.

    Args:
        photos: The subject's photos.
        images: For each prompt an image of each seed.
        prompts: The prompts.
        seeds: The seeds.
        notes: What was measured of each prompt's images; it follows the prompt.
        file: The PNG.
    """
    shown = photos[: max(len(seeds), PHOTOS_SHOWN)]
    counted = f"{len(photos)}" if len(shown) == len(photos) else f"{len(shown)} of {len(photos)}"
    captions = [f"seed {seed}" for seed in seeds]
    rows = [SheetRow(f"photos of the subject ({counted})", shown)]
    for number, (prompt, row, measured) in enumerate(zip(prompts, images, notes, strict=True), 1):
        rows.append(SheetRow(f"{number}. {prompt.text}: {', '.join(measured)}", row, captions))
    contact_sheet(rows, file, side=CELL, panels=math.ceil(len(rows) / ROWS_PER_PANEL))


def prompt_notes(evaluation: Evaluation, prompts: Sequence[EvaluationPrompt]) -> list[list[str]]:
    """What was measured of each prompt's images: means, and the diversity."""
    notes = []
    for prompt in prompts:
        rows = [values for text, values in zip(evaluation.prompts, evaluation.images) if text == prompt.text]
        means = {
            name: sum(known) / len(known)
            for name in rows[0]
            for known in [[row[name] or 0.0 for row in rows if row[name] is not None]]
            if known
        }
        if prompt.text in evaluation.diversity:
            means[DIVERSITY] = evaluation.diversity[prompt.text]
        notes.append([f"{name.replace('_', ' ')} {value:.2f}" for name, value in means.items()])
    return notes
