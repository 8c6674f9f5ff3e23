"""Photos of a dataset: of the hub, of a local folder with metadata, or as `save_to_disk` wrote it."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from ..utils.errors import UserError, first_line, one_line
from .checks import check_photos
from .photo import Photo
from .picture import open_picture


logger = logging.getLogger(__name__)


def load_dataset_photos(
    dataset_name: str,
    config_name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    cache_dir: str | None = None,
    *,
    cond_image_column: str | None = None,
) -> list[Photo]:
    """Photos of the train split of a dataset, in its order.

    Args:
        dataset_name: Hub id, local image folder with ``metadata.jsonl``, as `datasets.load_dataset` takes it, or
            folder that `save_to_disk` wrote.
        config_name: Configuration of the dataset, or None for its only one.
        image_column: Column with the pictures.
        caption_column: Column with one text per picture, or None: every picture gets the instance prompt.
        cache_dir: Where downloads are kept, or None for the usual place.
        cond_image_column: Column with the pictures' condition images, or None for none.

    Raises:
        UserError: if the dataset cannot be loaded, a column is missing or of the wrong kind, or listing every row
            that cannot be decoded.
    """
    import datasets  # slow to import, and only this path needs it

    where = f"--dataset_name {dataset_name}"
    table = _train_split(dataset_name, config_name, cache_dir, where)
    columns = ", ".join(table.column_names)
    pictures = {"--image_column": image_column, "--cond_image_column": cond_image_column}
    for flag, column in {**pictures, "--caption_column": caption_column}.items():
        if column is not None and column not in table.column_names:
            raise UserError(f"{flag} '{column}' is not in {where}; it has {columns}.")
    for flag, column in pictures.items():
        if column is not None and not isinstance(table.features[column], datasets.Image):
            raise UserError(f"{flag} '{column}' of {where} does not hold images; it has {columns}.")
    if len(table) == 0:
        raise UserError(f"{where} has no rows; name a dataset with at least one image.")

    captions = [None] * len(table) if caption_column is None else list(table[caption_column])
    if any(caption is not None and not isinstance(caption, str) for caption in captions):
        raise UserError(f"--caption_column '{caption_column}' of {where} does not hold text; it has {columns}.")
    texts = [
        name for name, kind in table.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if caption_column is None and texts:
        logger.warning("%s has text (%s) that is not used; --caption_column uses it.", where, ", ".join(texts))
    # A row may name a file in place of holding its bytes: only of the dataset's folder, or of what was downloaded.
    roots = [dataset_name] if Path(dataset_name).is_dir() else [HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    rows = {
        column: _Rows(
            table.select_columns([column]).cast_column(column, datasets.Image(decode=False)),
            table.features[column].decode_example,
            tuple(Path(root) for root in (*roots, *filter(None, [cache_dir]))),
        )
        for column in pictures.values()
        if column is not None
    }
    photos = []
    for row, caption in enumerate(captions):
        text, condition = (caption or "").strip() or None, None
        if cond_image_column is not None:
            condition = Photo(f"{row:06d} {cond_image_column}", None, partial(rows[cond_image_column].image, row))
        opener, source = partial(rows[image_column].image, row), text and f"column {caption_column}"
        photos.append(Photo(f"{row:06d}", text, opener, caption_source=source, condition=condition))
    return check_photos(photos, where)


def _train_split(name: str, config_name: str | None, cache_dir: str | None, where: str) -> Any:
    import datasets

    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except Exception as error:  # builders, file systems and the hub client all raise their own kinds
        raise UserError(
            f"{where} cannot be loaded ({_root_reason(error)}); check the id or folder, "
            "--dataset_config_name and access."
        ) from error
    if isinstance(splits, datasets.Dataset):
        return splits
    if "train" not in splits:
        raise UserError(f"{where} has no 'train' split, only {', '.join(splits)}; name a dataset that has one.")
    return splits["train"]


@dataclass(frozen=True)
class _Rows:
    """A dataset's images: a table of what is stored of them, how that is decoded, and where files of them may be."""

    table: Sequence
    decode: Callable[[dict], Image.Image]
    roots: tuple[Path, ...]

    def image(self, row: int) -> Image.Image:
        (stored,) = self.table[row].values()
        if stored is None:
            raise UserError("no image in this row")
        path, content = stored["path"], stored["bytes"]
        if content is not None:
            return open_picture(io.BytesIO(content))
        if "://" in path:
            return self.decode(stored)
        real = Path(path).resolve()
        if not any(real.is_relative_to(root.resolve()) for root in self.roots):
            raise UserError("a path that leads out of the dataset; copy the file there")
        return open_picture(real)


def _root_reason(error: BaseException) -> str:
    """What the first of a chain of errors says; the libraries' own says no more than that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(first_line(error))
