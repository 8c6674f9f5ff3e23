"""Photos: found in a folder or a dataset, checked before any model loads, kept small, and cropped on request."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps, UnidentifiedImageError

from ..cli.errors import first_line, one_line
from ..utils.progress import listed


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Photos people do have, which Pillow does not read everywhere: leaving them out must not go unnoticed.
_UNSUPPORTED_SUFFIXES = (".avif", ".dng", ".heic", ".heif", ".jxl")
# The shorter side is scaled to the training size, so a sliver of a picture would need gigabytes.
_MAX_ASPECT_RATIO = 16
_PROGRESS_FROM = 51
# Tokenizers see a few hundred words; more is another kind of file.
_MAX_CAPTION_BYTES = 1 << 16

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


@dataclass(frozen=True)
class Photo:
    """One picture that has not been decoded yet.

    Args:
        name: File name, or row number in a dataset; unique within a set and stable between runs.
        caption: Text of the picture, or None where the instance prompt is to be used.
        opener: Returns a fresh, possibly lazy PIL image of any mode.
        path: The file, or None for a dataset row.
        size: Upright height and width in pixels, once the picture has been checked.
    """

    name: str
    caption: str | None
    opener: Callable[[], Image.Image] = field(repr=False, compare=False)
    path: Path | None = None
    size: tuple[int, int] | None = None

    def decode(self) -> Image.Image:
        """Decode the whole picture: first frame, upright, 8-bit RGB, transparency on white.

        Raises:
            ValueError: if the picture is no file of its folder, or a sliver that cannot be scaled to a square.
            Exception: whatever Pillow raises for damaged files: OSError, SyntaxError, ValueError, ...
        """
        if self.path is not None:
            check_inside(self.path)
        with warnings.catch_warnings():
            # Pillow warns from 90 megapixels on and refuses from 180: the first is a large photo, not an attack.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with self.opener() as image:
                image.load()
                rgb = _to_rgb(ImageOps.exif_transpose(image))
        if max(rgb.size) > _MAX_ASPECT_RATIO * min(rgb.size):
            raise ValueError(f"{rgb.width} x {rgb.height} pixels is too narrow")
        return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, keeping the picture's brightness and showing transparency as white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_wide(np.asarray(image)).convert("RGB")
    if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_from_wide(values: np.ndarray) -> Image.Image:
    """Scale a 16-bit, 32-bit or float grey picture to 8 bits; Pillow's own conversion clips it to white."""
    pixels = np.nan_to_num(values.astype(np.float64))
    peak = float(pixels.max())
    if values.dtype.kind == "f":
        white = 1.0 if peak <= 1 else 255.0 if peak <= 255 else peak
    else:
        white = max(65535.0, peak)
    return Image.fromarray(np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8))


