"""Captions beside photos: every usual form is read, in a fixed order, and what is not used is said."""

import json

import numpy as np
import pytest
from PIL import Image

from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.summary import summarize_photos
from blockskip_hooks.residuals.batches import PhotoSource


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of photos with these names and files with these contents."""

    def make(photos, files):
        for number, name in enumerate(photos):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        for name, content in files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


def captions(folder):
    return [(photo.caption, photo.caption_source) for photo in scan_photos(folder)]


def test_prompts_come_with_the_names_of_their_photos(folder):
    files = {"a.txt": "a dog", "c.caption": "a dog"}
    source = PhotoSource(PhotoSet(scan_photos(folder(["a.png", "b.png", "c.png"], files)), 8), "sks")
    assert source.prompts() == {"a dog": ["a.png", "c.png"], "sks": ["b.png"]}


def test_text_is_stripped_and_an_empty_file_is_no_caption(folder):
    texts = {"a": b"  a dog on a beach\r\n", "b": b"\xef\xbb\xbfein H\xc3\xbcndchen", "c": b" \n"}
    photos = scan_photos(folder(["a.png", "b.png", "c.png", "d.png"], {f"{k}.txt": v for k, v in texts.items()}))
    assert [photo.caption for photo in photos] == ["a dog on a beach", "ein Hündchen", None, None]
    assert PhotoSet(photos, 8).caption(1) == "ein Hündchen" and PhotoSet(photos, 8).name(3) == "d.png"


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.caption", "a.Caption", "a.png.txt", "a.png.TXT", "a.png.caption"]
)
def test_a_file_of_the_photos_name_is_its_caption(folder, name):
    assert captions(folder(["a.png", "b.png"], {name: "a dog"})) == [("a dog", name), (None, None)]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_beside_photos_are_captions(folder, name, column):
    text = 'ä dog, "sks"'
    if name.endswith(".csv"):
        content = f'\ufefffile_name,stars,{column}\na.png,3,"ä dog, ""sks"""\nc.png,2,\ngone.png,1,a cat\n'
    else:
        rows = [{"file_name": "a.png", column: text, "stars": 3}, {"file_name": "c.png", column: None}]
        content = "\n".join([*(json.dumps(row, ensure_ascii=False) for row in rows), ""])
    assert captions(folder(["a.png", "b.png", "c.png"], {name: content})) == [(text, name), (None, None), (None, None)]


def test_captions_of_several_kinds_have_an_order(folder):
    sources = {
        "a.txt": "1",
        "a.png.txt": "2",
        "a.caption": "3",
        "a.png.caption": "4",
        "metadata.jsonl": '{"file_name": "a.png", "text": "5"}',
        "metadata.csv": "file_name,text\na.png,6",
    }
    made = folder(["a.png"], sources)
    for number, name in enumerate(sources, start=1):
        assert captions(made) == [(str(number), name)]
        unused = [other for other in sources if other != name and (made / other).exists()]
        described = summarize_photos(scan_photos(made), [(8, 8)]).describe("photos", "sks")
        assert all(other in described.split("not used: ")[1] for other in unused[:5]) if unused else True
        # An empty file is passed over as one that is not there.
        (made / name).write_text("")
    assert captions(made) == [(None, None)]


def test_metadata_without_captions_are_named_and_change_nothing(folder):
    made = folder(["a.png"], {"metadata.jsonl": '{"file_name": "a.png", "label": 1}'})
    assert captions(made) == [(None, None)]
    assert "not used: metadata.jsonl" in summarize_photos(scan_photos(made), [(8, 8)]).describe("photos", "sks")


def test_the_first_screen_says_how_many_captions_there_are_and_from_where(folder):
    files = {
        "p0.txt": "one",
        "p1.TXT": "two",
        "p2.caption": "three",
        "p3.png.txt": "",
        "metadata.csv": "file_name,text\np4.png,five",
        "notes.txt": "buy more film",
    }
    photos = scan_photos(folder([f"p{number}.png" for number in range(6)], files))
    assert summarize_photos(photos, [(8, 8)]).describe("photos", "sks").splitlines()[1] == (
        "Captions 4 of 6 (2 from .txt, 1 from .caption, 1 from metadata.csv); not used: notes.txt, p3.png.txt"
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xff\xfe\x00dog", r"a\.txt is not UTF-8 text"),
        ("a.caption", b"H\xfcndchen", r"a\.caption is not UTF-8 text"),
        ("metadata.jsonl", b'{"file_name": "a.png"', r"metadata\.jsonl is not JSON in line 1"),
        ("metadata.jsonl", b'{"file_name": "b.png"}\n[]', r"metadata\.jsonl is not JSON objects in line 2"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', r"metadata\.jsonl is not text for a\.png"),
        ("metadata.jsonl", b"[" * 100_000, r"metadata\.jsonl is not JSON in line 1"),
        ("metadata.csv", b'file_name,text\na.png,"no end' + b"x" * 2**17, r"metadata\.csv is field larger than"),
        ("metadata.csv", "file_name,text".encode("utf-16"), r"metadata\.csv is not UTF-8 text"),
    ],
)
def test_captions_that_cannot_be_read_are_named(folder, name, content, words):
    with pytest.raises(ValueError, match=rf"^--instance_data_dir .*: 1 caption cannot be read: {words}") as error:
        scan_photos(folder(["a.png"], {name: content}))
    assert "\n" not in str(error.value)
