"""Pictures as phones, cameras, browsers and other trainers leave them: colours, formats, sizes, folders."""

import io
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from blockskip_hooks.data import picture
from blockskip_hooks.data.dataset import load_dataset_photos
from blockskip_hooks.data.folder import image_suffixes
from blockskip_hooks.data.photo import Photo
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.summary import summarize_photos
from tests.profiles import DISPLAY_P3, cmyk_profile, matrix_profile
from tests.script import noise


COLOUR = (200, 80, 60)
IN_DISPLAY_P3 = (186, 88, 67)
"""What a Display P3 file stores for that sRGB colour."""


def decoded(folder):
    (photo,) = scan_photos(folder)
    return np.asarray(photo.decode()).astype(int)


def assert_colour(pixels, colour, within):
    assert pixels.shape[2] == 3 and np.abs(pixels - colour).max() <= within


# Colour profiles


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.jpg", "a.avif"])
def test_a_profile_is_honoured(tmp_path, name):
    if Path(name).suffix not in image_suffixes():
        pytest.skip("this Pillow does not read it")
    lossless = {"lossless": True} if name == "a.webp" else {"quality": 100}
    Image.new("RGB", (16, 16), IN_DISPLAY_P3).save(tmp_path / name, icc_profile=DISPLAY_P3, **lossless)
    assert_colour(decoded(tmp_path), COLOUR, within=1 if name in ("a.png", "a.webp", "a.tif") else 3)


def test_a_profile_is_honoured_under_transparency_and_in_a_palette(tmp_path):
    (tmp_path / "alpha").mkdir()
    image = Image.new("RGBA", (16, 16), (*IN_DISPLAY_P3, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 8))
    image.save(tmp_path / "alpha" / "a.png", icc_profile=DISPLAY_P3)
    pixels = decoded(tmp_path / "alpha")
    assert (pixels[:8] == 255).all()
    assert_colour(pixels[8:], COLOUR, within=1)
    (tmp_path / "palette").mkdir()
    Image.new("RGB", (16, 16), IN_DISPLAY_P3).quantize(4).save(tmp_path / "palette" / "a.png", icc_profile=DISPLAY_P3)
    assert_colour(decoded(tmp_path / "palette"), COLOUR, within=1)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_profile_of_grey_is_honoured(tmp_path, mode):
    # A square root is the inverse of gamma 2: half of its range is a quarter of white's light, 137 in sRGB.
    Image.new("L", (16, 16), 128).convert(mode).save(tmp_path / "a.png", icc_profile=matrix_profile(2.0, grey=True))
    assert_colour(decoded(tmp_path), (137, 137, 137), within=1)


def test_a_profile_of_cmyk_is_honoured(tmp_path):
    """The printer of this profile has black ink only, which lowers the lightness evenly."""
    Image.new("CMYK", (16, 16), (255, 0, 0, 128)).save(tmp_path / "a.tif", icc_profile=cmyk_profile())
    # L* of 49.8 is 118.2 in sRGB; Pillow's own conversion makes (0, 127, 127) of it.
    assert_colour(decoded(tmp_path), (118, 118, 118), within=2)


def test_lab_is_converted(tmp_path):
    # L* 53.7, a* 0, b* 0 is mid grey, 128 in sRGB; Pillow keeps a* and b* with 128 added.
    Image.new("LAB", (16, 16), (137, 128, 128)).save(tmp_path / "a.tif")
    assert_colour(decoded(tmp_path), (128, 128, 128), within=1)


def test_pixels_in_srgb_stay_as_they_are_to_the_bit(tmp_path):
    """Whatever a profile is called: one with sRGB's numbers changes nothing."""
    image = noise(64, 48)
    for number, profile in enumerate(
        (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), matrix_profile(None))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        image.save(folder / "a.png", icc_profile=profile)
        assert (decoded(folder) == np.asarray(image)).all()


def test_profiles_that_cannot_be_applied_are_named_once_and_ignored(tmp_path, caplog):
    image = noise(16, 16)
    image.save(tmp_path / "broken.png", icc_profile=b"not a profile")
    image.convert("L").save(tmp_path / "good.png")
    noise(16, 16, seed=1).save(tmp_path / "grey for colour.png", icc_profile=matrix_profile(2.0, grey=True))
    photos = scan_photos(tmp_path)
    assert (np.asarray(photos[0].decode()) == np.asarray(image)).all()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(r"profile cannot be applied: 2 \(broken\.png, grey for colour\.png\)", record.message)


