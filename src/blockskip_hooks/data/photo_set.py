"""The photos of a run in memory, and the crops that are trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..utils.errors import UserError
from .buckets import nearest_bucket
from .photo import Photo, with_progress


INTERPOLATION = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    # Pillow's own nearest neighbour takes pixel centres, which is what other libraries call the exact one.
    "nearest_exact": Image.Resampling.NEAREST,
}
"""Pillow's filters by the names of ``--image_interpolation_mode``."""


class PhotoSet:
    """Decoded photos in memory, as 8-bit RGB that just covers the largest crop; the originals are not kept.

    A condition image is scaled to the size of its photo, so that the same crop of both shows the same place.

    Args:
        photos: What `scan_photos` or `load_dataset_photos` returned.
        max_size: Side in pixels of the largest square that can be cropped.
        buckets: Heights and widths of the largest crops, in place of that square; each photo belongs to the one whose
            aspect ratio is nearest to its own.
        interpolation: One of `INTERPOLATION`, for scaling photos and patches.

    Raises:
        UserError: if there is no photo or ``max_size`` is not positive.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        max_size: int,
        *,
        buckets: Sequence[tuple[int, int]] = (),
        interpolation: str = "lanczos",
    ) -> None:
        if not photos:
            raise UserError("PhotoSet needs at least one photo.")
        if max_size < 1:
            raise UserError(f"PhotoSet.max_size is {max_size}; give a number of pixels >= 1.")
        self.max_size = max_size
        self.shapes = tuple(buckets) or ((max_size, max_size),)
        self._photos = list(photos)
        self._resampling = INTERPOLATION[interpolation]
        self._buckets: list[int] = []
        self._pixels: dict[tuple[int, int], list[np.ndarray]] = {}
        for number, photo in enumerate(with_progress(photos, "Loading photos")):
            image = photo.decode()
            self._buckets.append(nearest_bucket((image.height, image.width), self.shapes))
            self._scale(image, number, self._buckets[number])
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._photos)

    @property
    def are_pairs(self) -> bool:
        """Whether every photo has a condition image."""
        return all(photo.condition is not None for photo in self._photos)

    def name(self, index: int) -> str:
        """Name of the photo, see `Photo`."""
        return self._photos[index].name

    def caption(self, index: int) -> str | None:
        """Caption of the photo, or None where the instance prompt is to be used."""
        return self._photos[index].caption

    def bucket(self, index: int) -> int:
        """Number of the photo's bucket."""
        return self._buckets[index]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels after scaling."""
        height, width, _ = self._pixels[index, self._buckets[index]][0].shape
        return height, width

    def digest(self, index: int) -> str:
        """SHA-256 (hex) of the size and the scaled pixels: equal digests mean equal crops, whatever the file name."""
        if index not in self._digests:
            pictures = self._pixels[index, self._buckets[index]]
            content = b"".join(repr(pixels.shape).encode() + pixels.tobytes() for pixels in pictures)
            self._digests[index] = hashlib.sha256(content).hexdigest()
        return self._digests[index]

    def crop(
        self,
        index: int,
        *,
        patch_size: int | tuple[int, int],
        output_size: int | tuple[int, int],
        top: float = 0.0,
        left: float = 0.0,
        flip: bool = False,
        center: bool = False,
        bucket: int | None = None,
    ) -> torch.Tensor:
        """Cut a patch, resize it with antialiasing and mirror it if asked.

        The positions are fractions so that a sample plan need not know picture sizes: a uniform draw from [0, 1)
        gives every possible offset the same chance.

        Args:
            index: Which photo.
            patch_size: Height and width of the patch in pixels of the scaled photo, at most its bucket's; one number
                for a square.
            output_size: Height and width of the result in pixels, or one number; a patch of this size is not
                resampled.
            top: Vertical position in [0, 1); the offset is ``floor(top * (height - patch height + 1))``.
            left: Horizontal position in [0, 1), likewise.
            flip: Mirror the result left to right.
            center: Take the patch from the middle; ``top`` and ``left`` are then not used.
            bucket: Number of the bucket whose crop the photo is to cover; by default its own.

        Returns:
            float32 tensor of shape (3, output height, output width) with values in [-1, 1]; of pairs of shape
            (2, 3, output height, output width), the photo and its condition image.

        Raises:
            UserError: if a size or a position is out of range.
        """
        bucket = self._buckets[index] if bucket is None else bucket
        patch, output = (size if isinstance(size, tuple) else (size, size) for size in (patch_size, output_size))
        limits = self.shapes[bucket]
        if not all(1 <= length <= limit for length, limit in zip(patch, limits)):
            raise UserError(f"patch_size is {patch_size}; it must be from 1 to that of the bucket, {limits}.")
        if min(output) < 1:
            raise UserError(f"output_size is {output_size}; give a number of pixels >= 1.")
        if (index, bucket) not in self._pixels:
            self._scale(self._photos[index].decode(), index, bucket)
        pictures = self._pixels[index, bucket]
        y, x = (
            _center_offset(length, side) if center else _offset(fraction, length, side)
            for fraction, length, side in zip((top, left), pictures[0].shape[:2], patch)
        )
        crops = [self._resized(pixels[y : y + patch[0], x : x + patch[1]], output, flip) for pixels in pictures]
        return torch.stack(crops) if self._photos[index].condition else crops[0]

    def _resized(self, cut: np.ndarray, size: tuple[int, int], flip: bool) -> torch.Tensor:
        """A cut of this height and width in pixels, mirrored if asked, as a tensor."""
        if cut.shape[:2] != size:
            # Cropped first: Pillow's `resize(box=...)` lets pixels outside the box into its edges.
            image = Image.fromarray(np.ascontiguousarray(cut))
            cut = np.asarray(image.resize(size[::-1], self._resampling))
        if flip:
            cut = cut[:, ::-1]
        tensor = torch.from_numpy(cut.transpose(2, 0, 1).astype(np.float32))
        # These operations in this order are what ToTensor and Normalize([0.5], [0.5]) do, to the last bit.
        return tensor.div_(255).sub_(0.5).div_(0.5).contiguous()

    def _scale(self, image: Image.Image, index: int, bucket: int) -> None:
        """Keep the photo at the smallest size that covers the bucket's crop, with its own aspect ratio."""
        height, width = self.shapes[bucket]
        scale = max(height / image.height, width / image.width)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        condition = self._photos[index].condition
        images = [image, *([condition.decode()] if condition else [])]
        self._pixels[index, bucket] = [
            np.array(image if image.size == size else image.resize(size, self._resampling)) for image in images
        ]


def _offset(fraction: float, length: int, patch_size: int) -> int:
    if not 0 <= fraction < 1:
        raise UserError(f"A crop position is {fraction}; it must be at least 0 and below 1.")
    return math.floor(fraction * (length - patch_size + 1))


def _center_offset(length: int, patch_size: int) -> int:
    # Half a pixel is rounded as torchvision's CenterCrop does it, to the even neighbour.
    return round((length - patch_size) / 2)
