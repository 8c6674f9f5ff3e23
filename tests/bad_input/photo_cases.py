"""Bad input of the training script: folders of photos, captions and datasets."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.bad_input.cases import PHOTOS, Case, Make


def photo(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photos(make: Make) -> Make:
    """A folder with one good photo, changed."""

    def build(folder: Path) -> Path:
        photo().save(folder / "good.png")
        make(folder)
        return folder

    return build


def cut(name: str, part: float) -> Make:
    def make(folder: Path) -> None:
        photo().save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * part)])

    return photos(make)


def file(name: str, content: bytes) -> Make:
    return photos(lambda folder: (folder / name).write_bytes(content))


def picture(name: str, mode: str, size: tuple[int, int]) -> Make:
    return photos(lambda folder: Image.new(mode, size).save(folder / name))


def caption(content: bytes) -> Make:
    return file("good.txt", content)


def link(name: str, target: str) -> Make:
    """A link to a file that lies beside the folder, not in it."""

    def make(folder: Path) -> None:
        photo(1).save(folder.parent / "elsewhere.png")
        (folder.parent / "elsewhere.txt").write_text("a secret of this machine")
        (folder / name).symlink_to(folder.parent / target)

    return photos(make)


def only(*names: str) -> Make:
    """A folder with empty files of these names and nothing else; a name that ends with a slash is a folder."""

    def build(folder: Path) -> Path:
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"\0stray")
        return folder

    return build


def one_down(name: str) -> Make:
    """A folder whose photo is in a folder of this name."""

    def build(folder: Path) -> Path:
        (folder / name).mkdir()
        photo().save(folder / name / "a.png")
        return folder

    return build


def bomb(folder: Path) -> None:
    """A PNG that says it is 30,000 pixels square, without them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def several(folder: Path) -> None:
    (folder / "a.jpg").touch()
    (folder / "b.png").write_text("<html>")
    Image.new("1", (30000, 1)).save(folder / "c.png")
    (folder / "d.png").symlink_to("nowhere.png")


def one_file(folder: Path) -> Path:
    (folder / "photo.png").touch()
    return folder / "photo.png"


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


