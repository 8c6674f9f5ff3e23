"""Captions beside photos: a text file of the photo's name, or a row of the folder's metadata."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..utils.errors import UserError, first_line, one_line
from .folder import check_inside
from .photo import Photo


METADATA = ("metadata.jsonl", "metadata.csv")
"""Files of captions by file name, as `datasets` reads them; the first that has a caption counts."""

# Tokenizers see a few hundred words; more is another kind of file.
_MAX_CAPTION_BYTES = 1 << 16
_MAX_METADATA_BYTES = 1 << 26
_ENDINGS = (".txt", ".caption")
_COLUMNS = ("text", "caption", "prompt")


def add_captions(photos: Sequence[Photo], folder: Path, where: str) -> list[Photo]:
    """Give every photo its caption; the first of these that has text:

    ``photo.txt``, ``photo.png.txt``, ``photo.caption``, ``photo.png.caption`` (endings in any case), the photo's row
    in ``metadata.jsonl``, its row in ``metadata.csv``: column ``text``, ``caption`` or ``prompt``.

    Args:
        photos: Photos of the folder.
        folder: The folder.
        where: What names it in messages.

    Raises:
        UserError: listing every caption that cannot be read.
    """
    files = _text_files(folder)
    broken: list[str] = []
    # Only as much is read as is needed, so that a file that changes nothing stops nothing.
    captioned = []
    for photo in photos:
        text, source = _caption(photo, files, broken)
        captioned.append(replace(photo, caption=text, caption_source=source))
    for name in METADATA:
        if any(photo.caption is None for photo in captioned) and (folder / name).exists():
            try:
                rows = _read_metadata(folder / name)
            except (OSError, ValueError, csv.Error) as error:
                broken.append(f"{name} is {_reason(error)}")
                continue
            captioned = [
                replace(photo, caption=rows[photo.name], caption_source=name)
                if photo.caption is None and photo.name in rows
                else photo
                for photo in captioned
            ]
    if broken:
        count = "1 caption" if len(broken) == 1 else f"{len(broken)} captions"
        raise UserError(f"{where}: {count} cannot be read: {', '.join(broken)}; correct (as UTF-8) or remove.")
    return captioned


def unused_captions(photos: Sequence[Photo], folder: Path) -> list[str]:
    """Names of the files in a folder that look like captions and that no photo has its caption from."""
    used = {photo.caption_source for photo in photos}
    files = [path.name for path in _text_files(folder).values()]
    return sorted(name for name in (*files, *METADATA) if name not in used and (folder / name).is_file())


def _text_files(folder: Path) -> dict[tuple[str, str], Path]:
    """Files that may be captions, by stem and lower-case ending; of x.TXT and x.txt the second, which sorts last."""
    return {
        (path.stem, path.suffix.lower()): path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and not path.is_dir()
    }


def _caption(photo: Photo, files: dict[tuple[str, str], Path], broken: list[str]) -> tuple[str | None, str | None]:
    """The caption from a file of the photo's name, and that file's name."""
    for ending in _ENDINGS:
        for stem in (Path(photo.name).stem, photo.name):
            if path := files.get((stem, ending)):
                try:
                    text = _read_text(path)
                except (OSError, ValueError) as error:
                    broken.append(f"{one_line(path.name)} is {_reason(error)}")
                    return None, None
                if text:
                    return text, path.name
    return None, None


def _read_text(path: Path, most: int = _MAX_CAPTION_BYTES) -> str:
    check_inside(path)
    if path.stat().st_size > most:
        raise UserError(f"{path.stat().st_size:,} bytes long")
    # "-sig": editors on Windows put a byte order mark first, which would become part of the prompt.
    text = path.read_text(encoding="utf-8-sig").strip()
    if "\0" in text:
        # Letters of UTF-16 without its mark pass for UTF-8.
        raise UserError("not UTF-8 text")
    return text


def _read_metadata(path: Path) -> dict[str, str]:
    """Captions by file name; none if the file has no column of them."""
    text = _read_text(path, _MAX_METADATA_BYTES)
    captions: dict[str, str] = {}
    for row in _json_rows(text) if path.suffix == ".jsonl" else csv.DictReader(io.StringIO(text, newline="")):
        caption = next((row[name] for name in _COLUMNS if name in row), None)
        if caption is not None and not isinstance(caption, str):
            raise UserError(f"not text for {one_line(str(row.get('file_name')))}")
        if caption and caption.strip() and "file_name" in row:
            captions[str(row["file_name"])] = caption.strip()
    return captions


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"not JSON in line {number}") from error
            if not isinstance(row, dict):
                raise UserError(f"not JSON objects in line {number}")
            yield row


def _reason(error: Exception) -> str:
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else one_line(first_line(error))
