"""Photos of every awkward kind, made on the fly: found, verified, decoded alike, and cropped exactly."""

import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from blockskip_hooks.data.dataset import load_dataset_photos
from blockskip_hooks.data.photo import Photo
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from tests.script import noise


RED = (200, 40, 30)


def photo_of(image, name="photo", caption=None):
    return Photo(name, caption, image.copy)


def photo_set(*images, max_size):
    return PhotoSet([photo_of(image, str(index)) for index, image in enumerate(images)], max_size)


def saved(tmp_path, image, name="photo.png", **options):
    image.save(tmp_path / name, **options)
    (photo,) = scan_photos(tmp_path)
    return np.asarray(photo.decode())


def to_bytes(tensor):
    return (tensor * 0.5 + 0.5).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()


# Finding and checking


def test_only_pictures_are_found_in_order_of_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "d.bmp", "e.tiff", "f.gif", "Z.jpeg", ".hidden.png"):
        Image.new("RGB", (8, 8), RED).save(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "captions.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"\x00stray")
    for name in (".ipynb_checkpoints", "deeper", "folder.png"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "a.jpg", tmp_path / "deeper")
    photos = scan_photos(tmp_path)
    assert [photo.name for photo in photos] == ["Z.jpeg", "a.jpg", "b.PNG", "c.webp", "d.bmp", "e.tiff", "f.gif"]
    assert photos[1].path == tmp_path / "a.jpg"
    assert {photo.decode().mode for photo in photos} == {"RGB"}


def test_all_unreadable_pictures_are_named_in_one_line(tmp_path):
    noise(64, 64).save(tmp_path / "good.png")
    for name in ("cut.jpg", "cut.png", "cut.webp", "cut.gif", "cut.tif", "cut.bmp"):
        noise(64, 64).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    Image.new("RGB", (4, 400)).save(tmp_path / "sliver.png")
    with pytest.raises(ValueError) as error:
        scan_photos(tmp_path, flag="--class_data_dir")
    message = str(error.value)
    assert message.startswith(f"--class_data_dir {tmp_path}: 10 images cannot be read: cut.bmp (")
    assert "\n" not in message and "good.png" not in message
    for part in (
        "cut.jpg (",
        "cut.webp (",
        "empty.jpg (empty file)",
        "text.jpg (not an image)",
        "gone.jpg (",
        "narrow",
    ):
        assert part in message
    assert message.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("kind", "words"), [("missing", "does not exist"), ("file", "is a file"), ("empty", "no images")]
)
def test_folders_without_photos(tmp_path, kind, words):
    folder = tmp_path / "photos"
    if kind == "file":
        folder.write_text("")
    elif kind == "empty":
        folder.mkdir()
        (folder / "notes.txt").write_text("a dog")
    with pytest.raises(ValueError, match=f"^--class_data_dir .*{words}"):
        scan_photos(folder, flag="--class_data_dir")


# Decoding


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 10], [257 * 100, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        folder = tmp_path / name[2:]
        folder.mkdir()
        pixels = saved(folder, Image.fromarray(values), name)
        assert pixels[..., 0].tolist() == [[0, 10], [100, 255]] and (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_float_grey(tmp_path, white):
    pixels = saved(tmp_path, Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32) * white), "a.tif")
    assert pixels[0, :, 0].tolist() == [0, 51, 255]


def test_cmyk(tmp_path):
    pixels = saved(tmp_path, Image.new("RGB", (16, 16), RED).convert("CMYK"), "a.jpg", quality=100)
    assert np.abs(pixels.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_becomes_white(tmp_path, mode):
    options = {}
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    else:
        image = Image.new(mode, (4, 4), 0)
        options["transparency"] = 0 if mode == "P" else (0, 0, 0)
    assert (saved(tmp_path, image, "a.png", **options) == 255).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    assert np.abs(saved(tmp_path, Image.new("RGBA", (4, 4), (255, 0, 0, 51))).astype(int) - (255, 204, 204)).max() <= 1


def test_palette_bilevel_and_grey(tmp_path):
    for mode in ("P", "1", "L"):
        folder = tmp_path / mode
        folder.mkdir()
        image = Image.new("RGB", (4, 4), "white").convert(mode)
        assert (saved(folder, image) == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned right: the left half comes to the top
    pixels = saved(tmp_path, image, "a.jpg", exif=exif, quality=95)
    assert pixels.shape == (40, 20, 3)
    assert pixels[:15].min() > 200 and pixels[-15:].max() < 50


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, "blue", "green")]
    pixels = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert np.abs(pixels.astype(int) - RED).max() <= 2


# The set


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(100, 50, (32, 64)), (50, 75, (48, 32)), (32, 40, (40, 32)), (1, 1, (32, 32))]
)
def test_shorter_side_is_scaled_to_max_size(width, height, expected):
    photos = photo_set(noise(width, height), max_size=32)
    assert photos.size(0) == expected and len(photos) == 1
    assert photos.crop(0, patch_size=32, output_size=32).shape == (3, 32, 32)


def test_a_photo_of_the_right_size_is_untouched():
    image = noise(48, 32)
    photos = photo_set(image, max_size=32)
    crop = photos.crop(0, patch_size=32, output_size=32, left=0.999)
    assert crop.dtype == torch.float32 and crop.is_contiguous()
    assert (to_bytes(crop) == np.asarray(image)[:, 16:]).all()


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    photos = photo_set(Image.fromarray(stripes), max_size=64)
    inner = photos.crop(0, patch_size=64, output_size=16)[:, 2:-2, 2:-2]
    assert inner.abs().max() < 0.05  # mid grey, where a resize without a filter gives black or white


