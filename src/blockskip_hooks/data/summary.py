"""What a run begins with: which photos, which captions, and how their sizes compare with the training size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .buckets import nearest_bucket
from .captions import METADATA, unused_captions
from .folder import left_out
from .photo import Photo, names


# Of a photo's area: a crop that shows less than this of it loses most of the subject.
_LEAST_SHOWN = 0.5


@dataclass(frozen=True)
class PhotoSummary:
    """The photos of a run, counted.

    Attributes:
        used: Photos that are trained on.
        left_out: Names of pictures beside them that are not, by what to do about it.
        captions: Photos by where their captions are from: an ending, a metadata file, or a dataset's column.
        unused_captions: Files that look like captions and are of no photo.
        smallest: Height and width in pixels of the photo with the fewest pixels.
        largest: Of the one with the most.
        shapes: Heights and widths in pixels of the largest crops.
        enlarged: Names of photos that are smaller than their crop.
        mostly_cut: Names of photos of which a crop shows less than half.
        are_pairs: Whether they have condition images.
    """

    used: int
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    captions: Mapping[str, int] = field(default_factory=dict)
    unused_captions: Sequence[str] = ()
    smallest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)
    shapes: Sequence[tuple[int, int]] = ()
    enlarged: Sequence[str] = ()
    mostly_cut: Sequence[str] = ()
    are_pairs: bool = False

    def describe(self, source: str, prompt: str) -> str:
        """Two or three lines for the first screen.

        Args:
            source: Folder or dataset of the photos.
            prompt: Prompt of photos without a caption.
        """
        others = [name for found in self.left_out.values() for name in found]
        kind = " with condition images" if self.are_pairs else ""
        photos = f'{self.used}{kind} from {source}, prompt "{prompt}"' + (
            f"; left out: {names(others)}" if others else ""
        )
        captions = "none" if self.unused_captions else ""
        if self.captions:
            sources = ", ".join(f"{count} from {kind}" for kind, count in self.captions.items())
            captions = f"{sum(self.captions.values())} of {self.used} ({sources})"
        if self.unused_captions:
            captions += f"; not used: {names(self.unused_captions)}"
        sizes = _pixels(self.smallest)
        if self.smallest != self.largest:
            sizes += f" to {_pixels(self.largest)}"
        trained = _pixels(self.shapes[0]) if len(self.shapes) == 1 else f"{len(self.shapes)} aspect ratios"
        lines = [f"Photos   {photos}", f"Captions {captions}", f"Sizes    {sizes} px, scaled and cropped to {trained}"]
        return "\n".join(line for line in lines if captions or not line.startswith("Captions"))

    def warnings(self) -> list[str]:
        """What is likely a mistake, given the training size: a line of each kind."""
        return [
            f"{problem}: {len(found)} of {self.used} photos ({names(found)}); {advice}."
            for found, problem, advice in (
                (
                    self.enlarged,
                    "Smaller than the training size, so that they train blurred",
                    "use larger ones, or lower --resolution",
                ),
                (
                    self.mostly_cut,
                    "So long that a crop shows less than half of them",
                    "crop them to the subject, or give --aspect_ratio_buckets",
                ),
            )
            if found
        ]


def summarize_photos(photos: Sequence[Photo], shapes: Sequence[tuple[int, int]]) -> PhotoSummary:
    """Count what a run begins with.

    Args:
        photos: Checked photos, all of one folder or dataset.
        shapes: Heights and widths in pixels of the largest crops: one, or one for each aspect-ratio bucket.
    """
    folder = photos[0].path.parent if photos[0].path is not None else None
    sizes = [photo.size for photo in photos if photo.size is not None]
    enlarged, mostly_cut = [], []
    for photo, (height, width) in zip(photos, sizes, strict=True):
        crop = shapes[nearest_bucket((height, width), shapes)]
        scale = max(crop[0] / height, crop[1] / width)
        if scale > 1:
            enlarged.append(photo.name)
        if crop[0] * crop[1] < _LEAST_SHOWN * height * width * scale**2:
            mostly_cut.append(photo.name)
    return PhotoSummary(
        used=len(photos),
        left_out=left_out(folder) if folder else {},
        captions=Counter(_kind(photo.caption_source) for photo in photos if photo.caption_source),
        unused_captions=unused_captions(photos, folder) if folder else (),
        smallest=min(sizes, key=lambda size: size[0] * size[1]),
        largest=max(sizes, key=lambda size: size[0] * size[1]),
        shapes=tuple(shapes),
        enlarged=enlarged,
        mostly_cut=mostly_cut,
        are_pairs=photos[0].condition is not None,
    )


def _kind(source: str) -> str:
    """Where a caption is from, without the photo's own name."""
    return source if source in METADATA or not Path(source).suffix else Path(source).suffix.lower()


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