def check_inside(path: Path, folder: Path | None = None) -> None:
    """Check that a file is an ordinary one whose content lies in its folder.

    A folder of photos is often someone else's, and what is in it ends up in reports and uploads: a link in it must not
    bring in other files of this machine. Links of the hub's cache lead to the blobs beside its snapshots.

    Args:
        path: The file.
        folder: The folder; by default the one that the path names.

    Raises:
        ValueError: if it is a link that leads elsewhere, or no file.
    """
    folder = (path.parent if folder is None else folder).resolve()
    # resolve() also ends at what is not there.
    real = path.resolve()
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.name == "snapshots"), None)
    allowed = [folder] if snapshots is None else [folder, snapshots.parent / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError("a link that leads out of the folder; copy the file there")
    if not path.exists():
        raise ValueError("a link to a file that is not there")
    # Opening a pipe would wait for ever.
    if not path.is_file():
        raise ValueError("not a file")


def image_paths(folder: Path) -> list[Path]:
    """Picture files directly in ``folder``, by suffix, sorted by name; anything hidden or of another kind is left."""
    return sorted(
        (
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()
        ),
        key=lambda path: path.name,
    )


def scan_photos(folder: Path, *, flag: str = "--instance_data_dir", show_progress: bool = True) -> list[Photo]:
    """Find the photos of a folder and decode each once, so that a damaged file stops the run before it starts.

    A ``.txt`` file beside a picture, of the same stem, is its caption. Other files and folders do not matter.

    Args:
        folder: Folder of pictures; subfolders are not entered.
        flag: Command-line flag that named the folder, for the messages.
        show_progress: Show a bar when there are many photos; only one process should.

    Raises:
        ValueError: if the folder is missing or holds no picture, or listing every picture or caption that cannot
            be read.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{flag} {folder} {problem}; name the folder that holds the photos.")
    paths = image_paths(folder)
    if not paths:
        supported = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        unreadable = sorted({path.suffix.lower() for path in folder.iterdir()} & set(_UNSUPPORTED_SUFFIXES))
        hint = (
            f"; convert the {' '.join(suffix[1:] for suffix in unreadable)} files to jpg or png" if unreadable else ""
        )
        raise ValueError(f"{flag} {folder}: no images found in this folder (supported: {supported}){hint}.")
    left_out = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _UNSUPPORTED_SUFFIXES)
    if left_out:
        logger.warning("%s %s: left out %s; convert to jpg or png to use them.", flag, folder, ", ".join(left_out))

    photos = [Photo(path.name, None, partial(Image.open, path), path) for path in paths]
    photos = _verify(photos, f"{flag} {folder}", show_progress)
    return _with_captions(photos, f"{flag} {folder}")


def _with_captions(photos: Sequence[Photo], where: str) -> list[Photo]:
    """Add the texts beside the photos, or raise one ValueError that names all that cannot be read."""
    broken, captioned = [], []
    for photo in photos:
        assert photo.path is not None
        try:
            captioned.append(replace(photo, caption=_read_caption(photo.path.with_suffix(".txt"))))
        except (OSError, ValueError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else _one_line(error)
            broken.append(f"{one_line(photo.path.with_suffix('.txt').name)} is {reason}")
    if broken:
        count = "1 caption" if len(broken) == 1 else f"{len(broken)} captions"
        raise ValueError(f"{where}: {count} cannot be read: {', '.join(broken)}; save as UTF-8 or remove.")
    return captioned


def _read_caption(path: Path) -> str | None:
    if not path.is_file() and not path.is_symlink():
        return None
    check_inside(path)
    if path.stat().st_size > _MAX_CAPTION_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes long")
    # "-sig": editors on Windows put a byte order mark first, which would become part of the prompt.
    text = path.read_text(encoding="utf-8-sig").strip()
    if "\0" in text:
        # Letters of UTF-16 without its mark pass for UTF-8.
        raise ValueError("not UTF-8 text")
    return text or None


def load_dataset_photos(
    dataset_name: str,
    config_name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    cache_dir: str | None = None,
    *,
    show_progress: bool = True,
) -> list[Photo]:
    """Photos of the train split of a hub dataset or a local image folder with ``metadata.jsonl``, in dataset order.

    Args:
        dataset_name: Hub id or local folder, as `datasets.load_dataset` takes it.
        config_name: Configuration of the dataset, or None for its only one.
        image_column: Column with the pictures.
        caption_column: Column with one text per picture, or None: every picture gets the instance prompt.
        cache_dir: Where downloads are kept, or None for the usual place.
        show_progress: Show a bar when there are many photos; only one process should.

    Raises:
        ValueError: if the dataset cannot be loaded, a column is missing or of the wrong kind, or listing every row
            that cannot be decoded.
    """
    import datasets  # slow to import, and only this path needs it

    where = f"--dataset_name {dataset_name}"
    try:
        splits = datasets.load_dataset(dataset_name, config_name, cache_dir=cache_dir)
    except Exception as error:  # builders, file systems and the hub client all raise their own kinds
        raise ValueError(
            f"{where} cannot be loaded ({_root_reason(error)}); check the id or folder, "
            "--dataset_config_name and access."
        ) from error
    if "train" not in splits:
        raise ValueError(f"{where} has no 'train' split, only {', '.join(splits)}; name a dataset that has one.")
    table = splits["train"]
    columns = ", ".join(table.column_names)
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column is not None and column not in table.column_names:
            raise ValueError(f"{flag} '{column}' is not in {where}; it has {columns}.")
    if not isinstance(table.features[image_column], datasets.Image):
        raise ValueError(f"--image_column '{image_column}' of {where} does not hold images; it has {columns}.")
    if len(table) == 0:
        raise ValueError(f"{where} has no rows; name a dataset with at least one image.")

    captions = [None] * len(table) if caption_column is None else list(table[caption_column])
    if any(caption is not None and not isinstance(caption, str) for caption in captions):
        raise ValueError(f"--caption_column '{caption_column}' of {where} does not hold text; it has {columns}.")
    # A row may name a file in place of holding its bytes: only of the dataset's folder, or of what was downloaded.
    roots = [dataset_name] if Path(dataset_name).is_dir() else [HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    rows = _Rows(
        table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False)),
        table.features[image_column].decode_example,
        tuple(Path(root) for root in (*roots, *filter(None, [cache_dir]))),
    )
    photos = [
        Photo(f"{row:06d}", (caption or "").strip() or None, partial(rows.image, row))
        for row, caption in enumerate(captions)
    ]
    return _verify(photos, where, show_progress)


@dataclass(frozen=True)
class _Rows:
    """A dataset's images: a table of what is stored of them, how that is decoded, and where files of them may be."""

    table: Sequence
    decode: Callable[[dict], Image.Image]
    roots: tuple[Path, ...]

    def image(self, row: int) -> Image.Image:
        (stored,) = self.table[row].values()
        if stored is None:
            raise ValueError("no image in this row")
        path = stored["path"]
        if stored["bytes"] is None and "://" not in path:
            real = Path(path).resolve()
            if not any(real.is_relative_to(root.resolve()) for root in self.roots):
                raise ValueError("a path that leads out of the dataset; copy the file there")
        return self.decode(stored)


def _root_reason(error: BaseException) -> str:
    """What the first of a chain of errors says; the libraries' own says no more than that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _one_line(error)


def _verify(photos: Sequence[Photo], where: str, show_progress: bool) -> list[Photo]:
    """Decode every photo, add its size, and raise one ValueError that names all that fail."""
    broken, checked = [], []
    for photo in _progress(photos, "Checking photos", show_progress):
        try:
            width, height = photo.decode().size
            # Web pages are full of them, and a download of photos brings them along.
            if width * height == 1:
                raise ValueError("a single pixel")
            checked.append(replace(photo, size=(height, width)))
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...: all mean the same here
            broken.append(f"{one_line(photo.name)} ({_reason(photo, error)})")
    if broken:
        count = "1 image" if len(broken) == 1 else f"{len(broken)} images"
        raise ValueError(f"{where}: {count} cannot be read: {', '.join(broken)}; replace or remove.")
    return checked


def nearest_bucket(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """Number of the shape whose aspect ratio is nearest to that of ``size``, both (height, width)."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(shapes)), key=lambda number: abs(math.log(shapes[number][0] / shapes[number][1]) - ratio))


def _reason(photo: Photo, error: Exception) -> str:
    if photo.path is not None and photo.path.is_file() and photo.path.stat().st_size == 0:
        return "empty file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"  # Pillow's text repeats the whole path
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return one_line(first_line(error))


def _progress(photos: Sequence[Photo], title: str, show: bool) -> Iterator[Photo]:
    return listed(photos, title, "photo", total=len(photos), shown=show and len(photos) >= _PROGRESS_FROM)


class PhotoSet:
    """Decoded photos in memory, as 8-bit RGB that just covers the largest crop; the originals are not kept.

    Args:
        photos: What `scan_photos` or `load_dataset_photos` returned.
        max_size: Side in pixels of the largest square that can be cropped.
        buckets: Heights and widths of the largest crops, in place of that square; each photo belongs to the one whose
            aspect ratio is nearest to its own.
        interpolation: One of `INTERPOLATION`, for scaling photos and patches.
        show_progress: Show a bar when there are many photos; only one process should.

    Raises:
        ValueError: if there is no photo or ``max_size`` is not positive.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        max_size: int,
        *,
        buckets: Sequence[tuple[int, int]] = (),
        interpolation: str = "lanczos",
        show_progress: bool = True,
    ) -> None:
        if not photos:
            raise ValueError("PhotoSet needs at least one photo.")
        if max_size < 1:
            raise ValueError(f"PhotoSet.max_size is {max_size}; give a number of pixels >= 1.")
        self.max_size = max_size
        self.shapes = tuple(buckets) or ((max_size, max_size),)
        self._photos = list(photos)
        self._resampling = INTERPOLATION[interpolation]
        self._buckets: list[int] = []
        self._pixels: dict[tuple[int, int], np.ndarray] = {}
        for number, photo in enumerate(_progress(photos, "Loading photos", show_progress)):
            image = photo.decode()
            self._buckets.append(nearest_bucket((image.height, image.width), self.shapes))
            self._scale(image, number, self._buckets[number])
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._photos)

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
        height, width, _ = self._pixels[index, self._buckets[index]].shape
        return height, width

    def digest(self, index: int) -> str:
        """SHA-256 (hex) of the size and the scaled pixels: equal digests mean equal crops, whatever the file name."""
        if index not in self._digests:
            pixels = self._pixels[index, self._buckets[index]]
            self._digests[index] = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
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
            float32 tensor of shape (3, output height, output width) with values in [-1, 1].

        Raises:
            ValueError: if a size or a position is out of range.
        """
        bucket = self._buckets[index] if bucket is None else bucket
        patch, output = (size if isinstance(size, tuple) else (size, size) for size in (patch_size, output_size))
        limits = self.shapes[bucket]
        if not all(1 <= length <= limit for length, limit in zip(patch, limits)):
            raise ValueError(f"patch_size is {patch_size}; it must be from 1 to that of the bucket, {limits}.")
        if min(output) < 1:
            raise ValueError(f"output_size is {output_size}; give a number of pixels >= 1.")
        if (index, bucket) not in self._pixels:
            self._scale(self._photos[index].decode(), index, bucket)
        pixels = self._pixels[index, bucket]
        y, x = (
            _center_offset(length, side) if center else _offset(fraction, length, side)
            for fraction, length, side in zip((top, left), pixels.shape[:2], patch)
        )
        cut = pixels[y : y + patch[0], x : x + patch[1]]
        if patch != output:
            # Cropped first: Pillow's `resize(box=...)` lets pixels outside the box into its edges.
            image = Image.fromarray(np.ascontiguousarray(cut))
            cut = np.asarray(image.resize(output[::-1], self._resampling))
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
        if size != image.size:
            image = image.resize(size, self._resampling)
        self._pixels[index, bucket] = np.array(image)


def _offset(fraction: float, length: int, patch_size: int) -> int:
    if not 0 <= fraction < 1:
        raise ValueError(f"A crop position is {fraction}; it must be at least 0 and below 1.")
    return math.floor(fraction * (length - patch_size + 1))


def _center_offset(length: int, patch_size: int) -> int:
    # Half a pixel is rounded as torchvision's CenterCrop does it, to the even neighbour.
    return round((length - patch_size) / 2)
