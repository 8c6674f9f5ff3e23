"""The photos of a folder: found, checked before any model loads, and with their captions."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from ..utils.errors import UserError
from .captions import add_captions
from .checks import check_photos
from .folder import CONDITION_ENDING, condition_paths, image_paths, left_out, no_photos
from .photo import Photo, names
from .picture import open_picture


logger = logging.getLogger(__name__)


def scan_photos(folder: Path, *, flag: str = "--instance_data_dir", conditions: Path | None = None) -> list[Photo]:
    """Find the photos of a folder and decode each once, so that a damaged file stops the run before it starts.

    Captions are read from the files beside the photos, see :func:`~blockskip_hooks.data.captions.add_captions`.
    Pictures that are not used are named in a warning; files of other kinds do not matter.

    Args:
        folder: Folder of pictures; subfolders are not entered.
        flag: Command-line flag that named the folder, for the messages.
        conditions: Folder of the photos' condition images, see
            :func:`~blockskip_hooks.data.folder.condition_paths`.

    Raises:
        UserError: if the folder is missing or holds no picture, or listing every picture or caption that cannot
            be read, or every photo without a condition image where there are to be some.
    """
    paths = image_paths(folder) if folder.is_dir() else []
    if not paths:
        raise UserError(no_photos(folder, flag))
    where = f"{flag} {folder}"
    for reason, found in left_out(folder).items():
        logger.warning("%s: left out %s (%s).", where, names(found), reason)
    pairs = _pairs(paths, conditions) if conditions is not None else {}
    # What is a condition image is no photo.
    photos = [_photo(path, pairs.get(path)) for path in paths if path not in pairs.values()]
    return add_captions(check_photos(photos, where), folder, where)


def _photo(path: Path, condition: Path | None) -> Photo:
    return Photo(
        path.name,
        None,
        partial(open_picture, path),
        path,
        condition=None if condition is None else _photo(condition, None),
    )


def _pairs(photos: list[Path], folder: Path) -> dict[Path, Path]:
    """The condition image of every photo.

    Raises:
        UserError: naming the photos that lack one.
    """
    where = f"--cond_data_dir {folder}"
    if not folder.is_dir():
        raise UserError(f"{where} is not a folder; name the one that holds the condition images.")
    pairs = condition_paths(folder, photos)
    missing = [path for path in photos if path not in pairs and path not in pairs.values()]
    if missing:
        shown, stem = names([path.name for path in missing]), missing[0].stem
        other = "" if folder.samefile(missing[0].parent) else f" or {stem}.png"
        raise UserError(
            f"{where} has no condition image of {len(missing)} of the photos ({shown}); add {stem}{CONDITION_ENDING}"
            f".png{other}, or take the photo away."
        )
    return pairs