PHOTO_CASES: dict[str, Case] = {
    "an empty folder": ({PHOTOS: only()}, ["no images found", "png"]),
    "stray files only": ({PHOTOS: only("Thumbs.db", ".DS_Store", "notes.txt", "sub/")}, ["no images found"]),
    "hidden pictures only": ({PHOTOS: only(".a.png")}, ["no images found"]),
    # With and without the package that reads them.
    "broken HEIC": ({PHOTOS: only("IMG_1.HEIC", "IMG_2.heic")}, ["IMG_1.HEIC", "IMG_2.heic"]),
    "broken HEIC by another name": ({PHOTOS: file("a.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")}, ["a.jpg ("]),
    "raw pictures only": ({PHOTOS: only("a.dng", "b.CR2")}, ["no images found", "a.dng, b.CR2: raw: convert to jpg"]),
    "a zip": ({PHOTOS: lambda folder: only("a.zip")(folder) / "a.zip"}, ["a.zip is an archive: unpack it, and name"]),
    "a zip in a folder": ({PHOTOS: only("a.zip")}, ["no images found", "a.zip: an archive: unpack it"]),
    "one folder down": (
        {PHOTOS: one_down("10_sks dog")},
        [
            "no images found",
            "one folder down: 1; type --instance_data_dir",
            "--repeats 10 --instance_prompt 'sks d",
        ],
    ),
    "a saved dataset": ({PHOTOS: only("state.json", "dataset_info.json")}, ["a saved dataset", "type --dataset_name"]),
    **{
        f"half a {name}": ({PHOTOS: cut(f"a.{name}", 0.5)}, [f"a.{name} ("])
        for name in ("jpg", "png", "webp", "gif", "tif", "bmp")
    },
    "a PNG cut in its header": ({PHOTOS: cut("a.png", 0.002)}, ["a.png ("]),
    "a file of no bytes": ({PHOTOS: file("a.jpg", b"")}, ["a.jpg (empty file)"]),
    "a web page": ({PHOTOS: file("a.png", b"<html>404</html>")}, ["a.png (not an image)"]),
    "a pointer of Git LFS": (
        {PHOTOS: file("a.png", b"version https://git-lfs.github.com/spec/v1\n")},
        ["a.png (not an image)"],
    ),
    "a tracking pixel": ({PHOTOS: picture("a.gif", "P", (1, 1))}, ["a.gif (a single pixel)"]),
    "30,000 pixels of nothing": ({PHOTOS: picture("a.png", "1", (30000, 1))}, ["30000 x 1 pixels is too narrow"]),
    "30,000 pixels square": ({PHOTOS: photos(bomb)}, ["a.png (900 megapixels; scale it down to 500 at most)"]),
    "several at once": ({PHOTOS: photos(several)}, ["4 images", "a.jpg (", "b.png (", "c.png (", "d.png ("]),
    "a pipe": ({PHOTOS: photos(pipe)}, ["pipe.png (not a file)"]),
    "a dead link": ({PHOTOS: link("a.png", "nothing.png")}, ["a.png (a link that leads out of the folder"]),
    "a link out of the folder": ({PHOTOS: link("a.png", "elsewhere.png")}, ["a.png (a link that leads out"]),
    "a caption that links out": ({PHOTOS: link("good.txt", "elsewhere.txt")}, ["good.txt is a link that leads out"]),
    "a line break in a name": ({PHOTOS: file("a\nb.png", b"")}, ["a b.png (empty file)"]),
    "colours in a name": ({PHOTOS: file("a\x1b[31m.png", b"")}, ["a\\x1b[31m.png (empty file)"]),
    "a caption in Latin-1": ({PHOTOS: caption("Hündchen".encode("latin-1"))}, ["good.txt is not UTF-8 text"]),
    "a caption in UTF-16": ({PHOTOS: caption("a dog".encode("utf-16"))}, ["good.txt is not UTF-8 text"]),
    "a caption in UTF-16 without a mark": ({PHOTOS: caption("a dog".encode("utf-16-le"))}, ["good.txt is not UTF-8"]),
    "a caption in Shift-JIS": ({PHOTOS: caption("犬の写真".encode("shift-jis"))}, ["good.txt is not UTF-8 text"]),
    "a caption that is a picture": ({PHOTOS: caption(b"\x89PNG\r\n\x1a\n\0\0")}, ["good.txt is not UTF-8 text"]),
    "a caption without end": ({PHOTOS: caption(b"dog " * 20000)}, ["good.txt is 80,000 bytes long"]),
    "captions cut short": (
        {PHOTOS: file("metadata.jsonl", b'{"file_name": "good.png"')},
        ["metadata.jsonl is"],
    ),
    "captions of numbers": (
        {PHOTOS: file("metadata.jsonl", b'{"file_name": "good.png", "text": 3}')},
        ["metadata.jsonl is not text for good.png"],
    ),
    "captions in UTF-16": (
        {PHOTOS: file("metadata.csv", "file_name,text".encode("utf-16"))},
        ["csv is not UTF"],
    ),
    "captions that link out": (
        {PHOTOS: link("metadata.jsonl", "elsewhere.txt")},
        ["jsonl is a link that leads"],
    ),
    "a .caption in Latin-1": ({PHOTOS: file("good.caption", b"H\xfcndchen")}, ["good.caption is not UTF-8 text"]),
    "a file": ({PHOTOS: one_file}, ["is a file, not a folder"]),
    "class pictures cut short": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog", "--class_data_dir": cut("0.jpg", 0.4)},
        ["--class_data_dir", "0.jpg ("],
    ),
}


def image_folder(*rows: Any, text: str | None = None) -> Make:
    """A local dataset: one picture beside it, one in it, and metadata."""

    def build(folder: Path) -> Path:
        photo(1).save(folder.parent / "elsewhere.png")
        photo().save(folder / "a.png")
        (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
        (folder / "metadata.jsonl").write_text(text if text is not None else "\n".join(map(json.dumps, rows)))
        return folder

    return build


def dataset(make: Make, **flags: str) -> dict[str, Any]:
    return {
        PHOTOS: None,
        "--dataset_name": make,
        "--cache_dir": lambda folder: folder,
        **{f"--{name}": value for name, value in flags.items()},
    }


DATASET_CASES: dict[str, Case] = {
    "a dataset that is not there": (
        dataset(lambda folder: folder / "nothing"),
        ["--dataset_name", "cannot be loaded"],
    ),
    "an empty dataset": (dataset(only()), ["--dataset_name", "cannot be loaded"]),
    "metadata that lead up": (dataset(image_folder({"file_name": "../elsewhere.png"})), ["--dataset_name", "cannot"]),
    "metadata that link out": (dataset(image_folder({"file_name": "link.png"})), ["000000 (a path that leads out"]),
    "metadata of no file": (dataset(image_folder({"file_name": "b.png"})), ["--dataset_name", "000000 ("]),
    "metadata without names": (dataset(image_folder({"text": "a dog"})), ["--dataset_name"]),
    "metadata that are no JSON": (dataset(image_folder(text="{")), ["--dataset_name", "cannot be loaded"]),
    "no such column": (
        dataset(image_folder({"file_name": "a.png"}), image_column="photo"),
        ["--image_column 'photo'"],
    ),
    "no such captions": (
        dataset(image_folder({"file_name": "a.png"}), caption_column="text"),
        ["--caption_column 'text'"],
    ),
    "captions that are numbers": (
        dataset(image_folder({"file_name": "a.png", "text": 1}), caption_column="text"),
        ["--caption_column 'text'", "does not hold text"],
    ),
}