def test_a_profile_is_honoured_in_a_dataset(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (16, 16), IN_DISPLAY_P3).save(folder / "0.png", icc_profile=DISPLAY_P3)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a dog"}')
    (photo,) = load_dataset_photos(str(folder), caption_column="text", cache_dir=str(tmp_path / "cache"))
    assert_colour(np.asarray(photo.decode()).astype(int), COLOUR, within=1)


def stating(path, primaries, curve):
    """Write a picture that states its colour space by the numbers of H.273, in place of a profile."""
    image = Image.new("RGB", (16, 16), IN_DISPLAY_P3)
    if path.suffix == ".png":
        info = PngInfo()
        info.add(b"cICP", bytes([primaries, curve, 0, 1]))
        image.save(path, pnginfo=info)
    elif path.suffix == ".avif":
        image.save(path, quality=100, subsampling="4:4:4")
        stated = re.compile(rb"(colrnclx)....", re.DOTALL)
        path.write_bytes(stated.sub(rb"\1" + struct.pack(">2H", primaries, curve), path.read_bytes()))
    else:
        heif = pytest.importorskip("pillow_heif").from_pillow(image)
        heif.save(path, quality=-1, color_primaries=primaries, transfer_characteristics=curve, save_nclx_profile=True)


@pytest.mark.parametrize("name", ["a.png", "a.avif", "a.heic"])
def test_a_colour_space_that_is_stated_by_numbers_is_honoured(tmp_path, caplog, name):
    if Path(name).suffix not in image_suffixes():
        pytest.skip("this Pillow does not read it")
    for folder, codes, colour in (("p3", (12, 13), COLOUR), ("srgb", (1, 13), IN_DISPLAY_P3)):
        (tmp_path / folder).mkdir()
        stating(tmp_path / folder / name, *codes)
        assert_colour(decoded(tmp_path / folder), colour, within=1 if name == "a.png" else 3)
    assert not caplog.records
    # High dynamic range: BT.2020 and the PQ curve.
    (tmp_path / "hdr").mkdir()
    stating(tmp_path / "hdr" / name, 9, 16)
    assert_colour(decoded(tmp_path / "hdr"), IN_DISPLAY_P3, within=3)
    (record,) = caplog.records
    assert f"cannot be applied: 1 ({name})" in record.message


# Grey of more than 8 bits


def grey_tiff(path, values, bits, photometric=1, largest=None, big_endian=False):
    """An uncompressed grey TIFF of 12 or 16 bits."""
    height, width = values.shape
    order = ">" if big_endian else "<"
    if bits == 16:
        data = values.astype(f"{order}u2").tobytes()
    else:
        pairs = values.reshape(-1, 2).astype(int)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 0), (277, 3, 1), (278, 4, height), (279, 4, len(data))]
    tags += [] if largest is None else [(281, 3, largest)]
    offset = 8 + 2 + 12 * len(tags) + 4
    number = "big" if big_endian else "little"
    entries = b"".join(
        tag.to_bytes(2, number)
        + kind.to_bytes(2, number)
        + (1).to_bytes(4, number)
        + (offset if tag == 273 else value).to_bytes(2 if kind == 3 else 4, number).ljust(4, b"\0")
        for tag, kind, value in sorted(tags)
    )
    header = (b"MM" if big_endian else b"II") + (42).to_bytes(2, number) + (8).to_bytes(4, number)
    path.write_bytes(header + len(tags).to_bytes(2, number) + entries + bytes(4) + data)


RAMP = np.array([[0, 1000], [2000, 4095]])


