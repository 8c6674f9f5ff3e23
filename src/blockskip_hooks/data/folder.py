"""Which files of a folder are photos, and why the others are not."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from pathlib import Path

from PIL import Image, features

from ..utils.errors import UserError
from .picture import HEIC_ADVICE


# Formats of photos among those that Pillow opens: no programs (EPS), working files (PSD) or data.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
_HEIC = (".heic", ".heif", ".hif")
_REASONS = {
    f".{ending}": reason
    for endings, reason in (
        ("3fr arw cr2 cr3 dng iiq nef nrw orf pef raf raw rw2 srw", "raw: convert to jpg or png"),
        ("ai avif eps exr hdr jp2 jxl jxr psb psd svg webp wmf xcf", "convert to jpg or png"),
        ("avi mkv mov mp4 webm", "a video"),
        ("7z bz2 gz rar tar tgz xz zip", "an archive: unpack it"),
        ("arrow parquet", "a dataset: use --dataset_name"),
        ("heic heif hif", HEIC_ADVICE),
    )
    for ending in endings.split()
}
# Of a file with another name, only what a browser saves is looked for.
_RENAMED = ("JPEG", "PNG", "GIF", "WEBP")
CONDITION_ENDING = "_cond"
_KOHYA = re.compile(r"(\d+)_(.+)")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Endings of the files that are read as photos: those of this Pillow, and HEIC where its package is installed."""
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN or name == "MPO"]
    formats = [name for name in known if name not in _OPTIONAL or features.check(_OPTIONAL[name])]
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in formats}
    return frozenset(suffixes | (set(_HEIC) if importlib.util.find_spec("pillow_heif") else set()))


def image_paths(folder: Path) -> list[Path]:
    """Picture files directly in ``folder``, by suffix, sorted by name; anything hidden or of another kind is left."""
    suffixes = image_suffixes()
    return sorted(
        (path for path in _visible(folder) if path.suffix.lower() in suffixes and not path.is_dir()),
        key=lambda path: path.name,
    )


def condition_paths(folder: Path, photos: list[Path]) -> dict[Path, Path]:
    """The condition image of each photo that has one: ``x_cond`` with any ending or, in another folder, ``x``.

    Args:
        folder: Where they are; may be the folder of the photos.
        photos: The photos; ``x_cond`` beside ``x`` is none of them, but has no place here.
    """
    found = {path.stem: path for path in reversed(image_paths(folder))}
    pairs = {}
    for photo in photos:
        names = (f"{photo.stem}{CONDITION_ENDING}", *([] if folder.samefile(photo.parent) else [photo.stem]))
        if (name := next((name for name in names if name in found), None)) is not None:
            pairs[photo] = found[name]
    return pairs


def _visible(folder: Path) -> list[Path]:
    """What is in the folder, without hidden files and what systems leave behind."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__MACOSX"))]


def left_out(folder: Path) -> dict[str, list[str]]:
    """Names of the pictures in a folder that are not used, by what to do about it.

    Args:
        folder: Folder of photos. Files that are no picture of any kind are not named.
    """
    found: dict[str, list[str]] = {}
    suffixes = image_suffixes()
    for path in _visible(folder):
        if path.is_dir():
            if pictures := len(image_paths(path)):
                found.setdefault("in a folder below: move them here", []).append(f"{path.name}/ ({pictures})")
        elif path.suffix.lower() not in suffixes and (reason := _reason_of(path)):
            found.setdefault(reason, []).append(path.name)
    return found


def _reason_of(path: Path) -> str | None:
    if reason := _REASONS.get(path.suffix.lower()):
        return reason
    try:
        check_inside(path)
        Image.open(path, formats=_RENAMED).close()
    except Exception:  # whatever Pillow raises of what is no picture
        return None
    return "a picture by another name: end it in .jpg or .png"


def no_photos(folder: Path, flag: str) -> str:
    """One line on a path in which there are no photos: what is there instead, and what to type.

    Args:
        folder: What was named.
        flag: The flag that named it.
    """
    if not folder.is_dir():
        if folder.is_file() and (reason := _REASONS.get(folder.suffix.lower())) and "archive" in reason:
            return f"{flag} {folder} is {reason}, and name the folder that the photos are in."
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        return f"{flag} {folder} {problem}; name the folder that holds the photos."
    below = [path for path in _visible(folder) if path.is_dir() and image_paths(path)]
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return f"{flag} {folder} is a saved dataset, not a folder of photos; type --dataset_name {_typed(folder)}"
    if below:
        count = sum(len(image_paths(path)) for path in below)
        listed = ", ".join(f"{path.name} ({len(image_paths(path))})" for path in below)
        which = f"type {_command(below[0], flag)}" if len(below) == 1 else f"they are in {listed}: name one of them"
        return f"{flag} {folder}: no images found in this folder; one folder down: {count}; {which}"
    others = left_out(folder)
    hints = "".join(f"; {', '.join(found[:3])}: {reason}" for reason, found in others.items())
    known = "jpg, png, webp, avif, tif and others that Pillow reads"
    return f"{flag} {folder}: no images found in this folder (supported: {known}){hints}."


def _command(folder: Path, flag: str) -> str:
    """What to type for a folder of photos; one named as kohya's trainers want it says repeats and prompt as well."""
    typed = f"{flag} {_typed(folder)}"
    if flag == "--instance_data_dir" and (match := _KOHYA.fullmatch(folder.name)):
        typed += f" --repeats {int(match[1])} --instance_prompt {shlex.quote(match[2])}"
    return typed


def _typed(path: Path) -> str:
    return shlex.quote(str(path))


def check_inside(path: Path) -> None:
    """Check that a file is an ordinary one whose content lies in its folder.

    A folder of photos is often someone else's, and what is in it ends up in reports and uploads: a link in it must not
    bring in other files of this machine. Links of the hub's cache lead to the blobs beside its snapshots.

    Args:
        path: The file.

    Raises:
        UserError: if it is a link that leads elsewhere, or no file.
    """
    folder = path.parent.resolve()
    # resolve() also ends at what is not there.
    real = path.resolve()
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.name == "snapshots"), None)
    allowed = [folder] if snapshots is None else [folder, snapshots.parent / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise UserError("a link that leads out of the folder; copy the file there")
    if not path.exists():
        raise UserError("a link to a file that is not there")
    # Opening a pipe would wait for ever.
    if not path.is_file():
        raise UserError("not a file")
