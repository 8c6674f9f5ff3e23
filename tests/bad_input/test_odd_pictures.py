"""Pictures that are odd and fine decode to what they show and train as their plain copies do."""

import json

import numpy as np
import pytest
from PIL import Image

from blockskip_hooks.data.photos import scan_photos
from tests.bad_input.harness import command


def odd_pictures():
    """Name, how it is saved, and the 8-bit RGB pixels that it must decode to."""
    rng = np.random.default_rng(5)
    rgb = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (48, 64), dtype=np.uint8)
    image, wide = Image.fromarray(rgb), Image.fromarray(grey.astype(np.uint16) * 257)
    in_grey = np.repeat(grey[..., None], 3, axis=2)
    palette = Image.fromarray(np.repeat(np.repeat(rgb[:4, :4], 12, axis=0), 16, axis=1)).quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    clear = np.where(np.asarray(palette)[..., None] == 3, 255, colours)
    turned = Image.Exif()
    turned[274] = 6
    other = Image.fromarray(255 - rgb)
    veil = np.dstack([rgb, np.full((48, 64), 128, np.uint8)])
    mixed = np.asarray(
        Image.alpha_composite(Image.new("RGBA", (64, 48), "white"), Image.fromarray(veil)).convert("RGB")
    )
    cmyk = image.convert("CMYK")
    return {
        "16-bit grey.png": (wide, {}, in_grey),
        "16-bit grey.tif": (wide, {}, in_grey),
        "32-bit grey.tif": (Image.fromarray(grey.astype(np.int32) * 257), {}, in_grey),
        "float grey.tif": (Image.fromarray(grey.astype(np.float32)), {}, in_grey),
        "8-bit grey.png": (Image.fromarray(grey), {}, in_grey),
        "bilevel.png": (Image.fromarray(grey > 127), {}, np.where(in_grey > 127, 255, 0).astype(np.uint8)),
        "cmyk.tif": (cmyk, {}, np.asarray(cmyk.convert("RGB"))),
        "palette.gif": (palette, {}, colours),
        "palette with alpha.png": (palette, {"transparency": 3}, clear),
        "alpha.png": (Image.fromarray(veil), {}, mixed),
        "alpha.webp": (Image.fromarray(veil), {"lossless": True, "exact": True}, mixed),
        "animated.png": (image, {"save_all": True, "append_images": [other]}, rgb),
        "animated.webp": (image, {"save_all": True, "append_images": [other], "lossless": True}, rgb),
        "animated.gif": (palette, {"save_all": True, "append_images": [palette.rotate(180)]}, colours),
        "pages.tif": (image, {"save_all": True, "append_images": [other]}, rgb),
        "turned.png": (image, {"exif": turned}, np.rot90(rgb, k=-1)),
        "turned.webp": (image, {"exif": turned, "lossless": True}, np.rot90(rgb, k=-1)),
        "two pixels.png": (image.crop((0, 0, 2, 2)), {}, rgb[:2, :2]),
        "upper case.PNG": (image, {}, rgb),
    }


ODD = odd_pictures()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_decodes_to_what_it_shows(tmp_path, name):
    image, options, expected = ODD[name]
    image.save(tmp_path / name, **options)
    (photo,) = scan_photos(tmp_path)
    decoded = np.asarray(photo.decode())
    assert decoded.dtype == np.uint8 and photo.size == expected.shape[:2]
    np.testing.assert_array_equal(decoded, expected)


def test_cmyk_and_turned_jpegs_keep_their_colours(tmp_path):
    ramp = np.linspace(0, 255, 48 * 64).astype(np.uint8).reshape(48, 64)
    image = Image.merge(
        "RGB", [Image.fromarray(channel) for channel in (ramp, ramp[::-1].copy(), ramp[:, ::-1].copy())]
    )
    turned = Image.Exif()
    turned[274] = 8
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    image.save(tmp_path / "b.jpg", quality=100, subsampling=0, exif=turned)
    cmyk, sideways = (np.asarray(photo.decode()).astype(int) for photo in scan_photos(tmp_path))
    assert np.abs(cmyk - np.asarray(image)).max() <= 6
    assert np.abs(sideways - np.rot90(np.asarray(image))).max() <= 6


def test_odd_pictures_train_as_their_plain_copies_do(run, begin, tmp_path):
    losses = []
    for kind in ("odd", "plain"):
        folder = tmp_path / kind
        folder.mkdir()
        for number, (name, (image, options, expected)) in enumerate(ODD.items()):
            if kind == "odd":
                image.save(folder / f"{number:02d} {name}", **options)
            else:
                Image.fromarray(np.ascontiguousarray(expected)).save(folder / f"{number:02d} {name}.png")
        changes = {"--instance_data_dir": str(folder), "--train_batch_size": "5", "--max_train_steps": "4"}
        assert begin(command(tmp_path / f"out {kind}", {**changes, "--skip_final_inference": True})).code == 0
        losses.append(json.loads((tmp_path / f"out {kind}" / "run_report.json").read_text())["train"]["loss"])
    assert losses[0] == losses[1] and len(losses[0]) == 4