@pytest.mark.parametrize(
    ("values", "bits", "settings", "expected"),
    [
        (RAMP, 12, {}, [[0, 62], [125, 255]]),
        (RAMP // 2, 12, {}, [[0, 31], [62, 127]]),
        (RAMP * 16, 16, {}, [[0, 62], [125, 255]]),
        (RAMP * 16, 16, {"big_endian": True}, [[0, 62], [125, 255]]),
        (RAMP, 16, {"largest": 4095}, [[0, 62], [125, 255]]),
        (RAMP * 16, 16, {"photometric": 0}, [[255, 193], [130, 0]]),
    ],
    ids=["12 bits", "12 bits, dark", "16 bits", "16 bits, big endian", "12 of 16 bits", "16 bits, white is zero"],
)
def test_grey_of_more_than_8_bits_has_its_brightness(tmp_path, values, bits, settings, expected):
    grey_tiff(tmp_path / "a.tif", values, bits, **settings)
    pixels = decoded(tmp_path)
    assert (pixels == pixels[..., :1]).all()
    np.testing.assert_allclose(pixels[..., 0], expected, atol=1)


def test_a_picture_that_is_all_but_black_is_named(tmp_path, caplog):
    grey_tiff(tmp_path / "dark.tif", RAMP, 16)
    noise(8, 8).save(tmp_path / "good.png")
    scan_photos(tmp_path)
    assert "all but black: 1 (dark.tif)" in caplog.text


# Formats


def test_every_format_of_photos_is_read(tmp_path):
    image = noise(32, 24)
    formats = {
        "jpg": ("jpe", "jfif", "jpeg"),
        "png": ("png",),
        "bmp": ("bmp", "dib"),
        "tga": ("tga",),
        "ppm": ("ppm",),
    }
    formats |= {"qoi": ("qoi",)} if "QOI" in Image.SAVE else {}
    formats |= {ending: (ending,) for ending in ("jp2", "avif") if f".{ending}" in image_suffixes()}
    names = []
    for format, endings in formats.items():
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[f".{format}"])
        for ending in endings:
            names.append(f"{ending}.{ending.upper() if ending == 'jfif' else ending}")
            (tmp_path / names[-1]).write_bytes(buffer.getvalue())
    photos = scan_photos(tmp_path)
    assert [photo.name for photo in photos] == sorted(names)
    assert {photo.size for photo in photos} == {(24, 32)}


