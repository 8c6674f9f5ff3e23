"""The masking search: what images lose when the text is masked in runs of blocks (DiT-BlockSkip, section 3.4, Eq. 2).

Every variant of an image starts from the same noise, and variants share forwards: one batch holds many of them, each
with masked blocks of its own. What is finished is on disk, so that a killed search goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from ..families import Family, PromptEmbeds
from ..inference.generate import generate_images
from ..inference.image_encoders import ImageEncoder
from ..inference.lora_files import load_adapter
from ..selection import best_pairs, number_of_skipped
from ..transformer import DiTBlockSkipTransformer
from ..utils.errors import UserError
from ..utils.files import save_tensors
from ..utils.progress import progress_bar
from .masking import text_masked_by_row


BlockRun = tuple[int, int]
"""A run of masked blocks: its first one and the one after its last; ``(0, 0)`` masks nothing."""

NOTHING: BlockRun = (0, 0)
RATIOS = (0.3, 0.4, 0.5)
"""Skip ratios around whose pairs a coarse search is refined: those of the paper."""


@dataclass(frozen=True)
class Subject:
    """What the images of a search show.

    Attributes:
        name: Its name in results.
        prompt: The prompt of its images.
        lora: File or folder of the LoRA that learnt it; ``None`` for the base model.
    """

    name: str
    prompt: str
    lora: Path | None = None


@dataclass
class MaskedImages:
    """Makes images with runs of blocks masked and keeps what an encoder sees in them.

    Attributes:
        family: The model's family.
        model: The transformer; LoRAs of subjects are loaded into it.
        vae: The VAE.
        encoder: Turns images into vectors.
        embeds: Embeddings of the subjects' prompts.
        negative: Embeddings of the negative prompt, for guided pipelines.
        pipeline_kwargs: Size, steps and guidance of the images.
        batch_size: Images in one forward.
        store: The file that finished ones are kept in; one for each set of settings.
        most: How many images the search makes at most, finished ones included.
    """

    family: Family
    model: DiTBlockSkipTransformer
    vae: ModelMixin
    encoder: ImageEncoder
    embeds: dict[str, PromptEmbeds]
    negative: PromptEmbeds | None
    pipeline_kwargs: dict[str, Any]
    batch_size: int
    store: Path
    most: int = 0
    vectors: dict[str, torch.Tensor] = field(init=False)
    bar: tqdm = field(init=False)

    def __post_init__(self) -> None:
        try:
            self.vectors = load_file(self.store) if self.store.is_file() else {}
        except SafetensorError as error:
            raise UserError(f"{self.store} is damaged ({error}); remove it to make its images anew.") from error
        self.bar = progress_bar("Masked images, at most", self.most, "image", initial=len(self.vectors))

    def measure(self, subjects: Sequence[Subject], seeds: Sequence[int], runs: Iterable[BlockRun]) -> None:
        """Make what is missing of the images of every subject, seed and masked run, and of the unmasked ones."""
        wanted = [NOTHING, *runs]
        for subject in subjects:
            missing = [(seed, run) for seed in seeds for run in wanted if _key(subject, seed, run) not in self.vectors]
            for start in range(0, len(missing), self.batch_size):
                batch = missing[start : start + self.batch_size]
                embedded = self.encoder.embed(self.images(subject, batch))
                for (seed, run), vector in zip(batch, embedded, strict=True):
                    self.vectors[_key(subject, seed, run)] = vector.clone()
                self._save()
                self.bar.update(len(batch))

    def images(self, subject: Subject, variants: Sequence[tuple[int, BlockRun]]) -> list[Image.Image]:
        """One image for each pair of a seed and a masked run."""
        self._adapt(subject)
        rows = [range(*run) for _, run in variants]
        with text_masked_by_row(self.model.transformer, self.family, rows):
            (images,) = generate_images(
                [self.embeds[subject.prompt]],
                family=self.family,
                model=self.model,
                vae=self.vae,
                negative=self.negative,
                seeds=[seed for seed, _ in variants],
                pipeline_kwargs=self.pipeline_kwargs,
            )
        return images

    def distances(self, subjects: Sequence[Subject], seeds: Sequence[int], run: BlockRun) -> torch.Tensor:
        """D = 1 - cosine between the images with and without a masked run, ``(subjects, seeds)``."""
        pairs = [
            [self.vectors[_key(subject, seed, masked)] for masked in (NOTHING, run)]
            for subject in subjects
            for seed in seeds
        ]
        cosines = torch.stack([first @ second for first, second in pairs])
        return (1 - cosines).reshape(len(subjects), len(seeds))

    def _adapt(self, subject: Subject) -> None:
        """Let the subject's LoRA, or none, take part."""
        transformer: Any = self.model.transformer
        loaded = getattr(transformer, "peft_config", {})
        if subject.lora is None:
            if loaded:
                transformer.disable_lora()
            return
        if subject.name not in loaded:
            load_adapter(self.family, transformer, self.vae, subject.lora, subject.name)
        transformer.enable_lora()
        transformer.set_adapter(subject.name)

    def _save(self) -> None:
        self.store.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.vectors, self.store)