@pytest.mark.parametrize("patch_size", [8, 17, 24, 32])
@pytest.mark.parametrize("output_size", [8, 16, 40])
def test_crops_have_the_exact_size_and_range(patch_size, output_size):
    photos = photo_set(noise(45, 32), max_size=32)
    crop = photos.crop(0, patch_size=patch_size, output_size=output_size, top=0.3, left=0.9)
    assert crop.shape == (3, output_size, output_size) and crop.abs().max() <= 1


def test_a_resized_crop_does_not_see_beyond_its_edges():
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :16] = 255
    crop = photo_set(Image.fromarray(pixels), max_size=32).crop(0, patch_size=16, output_size=8)
    assert (crop == 1).all()


def test_the_same_crop_twice_is_the_same_tensor_and_flip_mirrors():
    photos = photo_set(noise(60, 40), max_size=32)
    where = {"patch_size": 24, "output_size": 16, "top": 0.7, "left": 0.2}
    first, again = photos.crop(0, **where), photos.crop(0, **where)
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    assert torch.equal(photos.crop(0, **where, flip=True), first.flip(-1))


def test_values_are_those_of_the_usual_normalisation():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, axis=2)
    crop = photo_set(Image.fromarray(ramp), max_size=16).crop(0, patch_size=16, output_size=16)
    expected = (torch.arange(256).float().div(255) - 0.5) / 0.5
    assert torch.equal(crop[1].flatten(), expected) and crop.min() == -1 and crop.max() == 1


def test_uniform_fractions_give_uniform_positions():
    """Every offset of a 6-pixel-free side comes up as often as the others, first and last included."""
    pixels = np.zeros((16, 22, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(22)
    photos = photo_set(Image.fromarray(pixels), max_size=16)
    draws = [photos.crop(0, patch_size=16, output_size=16, left=(i + 0.5) / 700) for i in range(700)]
    assert Counter(int(to_bytes(draw)[0, 0, 0]) for draw in draws) == dict.fromkeys(range(7), 100)


@pytest.mark.parametrize(("length", "expected"), [(16, 0), (17, 0), (18, 1), (19, 2), (22, 3)])
def test_center_crop(length, expected):
    pixels = np.zeros((16, length, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(length)
    crop = photo_set(Image.fromarray(pixels), max_size=16).crop(
        0, patch_size=16, output_size=16, center=True, left=0.9
    )
    assert to_bytes(crop)[0, 0, 0] == expected  # round((length - 16) / 2), halves to even


@pytest.mark.parametrize(
    "change", [{"patch_size": 33}, {"patch_size": 0}, {"output_size": 0}, {"top": 1.0}, {"left": -0.1}]
)
def test_impossible_crops_are_refused(change):
    photos = photo_set(noise(32, 32), max_size=32)
    with pytest.raises(ValueError, match=next(iter(change)) if "size" in next(iter(change)) else "position"):
        photos.crop(0, **{"patch_size": 16, "output_size": 16, **change})


def test_digest_tells_pixels_and_shape_apart():
    wide, tall = Image.new("RGB", (32, 16), RED), Image.new("RGB", (16, 32), RED)
    photos = photo_set(wide, wide, tall, noise(32, 16), max_size=16)
    digests = [photos.digest(index) for index in range(4)]
    assert digests[0] == digests[1] and len(set(digests)) == 3 and all(len(digest) == 64 for digest in digests)
    assert digests == [photo_set(wide, wide, tall, noise(32, 16), max_size=16).digest(index) for index in range(4)]


def test_empty_sets_and_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one photo"):
        PhotoSet([], 16)
    with pytest.raises(ValueError, match="max_size is 0"):
        photo_set(noise(4, 4), max_size=0)


@pytest.mark.parametrize(("count", "shown"), [(50, ""), (51, "Loading photos: 51/51 photos (100%)")])
def test_many_photos_are_loaded_under_a_display(count, shown, capsys):
    PhotoSet([photo_of(Image.new("RGB", (4, 4)), str(number)) for number in range(count)], 4)
    assert capsys.readouterr().err.partition(",")[0] == shown


# Datasets


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = []
    for index, caption in enumerate(("a dog ", "", "a sleeping dog")):
        noise(24, 16, seed=index).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": caption, "stars": index})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def load(folder, **options):
    return load_dataset_photos(str(folder), cache_dir=str(folder.parent / "cache"), **options)


def test_dataset_folder_with_captions(image_folder):
    photos = load(image_folder, caption_column="text")
    assert [photo.caption for photo in photos] == ["a dog", None, "a sleeping dog"]
    assert [photo.name for photo in photos] == ["000000", "000001", "000002"]
    for index, photo in enumerate(photos):
        assert (np.asarray(photo.decode()) == np.asarray(noise(24, 16, seed=index))).all()
    assert [photo.caption for photo in load(image_folder)] == [None] * 3
    for options, words in (
        ({"image_column": "picture"}, "--image_column 'picture' is not in .*image, text, stars"),
        ({"caption_column": "label"}, "--caption_column 'label' is not in .*image, text, stars"),
        ({"image_column": "text"}, "--image_column 'text' .* does not hold images"),
        ({"caption_column": "stars"}, "--caption_column 'stars' .* does not hold text"),
    ):
        with pytest.raises(ValueError, match=words):
            load(image_folder, **options)


def test_dataset_with_unreadable_rows(image_folder):
    buffer = io.BytesIO()
    noise(24, 16).save(buffer, "PNG")
    (image_folder / "1.png").write_bytes(buffer.getvalue()[:200])
    with pytest.raises(ValueError, match=r"--dataset_name .*1 image cannot be read: 000001 \(") as error:
        load(image_folder)
    assert "\n" not in str(error.value)


def test_dataset_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="^--dataset_name .*/nothing cannot be loaded") as error:
        load(tmp_path / "nothing")
    assert "\n" not in str(error.value)
