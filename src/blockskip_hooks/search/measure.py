"""From a model to its selection table: what is searched, with what, and the file that comes out."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..blocks import list_blocks
from ..config import BlockSkipConfig
from ..embedded import embedded_subjects
from ..families import Family
from ..inference.image_encoders import load_image_encoder
from ..inference.lora_files import lora_file
from ..inference.streamed_model import (
    block_parameters,
    describe_images,
    encode_for_images,
    images_at_once,
    load_image_transformer,
)
from ..loading.component_config import load_config
from ..selection import best_pairs
from ..utils.digests import file_digest, fingerprint, folder_digest
from ..utils.machine import versions
from .masking_search import (
    NOTHING,
    RATIOS,
    MaskedImages,
    Subject,
    inner_runs,
    leading_run,
    search_curves,
    trailing_run,
)


DEFAULT_STEPS = 6
DEFAULT_SEEDS = (0, 1)

CLASS_PROMPTS = {
    name: f"a photo of a {name}"
    for name in ("dog", "cat", "backpack", "clock", "teapot", "toy robot", "vase", "sneaker")
}


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Settings of a search.

    Attributes:
        family: The model's family, on the model's folder.
        model_name: What the user calls the model.
        subjects: What its images show.
        encoder: Name of the image encoder, see :func:`~blockskip_hooks.inference.image_encoders.load_image_encoder`.
        folder: Where finished images' vectors are kept.
        seeds: Seeds of each subject's images.
        pipeline_kwargs: Size, steps and guidance of the images.
        stride: Of the numbers of masked blocks, every which is measured at first.
        window_lengths: Lengths of the runs of blocks that are masked for the heat map.
        batch_size: Images in one forward; ``None`` for what their size suggests.
        dtype: Dtype of the models.
        device: Where they run.
        spans: Leading and trailing blocks that are read from the checkpoint as they run, where no LoRA may be;
            ``None`` for all of the base model's when they would fill more than half of what is free.
    """

    family: Family
    model_name: str
    subjects: tuple[Subject, ...]
    encoder: str
    folder: Path
    seeds: tuple[int, ...] = DEFAULT_SEEDS
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    stride: int = 1
    window_lengths: tuple[int, ...] = ()
    batch_size: int | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    spans: BlockSkipConfig | None = None

    @property
    def transformer_folder(self) -> Path:
        return self.family.model_path / "transformer"

    @property
    def images_at_once(self) -> int:
        """Images in one forward."""
        return images_at_once(self.pipeline_kwargs, self.batch_size)

    def describe(self) -> dict[str, Any]:
        """Everything that the images depend on."""
        return {
            **describe_images(self.family, self.pipeline_kwargs, self.dtype),
            "subjects": [
                [subject.name, subject.prompt, subject.lora and file_digest(lora_file(subject.lora))]
                for subject in self.subjects
            ],
            "encoder": self.encoder,
        }


def class_subjects(*, embedded: bool) -> tuple[Subject, ...]:
    """Subjects for the base model without any fine-tuning: classes of things."""
    if embedded:
        return tuple(Subject(name, subject["class_prompt"]) for name, subject in embedded_subjects().items())
    return tuple(Subject(name, prompt) for name, prompt in CLASS_PROMPTS.items())