def test_pictures_that_are_left_out_are_named_with_the_reason(tmp_path, caplog):
    noise(8, 8).save(tmp_path / "a.png")
    for name in ("b.dng", "c.NEF", "d.jxl", "e.zip", "f.mov", "g.psd"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("notes.md", "Thumbs.db", ".hidden.dng"):
        (tmp_path / name).write_bytes(b"x")
    noise(8, 8, seed=1).save(tmp_path / "h.jpg_large", "JPEG")
    (tmp_path / "below").mkdir()
    noise(8, 8, seed=2).save(tmp_path / "below" / "i.png")
    (photo,) = scan_photos(tmp_path)
    for words in (
        "left out b.dng, c.NEF (raw: convert to jpg or png)",
        "left out d.jxl, g.psd (convert to jpg or png)",
        "left out e.zip (an archive: unpack it)",
        "left out f.mov (a video)",
        "left out h.jpg_large (a picture by another name: end it in .jpg or .png)",
        "left out below/ (1) (in a folder below: move them here)",
    ):
        assert words in caplog.text
    assert len(caplog.records) == 6 and "notes" not in caplog.text and "hidden" not in caplog.text
    assert "left out: b.dng, c.NEF, below/ (1), d.jxl, g.psd and 3 more" in summarize_photos(
        [photo], [(8, 8)]
    ).describe("photos", "sks")


@pytest.fixture
def heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    folder = tmp_path / "phone"
    folder.mkdir()
    image = Image.new("RGB", (64, 48), COLOUR)
    heif = pillow_heif.from_pillow(image)
    heif.save(folder / "IMG_1.HEIC", quality=100)
    (folder / "IMG_2.jpg").write_bytes((folder / "IMG_1.HEIC").read_bytes())
    return folder


def test_heic_is_read_whatever_it_is_called(heic, tmp_path):
    photos = scan_photos(heic)
    assert [photo.name for photo in photos] == ["IMG_1.HEIC", "IMG_2.jpg"]
    for photo in photos:
        assert photo.size == (48, 64)
        assert_colour(np.asarray(photo.decode()).astype(int), COLOUR, within=3)


WITHOUT_THE_PACKAGE = """
import logging, sys
from pathlib import Path
sys.modules["pillow_heif"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pillow_heif" else find(name, *rest)
logging.basicConfig(format="%(message)s")
from blockskip_hooks.data.photos import scan_photos
try:
    print([photo.name for photo in scan_photos(Path(sys.argv[1]))])
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (
            ["IMG_1.HEIC"],
            "no images found in this folder .*; IMG_1.HEIC: HEIC: run pip install pillow-heif, or convert",
        ),
        (["IMG_1.HEIC", "good.png"], r"left out IMG_1.HEIC \(HEIC: run pip install pillow-heif, or .*\['good.png'\]"),
        (
            ["IMG_2.jpg", "good.png"],
            r"1 image cannot be read: IMG_2.jpg \(HEIC: run pip install pillow-heif, or convert",
        ),
    ],
)
def test_heic_without_its_package_is_named_with_what_to_install(heic, kept, words):
    noise(8, 8).save(heic / "good.png")
    for path in heic.iterdir():
        if path.name not in kept:
            path.unlink()
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(heic)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(words, result.stderr + result.stdout, re.DOTALL), result.stderr + result.stdout


# Large pictures


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(picture, "_LARGE_PIXELS", 64 * 48)
    monkeypatch.setattr(picture, "_LARGE_SIDE", 24)
    monkeypatch.setattr(picture, "MAX_PIXELS", 1000 * 1000)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "grey.png", "alpha.png", "palette.png", "turned.tif"])
def test_a_large_picture_is_read_smaller_and_shows_the_same(tmp_path, small_limits, name):
    """256 x 192 pixels are over the limit by so much that an eighth is left."""
    x, y = np.meshgrid(np.linspace(20, 230, 256), np.linspace(30, 220, 192))
    image = Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))
    options = {}
    if name == "grey.png":
        image = Image.fromarray((x * 257).astype(np.uint16))
    elif name == "alpha.png":
        image.putalpha(255)
    elif name == "palette.png":
        image = image.quantize(256)
    elif name == "turned.tif":
        options["exif"] = Image.Exif()
        options["exif"][274] = 6
    image.save(tmp_path / name, **options)
    expected = np.asarray(image.convert("RGB").resize((32, 24), Image.Resampling.BOX)).astype(int)
    if name == "grey.png":
        expected = np.repeat(x.reshape(24, 8, 32, 8).mean(axis=(1, 3))[..., None], 3, axis=2)
    pixels = decoded(tmp_path)
    pixels = np.rot90(pixels) if name == "turned.tif" else pixels
    assert pixels.shape == (24, 32, 3)
    assert np.abs(pixels - expected).max() <= 10 and np.abs(pixels - expected).mean() <= 2


def test_reading_smaller_leaves_enough_for_training(small_limits):
    assert picture._reduction((64, 48)) == 1
    assert picture._reduction((65, 48)) == 2
    assert picture._reduction((256, 192)) == 8
    assert picture._reduction((10000, 48)) == 2
    assert picture._reduction((10000, 24)) == 1


def test_absurd_sizes_are_refused(tmp_path, small_limits, recwarn):
    Image.new("1", (1001, 1000)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png \(1 megapixels; scale it down to 1 at most\)"):
        scan_photos(tmp_path)
    assert len(recwarn) == 0 and Image.MAX_IMAGE_PIXELS is not None


PEAK = """
import resource, sys
from pathlib import Path
from blockskip_hooks.data.picture import open_picture, read_picture
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read_picture(lambda: open_picture(Path(sys.argv[1]))).image.size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_photo_of_200_megapixels_takes_little_memory(tmp_path):
    Image.new("L", (16320, 12240), 100).save(tmp_path / "a.jpg")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "a.jpg")], capture_output=True, text=True, check=True
    )
    size, kilobytes = result.stdout.splitlines()
    assert size == "(4080, 3060)"
    # Whole, in colour, it would be 800 MB.
    assert int(kilobytes) < 200_000


# Folders as people have them


def folder_of(path, count):
    path.mkdir(parents=True)
    for number in range(count):
        noise(8, 8, seed=number).save(path / f"{number}.png")
    return path


