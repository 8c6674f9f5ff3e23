"""Photos with condition images: where pairs come from, how they are cropped and encoded, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import pytest
import torch
from PIL import Image

from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.data.dataset import load_dataset_photos
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.data.summary import summarize_photos
from blockskip_hooks.families import Family
from blockskip_hooks.residuals.batches import PhotoSource, SampleMaker
from blockskip_hooks.utils.seeds import derived_seed
from tests import script
from tests.pairs import KONTEXT, SIZES, VALIDATION, save_pairs
from tests.script import PROMPT, save_photos
from tests.tiers import fast_first
from tests.tiny import TINY_FAMILIES


# Crops


def pair_set(folder: Path, conditions: Path, max_size: int = 64) -> PhotoSet:
    return PhotoSet(scan_photos(folder, conditions=conditions), max_size)


def test_both_pictures_of_a_pair_are_cropped_alike(pairs: Path):
    """Any patch size, place and flip: the crop of a negative is the negative of the crop, to rounding."""
    family = KONTEXT.make_family()
    photos = pair_set(pairs, pairs)
    patches = PatchSamplingConfig(mode="dynamic", min_size=32, max_size=64, multiple=8)
    plan = SamplePlan(
        seed=0,
        num_images={"instance": 3},
        timesteps=family.scheduler.timesteps,
        patch=patches,
        random_flip=True,
    )
    maker = SampleMaker(plan, {"instance": PhotoSource(photos, PROMPT)}, family, {}, "cpu", torch.float32)
    samples = maker.samples(range(24))
    assert len({sample.patch_size for sample in samples}) > 2 and {sample.flip for sample in samples} == {True, False}
    for sample in samples:
        crop = maker.crop(sample)
        assert crop.shape == (2, 3, 32, 32) and crop[0].std() > 0.1
        assert (crop[0] + crop[1]).abs().max() <= 2 / 127


def test_a_condition_image_of_another_size_covers_its_photo(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Half as large is the same crop; another shape is stretched, and named."""
    save_photos(tmp_path / "photos", [(128, 64), (128, 64)])
    (tmp_path / "conditions").mkdir()
    for name, size in (("0.jpg", (64, 32)), ("1.png", (64, 64))):
        left = Image.new("RGB", size, "black")
        left.paste("white", (0, 0, size[0] // 2, size[1]))
        left.save(tmp_path / "conditions" / name, quality=95)
    photos = pair_set(tmp_path / "photos", tmp_path / "conditions", max_size=32)
    for number in range(2):
        for place, value in ((0.0, 1.0), (0.999, -1.0)):
            crop = photos.crop(number, patch_size=16, output_size=16, left=place)
            assert (crop[1] - value).abs().max() < 0.1
    stretched = [record.message for record in caplog.records if "stretched" in record.message]
    assert len(stretched) == 1 and "1 (1.png)" in stretched[0]


@pytest.mark.parametrize("mode", ["mode", "sample"])
@torch.no_grad()
def test_latents_are_the_mode_or_drawn(pairs: Path, mode: str):
    """Both pictures of a pair, each with a draw of its own; cached crops give the same latents."""
    family = KONTEXT.make_family(vae_encode_mode=mode)
    vae = family.load_vae(torch.float32, "cpu")
    patches = PatchSamplingConfig(min_size=64, max_size=64, multiple=8)
    made = []
    for fixed in (False, True):
        plan = SamplePlan(
            seed=0,
            num_images={"instance": 3},
            timesteps=family.scheduler.timesteps,
            patch=patches,
            center_crop=True,
            fixed_crops=fixed,
        )
        sources = {"instance": PhotoSource(pair_set(pairs, pairs), PROMPT)}
        maker = SampleMaker(plan, sources, family, {}, "cpu", torch.float32)
        made.append((maker.samples(range(3)), maker.encode(vae, maker.samples(range(3)))))
    (samples, latents), (_, cached) = made
    assert latents.shape == (3, 2, *family.latent_shape(64, 64))
    torch.testing.assert_close(cached, latents)
    crops = torch.stack([maker.crop(sample) for sample in samples])
    mean, std = vae.encode(crops[:, 1]).latent_dist.mean, vae.encode(crops[:, 1]).latent_dist.std
    off = (latents[:, 1] - family.scale_latents(vae, mean)).abs().amax()
    assert off <= 1e-6 if mode == "mode" else off > std.min() / 10
    seeds = [derived_seed(sample.noise_seed, "posterior") for sample in samples]
    assert len(set(seeds)) == 3


# Where pairs come from


def names_of(photos: list[Any]) -> list[tuple[str, str]]:
    return [(photo.name, photo.condition.name) for photo in photos]


def test_pairs_of_a_folder_and_of_two(tmp_path: Path):
    one = save_pairs(tmp_path / "one")
    found = scan_photos(one, conditions=one)
    assert names_of(found) == [(f"{n}.png", f"{n}_cond.png") for n in range(3)]
    two = save_pairs(tmp_path / "two", tmp_path / "conditions")
    others = scan_photos(two, conditions=tmp_path / "conditions")
    assert names_of(others) == [(f"{n}.png", f"{n}.png") for n in range(3)]
    # The pictures of a pair decide what it is, not their names.
    assert [photo.digest for photo in found] == [photo.digest for photo in others]
    assert [photo.digest for photo in found] != [photo.digest for photo in scan_photos(two)]
    sets = [PhotoSet(photos, 64) for photos in (found, others, scan_photos(two))]
    digests = [[photos.digest(number) for number in range(3)] for photos in sets]
    assert digests[0] == digests[1] and not set(digests[0]) & set(digests[2])
    assert [photos.are_pairs for photos in sets] == [True, True, False]


def test_condition_images_that_are_taken_for_photos_are_named(
    pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    settings = parse_args(script.settings(KONTEXT.folder, pairs, tmp_path / "out"))
    assert len(prepare_run(settings).photos) == 6
    found = [record.message for record in caplog.records if "0_cond.png and others train as photos" in record.message]
    assert len(found) == 1 and f"--cond_data_dir {pairs} makes" in found[0]
    run = prepare_run(
        parse_args([*script.settings(KONTEXT.folder, pairs, tmp_path / "out"), "--cond_data_dir", str(pairs)])
    )
    assert len(run.photos) == 3 and len([r for r in caplog.records if "train as photos" in r.message]) == 1
    summary = summarize_photos(run.photos, [(64, 64)]).describe("here", PROMPT)
    assert summary.startswith("Photos   3 with condition images from here")


def test_pairs_of_a_dataset(tmp_path: Path, pairs: Path):
    columns = {
        "image": [str(pairs / f"{n}.png") for n in range(3)],
        "before": [str(pairs / f"{n}_cond.png") for n in range(3)],
    }
    table = datasets.Dataset.from_dict(columns)
    for column in columns:
        table = table.cast_column(column, datasets.Image())
    # With the pictures in it.
    table.map(lambda row: row).save_to_disk(tmp_path / "set")
    found = load_dataset_photos(str(tmp_path / "set"), cond_image_column="before")
    assert names_of(found) == [(f"{n:06d}", f"{n:06d} before") for n in range(3)]
    assert [photo.digest for photo in found] == [photo.digest for photo in scan_photos(pairs, conditions=pairs)]


# What is refused


REFUSED: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "prior preservation": (
        lambda pairs: ["--with_prior_preservation", "--class_data_dir", "classes", "--class_prompt", "a dog"],
        ["--with_prior_preservation does not go with condition images"],
    ),
    "a text encoder": (lambda pairs: ["--train_text_encoder"], ["--train_text_encoder does not go with"]),
    "caption dropout": (lambda pairs: ["--caption_dropout", "0.1"], ["--caption_dropout does not go with"]),
    "two sources": (
        lambda pairs: ["--cond_image_column", "before"],
        ["--cond_image_column and --cond_data_dir both name condition images"],
    ),
    "no image to validate with": (
        lambda pairs: ["--validation_prompt", "a dog on the beach"],
        ["--validation_prompt needs --validation_image"],
    ),
    "a validation image that is not there": (
        lambda pairs: [*VALIDATION, "--validation_image", "nowhere.png"],
        ["--validation_image nowhere.png", "cannot be read", "nowhere.png ("],
    ),
    "no such folder": (lambda pairs: ["--cond_data_dir", "nowhere"], ["--cond_data_dir nowhere is not a folder"]),
    "photos alone": (
        lambda pairs: ["--instance_data_dir", str(save_photos(pairs.parent / "more", [*SIZES, (64, 64), (64, 64)]))],
        ["--cond_data_dir", "2 of the photos (3.png, 4.png)", "add 3_cond.png or 3.png"],
    ),
}


def refusal(capsys: pytest.CaptureFixture, model: Path, photos: Path, output: Path, *flags: str) -> str:
    """The one line that a run ends with before anything is loaded."""
    with patch.object(Family, "load_text_pipeline", side_effect=AssertionError("a text encoder is loaded")):
        code = script.load_script().main(script.settings(model, photos, output, *flags))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize("case", fast_first(REFUSED, 3))
def test_what_does_not_go_with_pairs_is_refused(
    case: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    make, words = REFUSED[case]
    flags = make(tmp_path / "pairs")
    given = () if "--cond_data_dir" in flags else ("--cond_data_dir", str(pairs))
    line = refusal(capsys, KONTEXT.folder, pairs, tmp_path / "out", *given, *flags)
    for word in words:
        assert word in line


def test_pairs_are_refused_where_the_photos_are_of_the_other_kind(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    line = refusal(capsys, KONTEXT.folder, pairs, tmp_path / "out", "--cond_image_column", "before")
    assert "--cond_image_column before needs --dataset_name; give" in line and "--cond_data_dir with --inst" in line


def test_families_without_condition_images_refuse_them(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    line = refusal(capsys, TINY_FAMILIES[0].folder, pairs, tmp_path / "out", "--cond_data_dir", str(pairs))
    assert "it belongs to models of flux-kontext, flux2, flux2-klein, qwen-image-2.1 and does nothing for flux" in line
