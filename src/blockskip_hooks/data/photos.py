"""The photos of a folder: found, checked before any model loads, and with their captions."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from ..utils.errors import UserError
from .captions import add_captions
from .checks import check_photos
from .folder import image_paths, left_out, no_photos
from .photo import Photo, ShowProgress, names, without_progress
from .picture import open_picture


logger = logging.getLogger(__name__)


def scan_photos(
    folder: Path, *, flag: str = "--instance_data_dir", progress: ShowProgress = without_progress
) -> list[Photo]:
    """Find the photos of a folder and decode each once, so that a damaged file stops the run before it starts.

    Captions are read from the files beside the photos, see :func:`~blockskip_hooks.data.captions.add_captions`.
    Pictures that are not used are named in a warning; files of other kinds do not matter.

    Args:
        folder: Folder of pictures; subfolders are not entered.
        flag: Command-line flag that named the folder, for the messages.
        progress: Shows how far the check is.

    Raises:
        UserError: if the folder is missing or holds no picture, or listing every picture or caption that cannot
            be read.
    """
    paths = image_paths(folder) if folder.is_dir() else []
    if not paths:
        raise UserError(no_photos(folder, flag))
    where = f"{flag} {folder}"
    for reason, found in left_out(folder).items():
        logger.warning("%s: left out %s (%s).", where, names(found), reason)
    photos = [Photo(path.name, None, partial(open_picture, path), path) for path in paths]
    return add_captions(check_photos(photos, where, progress), folder, where)