def test_photos_one_folder_down_are_found_and_what_to_type_is_said(tmp_path):
    folder_of(tmp_path / "set" / "10_sks dog", 3)
    with pytest.raises(ValueError) as error:
        scan_photos(tmp_path / "set")
    assert str(error.value) == (
        f"--instance_data_dir {tmp_path / 'set'}: no images found in this folder; one folder down: 3; type "
        f"--instance_data_dir '{tmp_path}/set/10_sks dog' --repeats 10 --instance_prompt 'sks dog'"
    )
    folder_of(tmp_path / "set" / "5_dog", 2)
    with pytest.raises(ValueError, match=r"one folder down: 5; they are in 10_sks dog \(3\), 5_dog \(2\): name one"):
        scan_photos(tmp_path / "set")
    (tmp_path / "set" / "more").mkdir()
    with pytest.raises(ValueError, match=r"^--class_data_dir .*; type --class_data_dir \S+/7_cats$"):
        folder_of(tmp_path / "other" / "7_cats", 1)
        scan_photos(tmp_path / "other", flag="--class_data_dir")


def test_a_zip_is_not_a_folder(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"photos\.zip is an archive: unpack it, and name the folder"):
        scan_photos(tmp_path / "photos.zip")
    with pytest.raises(ValueError, match=r"no images found .*; photos\.zip: an archive: unpack it\.$"):
        scan_photos(tmp_path)


def test_a_saved_dataset_is_loaded(tmp_path, caplog):
    import datasets

    images = [noise(24, 16, seed=number) for number in range(2)]
    table = datasets.Dataset.from_dict(
        {"image": images, "text": ["a dog", ""]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "no train"))
    for name in ("one", "splits"):
        photos = load_dataset_photos(str(tmp_path / name), caption_column="text")
        assert [(photo.caption, photo.caption_source) for photo in photos] == [("a dog", "column text"), (None, None)]
        assert all((np.asarray(p.decode()) == np.asarray(i)).all() for p, i in zip(photos, images, strict=True))
        with pytest.raises(ValueError, match=f"is a saved dataset, .* type --dataset_name {tmp_path / name}$"):
            scan_photos(tmp_path / name)
    assert caplog.text == ""
    load_dataset_photos(str(tmp_path / "one"))
    assert "has text (text) that is not used; --caption_column uses it" in caplog.text
    with pytest.raises(ValueError, match="no 'train' split, only test"):
        load_dataset_photos(str(tmp_path / "no train"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="^--dataset_name .* cannot be loaded") as error:
        load_dataset_photos(str(tmp_path / "one"))
    assert "\n" not in str(error.value)


# What a run begins with


def test_the_same_picture_twice_is_named(tmp_path, caplog):
    image = noise(8, 8)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.tif")
    noise(8, 8, seed=1).save(tmp_path / "c.png")
    scan_photos(tmp_path)
    (record,) = caplog.records
    assert "counts more than the others: 1 (a.png = b.tif)" in record.message


def test_small_and_narrow_photos_are_counted_and_named(tmp_path):
    sizes = {"small.png": (63, 80), "right.png": (64, 64), "long.png": (200, 64), "wide.png": (128, 64)}
    photos = [Photo(name, None, lambda: None, size=(height, width)) for name, (width, height) in sizes.items()]
    summary = summarize_photos(photos, [(64, 64)])
    assert (list(summary.enlarged), list(summary.mostly_cut)) == (["small.png"], ["long.png"])
    small, narrow = summary.warnings()
    assert "1 of 4 photos (small.png)" in small and "--resolution" in small
    assert "1 of 4 photos (long.png)" in narrow and "--aspect_ratio_buckets" in narrow
    assert "Sizes    64 x 64 to 200 x 64 px, scaled and cropped to 64 x 64" in summary.describe("photos", "sks")
    bucketed = summarize_photos(photos, [(64, 64), (48, 144)])
    assert list(bucketed.mostly_cut) == [] and "cropped to 2 aspect ratios" in bucketed.describe("photos", "sks")
    many = summarize_photos([Photo(f"{n}.png", None, lambda: None, size=(8, 8)) for n in range(12)], [(64, 64)])
    (line,) = many.warnings()
    assert "12 of 12 photos (0.png, 1.png, 2.png, 3.png, 4.png and 7 more)" in line