def default_window_lengths(num_blocks: int) -> tuple[int, ...]:
    """Lengths for the heat map: one block, and up to a third of them."""
    return tuple(sorted({1, *(max(num_blocks // part, 1) for part in (9, 6, 3))}))


def open_search(request: SearchRequest) -> MaskedImages:
    """Load what a search needs; finished images of the same settings are found again.

    Raises:
        UserError: if the encoder or the model cannot be loaded.
    """
    encoder = load_image_encoder(request.encoder, request.device, ["offline"])
    family = request.family
    prompts = [subject.prompt for subject in request.subjects]
    embeds, negative = encode_for_images(
        family, prompts, request.pipeline_kwargs, dtype=request.dtype, device=request.device
    )
    model = load_image_transformer(
        family,
        dtype=request.dtype,
        device=request.device,
        spans=request.spans,
        takes_lora=any(subject.lora is not None for subject in request.subjects),
    )
    return MaskedImages(
        family=family,
        model=model,
        vae=family.load_vae(request.dtype, request.device),
        encoder=encoder,
        embeds=embeds,
        negative=negative,
        pipeline_kwargs=request.pipeline_kwargs,
        batch_size=request.images_at_once,
        store=request.folder / f"masked-{fingerprint(request.describe())[:16]}.safetensors",
        most=count_images(request, len(list_blocks(model.transformer, family.block_stacks))),
    )


def count_images(request: SearchRequest, num_blocks: int) -> int:
    """How many images a search makes at most, finished ones included."""
    ends = {*range(request.stride, num_blocks, request.stride), num_blocks - 1}
    runs = {leading_run(n) for n in ends} | {trailing_run(n, num_blocks) for n in ends}
    runs |= {NOTHING, *inner_runs(num_blocks, request.window_lengths, request.stride)}
    # Each halving of the stride looks at three numbers for each ratio, at either end.
    closer = 2 * min(3 * len(RATIOS) * (request.stride - 1).bit_length(), num_blocks - 1 - len(ends))
    return (len(runs) + closer) * len(request.subjects) * len(request.seeds)


def measure_table(images: MaskedImages, request: SearchRequest, command: str) -> dict[str, Any]:
    """Run the search and return the contents of ``selection.json``.

    Args:
        images: From :func:`open_search`.
        request: The same settings.
        command: The command line that ran it.
    """
    num_blocks = len(list_blocks(images.model.transformer, images.family.block_stacks))
    windows = inner_runs(num_blocks, request.window_lengths, request.stride)
    with closing(images.bar):
        curves = search_curves(images, request.subjects, request.seeds, num_blocks, request.stride)
        images.measure(request.subjects, request.seeds, windows)
    leading = _curve(curves.leading, curves.measured_leading)
    trailing = _curve(curves.trailing, curves.measured_trailing)
    loras = sum(subject.lora is not None for subject in request.subjects)
    kind = f"{loras} LoRAs" if loras else f"the base model, {len(request.subjects)} class prompts"
    config = load_config(request.transformer_folder)
    return {
        "schema": 1,
        "model": request.model_name,
        "names": [request.model_name],
        "num_blocks": num_blocks,
        "source": "measured",
        "about": f"text masked in {kind} x {len(request.seeds)} seeds, encoder {images.encoder.name}",
        "weights": folder_digest(request.transformer_folder),
        "date": datetime.date.today().isoformat(),
        "search": {
            "subjects": [
                {"name": s.name, "prompt": s.prompt, "lora": None if s.lora is None else s.lora.name}
                for s in request.subjects
            ],
            "seeds": list(request.seeds),
            "encoder": images.encoder.name,
            "pipeline": request.pipeline_kwargs,
            "stride": request.stride,
            "dtype": str(request.dtype).removeprefix("torch."),
        },
        "curves": {"leading": leading, "trailing": trailing},
        "windows": [
            {"first": first, "length": stop - first, **_spread(distances)}
            for first, stop in windows
            for distances in [images.distances(request.subjects, request.seeds, (first, stop))]
        ],
        "pairs": {str(skipped): list(pair) for skipped, pair in best_pairs(leading["mean"], trailing["mean"]).items()},
        "block_parameters": block_parameters(images.family, config),
        "command": command,
        "versions": versions(),
    }


def _spread(distances: torch.Tensor) -> dict[str, float]:
    """Mean of ``(subjects, seeds)`` distances, and their standard deviations over subjects and over seeds."""
    return {
        "mean": round(distances.mean().item(), 6),
        "subject_spread": round(distances.mean(1).std(correction=0).item(), 6),
        "seed_spread": round(distances.std(1, correction=0).mean().item(), 6),
    }


def _curve(values: torch.Tensor, measured: Sequence[int]) -> dict[str, list[Any]]:
    """A curve ``(N, subjects, seeds)`` as lists over the number of masked blocks."""
    spreads = [_spread(distances) for distances in values]
    return {**{name: [spread[name] for spread in spreads] for name in spreads[0]}, "measured": list(measured)}