def _key(subject: Subject, seed: int, run: BlockRun) -> str:
    return f"{subject.name}/{seed}/{run[0]}-{run[1]}"


def leading_run(num_masked: int) -> BlockRun:
    """The first blocks."""
    return (0, num_masked)


def trailing_run(num_masked: int, num_blocks: int) -> BlockRun:
    """The last blocks."""
    return (num_blocks - num_masked, num_blocks) if num_masked else NOTHING


def inner_runs(num_blocks: int, lengths: Collection[int], stride: int = 1) -> list[BlockRun]:
    """Every run of consecutive blocks of these lengths that begins on the stride."""
    return [
        (start, start + length) for length in sorted(lengths) for start in range(0, num_blocks - length + 1, stride)
    ]


@dataclass(frozen=True)
class Curves:
    """D over the number of masked blocks, from either end.

    Attributes:
        leading: D of the first n blocks masked, ``(N, subjects, seeds)``, n from 0 to N-1.
        trailing: D of the last m blocks masked, likewise.
        measured_leading: The n whose images were made; between them D is interpolated.
        measured_trailing: Likewise.
    """

    leading: torch.Tensor
    trailing: torch.Tensor
    measured_leading: tuple[int, ...]
    measured_trailing: tuple[int, ...]

    @property
    def pairs(self) -> dict[int, tuple[int, int]]:
        """The least harmful pair for each k (Eq. 2)."""
        return best_pairs(*(curve.mean((1, 2)).tolist() for curve in (self.leading, self.trailing)))


def search_curves(
    images: MaskedImages, subjects: Sequence[Subject], seeds: Sequence[int], num_blocks: int, stride: int = 1
) -> Curves:
    """Measure both curves, at every ``stride``-th number of blocks first and then closer around the chosen pairs.

    Args:
        images: Makes the images.
        subjects: The subjects, j of Eq. 2.
        seeds: Seeds of each subject's images.
        num_blocks: N.
        stride: 1 measures every number of blocks.
    """
    coarse = {*range(stride, num_blocks, stride), num_blocks - 1}
    wanted = {"leading": set(coarse), "trailing": set(coarse)}
    step = stride
    while True:
        runs = [leading_run(n) for n in sorted(wanted["leading"])]
        runs += [trailing_run(m, num_blocks) for m in sorted(wanted["trailing"])]
        images.measure(subjects, seeds, runs)
        curves = _read_curves(images, subjects, seeds, num_blocks, wanted)
        if step == 1:
            return curves
        step = -(-step // 2)
        for ratio in RATIOS:
            leading, trailing = curves.pairs[number_of_skipped(ratio, num_blocks)]
            for end, chosen in (("leading", leading), ("trailing", trailing)):
                wanted[end] |= {n for n in (chosen - step, chosen, chosen + step) if 0 < n < num_blocks}


def _read_curves(
    images: MaskedImages,
    subjects: Sequence[Subject],
    seeds: Sequence[int],
    num_blocks: int,
    wanted: Mapping[str, Collection[int]],
) -> Curves:
    """The curves by what this round of the search wants: more may be there from another search, or a killed one."""
    ends = []
    for end, run_of in (("leading", leading_run), ("trailing", lambda number: trailing_run(number, num_blocks))):
        known = [0, *sorted(wanted[end])]
        values = torch.stack([images.distances(subjects, seeds, run_of(n)) for n in known])
        # Nothing masked is no difference at all, whatever rounding says.
        values[0] = 0.0
        ends.append((_interpolated(known, values, num_blocks), tuple(known[1:])))
    (leading, measured_leading), (trailing, measured_trailing) = ends
    return Curves(leading, trailing, measured_leading, measured_trailing)


def _interpolated(known: Sequence[int], values: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Values ``(known, ...)`` drawn out linearly to every number from 0 to ``num_blocks - 1``."""
    positions = torch.arange(num_blocks)
    right = torch.searchsorted(torch.tensor(known), positions).clamp(min=1)
    low, high = torch.tensor(known)[right - 1], torch.tensor(known)[right]
    weight = ((positions - low) / (high - low)).reshape(-1, *(1,) * (values.ndim - 1))
    return values[right - 1].lerp(values[right], weight)
