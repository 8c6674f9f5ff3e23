"""Aspect-ratio buckets and caption dropout: shapes on the grid, undistorted crops, batches of one shape."""

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.data.buckets import ASPECT_RATIOS, nearest_bucket, parse_buckets, standard_buckets
from blockskip_hooks.data.photo import Photo
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.residuals.batches import PhotoSource, SampleMaker


MODES = ("dynamic", "high_to_low", "random", "resize", "none")
SIZES = [(64, 8), (256, 16), (512, 16), (512, 32), (768, 16), (1024, 16), (1024, 32), (1024, 64)]
SHAPES = ((64, 64), (96, 48), (48, 96))
SQUARE = PatchSamplingConfig(mode="dynamic", min_size=32, max_size=64, multiple=8)
BUCKETED = replace(SQUARE, buckets=SHAPES)
# Seven photos: four square, two upright, one lying.
OWN = (0, 1, 0, 0, 2, 1, 0)


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo_set(*images, buckets=SHAPES, **settings):
    photos = [Photo(str(number), None, image.copy) for number, image in enumerate(images)]
    return PhotoSet(photos, 64, buckets=buckets, **settings)


def ramps(height, width):
    """A picture whose red grows linearly from the left edge to the right one, and green from the top down."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    green = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    pixels = np.stack([red, green, np.zeros_like(red)], axis=-1)
    return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))


def make_plan(**changes):
    settings = {
        "seed": 7,
        "num_images": {"instance": len(OWN)},
        "timesteps": FlowMatchEulerDiscreteScheduler().timesteps,
        "patch": BUCKETED,
        "random_flip": True,
        "buckets": OWN,
        "batch_size": 4,
    }
    return SamplePlan(**{**settings, **changes})


# Reading the flag


@pytest.mark.parametrize(
    ("text", "buckets"),
    [
        ("64,64", ((64, 64),)),
        ("1024,1024;768,1360", ((1024, 1024), (768, 1360))),
        (" 64 , 96 ; 96 ,64; ", ((64, 96), (96, 64))),
        ("64,96;96,64;64,96", ((64, 96), (96, 64))),
    ],
)
def test_buckets_are_read_in_order_and_once(text, buckets):
    assert parse_buckets(text) == buckets


@pytest.mark.parametrize(
    "text",
    ["", " ", ";", "64", "64x96", "64;96", "64,96,64", "-64,96", "64,", ",64", "6.4,9", "٣٢,٣٢", "1e3,64"],
)
def test_a_text_of_another_form_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="^--aspect_ratio_buckets is '.*'; write height,width pairs") as error:
        parse_buckets(text)
    assert "\n" not in str(error.value)


# Standard shapes


@pytest.mark.parametrize(("resolution", "multiple"), SIZES)
def test_standard_buckets_have_the_area_of_the_square_and_lie_on_the_grid(resolution, multiple):
    buckets = standard_buckets(resolution, multiple)
    assert buckets[0] == (resolution, resolution) and len(set(buckets)) == len(buckets)
    assert all(height % multiple == 0 == width % multiple for height, width in buckets)
    assert all(abs(height * width / resolution**2 - 1) <= 0.1 for height, width in buckets)
    assert {(width, height) for height, width in buckets} == set(buckets)


@pytest.mark.parametrize(("resolution", "multiple"), SIZES)
def test_every_common_aspect_ratio_has_a_standard_bucket_as_near_as_the_grid_allows(resolution, multiple):
    buckets = standard_buckets(resolution, multiple)
    for long, short in ASPECT_RATIOS:
        for ratio in (long / short, short / long):
            ideal = resolution * ratio**0.5, resolution / ratio**0.5
            assert any(all(abs(a - b) <= multiple / 2 for a, b in zip(bucket, ideal)) for bucket in buckets)


def test_standard_buckets_are_never_empty_shapes():
    assert min(min(shape) for shape in standard_buckets(16, 16)) == 16


# A photo's bucket


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((64, 64), 0),
        ((4000, 3000), 0),  # 4:3 is nearer to 1:1 than to 2:1 on a logarithmic scale
        ((4000, 2500), 1),
        ((2500, 4000), 2),
        ((9000, 600), 1),
        ((1, 16), 2),
    ],
)
def test_a_photo_belongs_to_the_nearest_aspect_ratio_whatever_its_size(size, bucket):
    assert nearest_bucket(size, SHAPES) == bucket


def test_upright_and_lying_photos_are_treated_alike():
    shapes = standard_buckets(512, 16)
    turned = tuple((width, height) for height, width in shapes)
    for height in range(100, 1000, 37):
        chosen = nearest_bucket((height, 400), shapes)
        assert shapes[chosen] == turned[nearest_bucket((400, height), turned)][::-1]
        distance = abs(math.log(shapes[chosen][0] / shapes[chosen][1] * 400 / height))
        assert all(distance <= abs(math.log(h / w * 400 / height)) + 1e-12 for h, w in shapes)


def test_without_buckets_there_is_one_square():
    photos = photo_set(picture(200, 70), picture(70, 200), buckets=())
    assert photos.shapes == ((64, 64),) and [photos.bucket(i) for i in range(2)] == [0, 0]
    assert photos.crop(0, patch_size=64, output_size=64).shape == (3, 64, 64)


# Crops


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [(128, 128, 0), (90, 101, 0), (300, 151, 1), (97, 49, 1), (33, 100, 2), (1000, 2001, 2), (30, 20, 1), (48, 96, 2)],
)
def test_a_photo_is_scaled_to_just_cover_its_bucket_without_distortion(height, width, bucket):
    photos = photo_set(picture(height, width))
    assert photos.bucket(0) == bucket
    covered, size = SHAPES[bucket], photos.size(0)
    assert all(got >= wanted for got, wanted in zip(size, covered))
    assert any(got == wanted for got, wanted in zip(size, covered))
    scale = max(covered[0] / height, covered[1] / width)
    assert abs(size[0] - height * scale) < 1 and abs(size[1] - width * scale) < 1
    crop = photos.crop(0, patch_size=covered, output_size=covered, top=0.5, left=0.5)
    assert crop.shape == (3, *covered) and crop.dtype == torch.float32


@pytest.mark.parametrize("bucket", range(3))
@pytest.mark.parametrize(("height", "width"), [(160, 160), (240, 130), (130, 240)])
def test_a_crop_keeps_proportions_in_any_bucket(height, width, bucket):
    """Colour ramps tell where each pixel came from: a step right and a step down are equally long in the photo."""
    shape = SHAPES[bucket]
    photos = photo_set(ramps(height, width))
    crop = photos.crop(0, patch_size=shape, output_size=shape, center=True, bucket=bucket)
    assert crop.shape == (3, *shape)
    red, green = (crop[channel].double().numpy() * 0.5 + 0.5 for channel in (0, 1))
    # Photo pixels per step, away from the edges.
    across = np.polyfit(np.arange(4, shape[1] - 4), red.mean(0)[4:-4], 1)[0] * width
    down = np.polyfit(np.arange(4, shape[0] - 4), green.mean(1)[4:-4], 1)[0] * height
    assert across / down == pytest.approx(1, abs=1 / min(shape))
    # One direction is seen in full.
    assert across == pytest.approx(min(height / shape[0], width / shape[1]), rel=1 / min(shape))


def test_a_crop_of_the_bucket_is_the_photo_to_the_bit_when_sizes_agree():
    image = picture(96, 48)
    photos = photo_set(image)
    crop = photos.crop(0, patch_size=(96, 48), output_size=(96, 48))
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.equal((crop * 0.5 + 0.5).mul(255).round().to(torch.uint8), expected)
    flipped = photos.crop(0, patch_size=(96, 48), output_size=(96, 48), flip=True)
    assert torch.equal(flipped, crop.flip(-1))


def test_every_crop_position_lies_inside_the_photo_in_both_directions():
    image = ramps(200, 90)
    photos = photo_set(image)
    height, width = photos.size(0)
    whole = photos.crop(0, patch_size=(96, 48), output_size=(96, 48))
    assert (height, width) == (107, 48)
    offsets = [
        float(photos.crop(0, patch_size=(40, 16), output_size=(40, 16), top=top, left=left)[1, 0, 0])
        for top, left in ((0.0, 0.0), (0.5, 0.5), (0.999999, 0.999999))
    ]
    assert offsets == sorted(offsets) and offsets[0] == float(whole[1, 0, 0])
    assert (offsets[2] * 0.5 + 0.5) * height == pytest.approx(height - 40, abs=1.5)


def test_a_photo_can_be_cropped_to_another_bucket_and_keeps_its_own():
    photos = photo_set(picture(200, 100), picture(100, 100))
    own = photos.crop(0, patch_size=(96, 48), output_size=(96, 48))
    before = photos.size(0), photos.digest(0)
    other = photos.crop(0, patch_size=(48, 96), output_size=(24, 48), bucket=2)
    assert other.shape == (3, 24, 48) and torch.isfinite(other).all()
    assert (photos.size(0), photos.digest(0), photos.bucket(0)) == (*before, 1)
    assert torch.equal(photos.crop(0, patch_size=(96, 48), output_size=(96, 48)), own)
    alone = photo_set(picture(200, 100), buckets=[(48, 96)])
    assert torch.equal(alone.crop(0, patch_size=(48, 96), output_size=(24, 48)), other)


@pytest.mark.parametrize("patch", [(97, 48), (96, 49), (0, 48), 64])
def test_a_patch_larger_than_the_bucket_is_refused(patch):
    photos = photo_set(picture(200, 100))
    with pytest.raises(ValueError, match=r"patch_size is .*, \(96, 48\)"):
        photos.crop(0, patch_size=patch, output_size=(96, 48))


# Patches


@pytest.mark.parametrize("mode", MODES)
def test_without_buckets_patches_are_the_squares(mode):
    config = replace(SQUARE, mode=mode)
    assert config.shapes == ((64, 64),)
    assert [config.patch_shape(0, size) for size in range(32, 65, 8)] == [(s, s) for s in range(32, 65, 8)]
    assert config.training_shape(0) == (config.training_resolution,) * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("resolution", "multiple"), SIZES)
def test_patches_of_a_bucket_are_its_shape_at_the_scale_of_the_squares(resolution, multiple, mode):
    smallest = resolution // 2
    buckets = standard_buckets(resolution, multiple)
    config = PatchSamplingConfig(mode=mode, min_size=smallest, max_size=resolution, multiple=multiple, buckets=buckets)
    for number, whole in enumerate(buckets):
        for size in range(smallest, resolution + 1, multiple):
            shape = config.patch_shape(number, size)
            for got, side in zip(shape, whole):
                assert got % multiple == 0 and multiple <= got <= side
                assert abs(got - side * size / resolution) <= multiple / 2
        assert config.patch_shape(number, resolution) == whole
        trained = resolution if mode == "none" else smallest
        assert config.training_shape(number) == config.patch_shape(number, trained)
    assert config.training_shape(0) == (config.training_resolution,) * 2


def test_the_square_bucket_follows_the_square_rule():
    config = replace(SQUARE, buckets=((64, 64), (96, 48)))
    assert [config.patch_shape(0, size) for size in range(32, 65, 8)] == [
        SQUARE.patch_shape(0, size) for size in range(32, 65, 8)
    ]


def test_a_narrow_bucket_keeps_at_least_one_token():
    config = replace(SQUARE, min_size=8, buckets=((128, 8),))
    assert config.patch_shape(0, 8) == (16, 8) and config.training_shape(0) == (16, 8)


@pytest.mark.parametrize("bucket", [(60, 64), (64, 60), (0, 64), (64, -8)])
def test_a_bucket_off_the_grid_is_refused(bucket):
    message = rf"^PatchSamplingConfig.buckets has {bucket[0]},{bucket[1]}, which are not positive multiples .*8 px"
    with pytest.raises(ValueError, match=message):
        replace(SQUARE, buckets=((64, 64), bucket))


# The sample plan


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("repeats", [1, 5])
def test_batches_have_one_bucket_and_an_epoch_has_every_photo(batch_size, repeats):
    plan = make_plan(batch_size=batch_size, repeats=repeats)
    for epoch in range(3):
        start = epoch * plan.epoch_length
        samples = [plan.sample(index) for index in range(start, start + plan.epoch_length)]
        assert all(sample.bucket == OWN[sample.image] for sample in samples)
        for first in range(0, len(samples), batch_size):
            assert len({sample.bucket for sample in samples[first : first + batch_size]}) == 1
        counts = Counter(sample.image for sample in samples)
        assert set(counts) == set(range(len(OWN))) and min(counts.values()) >= repeats
        for bucket in set(OWN):
            shares = [counts[image] for image, own in enumerate(OWN) if own == bucket]
            assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("batch_size", "repeats", "num_class", "length"),
    [
        (1, 1, 0, 7),
        (2, 1, 0, 4 + 2 + 2),
        (4, 1, 0, 4 + 4 + 4),
        (3, 5, 0, 21 + 12 + 6),
        (1, 3, 0, 21),
        # With more class images than photos, an epoch is as long as it takes to see each.
        (1, 1, 70, 70),
        (4, 1, 70, 40 + 20 + 12),
    ],
)
def test_an_epoch_fills_every_bucket_up_to_whole_batches(batch_size, repeats, num_class, length):
    images = {"instance": len(OWN), **({"class": num_class} if num_class else {})}
    plan = make_plan(batch_size=batch_size, repeats=repeats, num_images=images)
    assert plan.epoch_length == length and plan.epoch_length % batch_size == 0


def test_without_buckets_an_epoch_is_as_before():
    plan = make_plan(buckets=None, patch=SQUARE, batch_size=4)
    assert plan.epoch_length == len(OWN)
    assert {plan.sample(index).image for index in range(len(OWN))} == set(range(len(OWN)))
    assert {plan.sample(index).bucket for index in range(20)} == {0}


def test_class_samples_take_the_bucket_of_the_instance_sample_they_are_trained_with():
    plan = make_plan(num_images={"instance": len(OWN), "class": 5})
    seen = defaultdict(set)
    for index in range(3 * plan.epoch_length):
        of_class = plan.sample(index, "class")
        assert of_class.bucket == plan.sample(index).bucket
        seen[of_class.bucket].add(of_class.image)
    assert set(seen) == {0, 1, 2} and set().union(*seen.values()) == set(range(5))


def test_the_same_seed_gives_the_same_plan_in_any_order_and_another_seed_another():
    count = 40
    forwards = [make_plan().sample(index) for index in range(count)]
    plan = make_plan()
    assert [plan.sample(index) for index in reversed(range(count))] == forwards[::-1]
    others = [make_plan(seed=8).sample(index) for index in range(count)]
    assert [sample.image for sample in forwards] != [sample.image for sample in others]


def test_epochs_differ_in_the_order_of_batches_and_of_photos():
    plan = make_plan(batch_size=2, repeats=4)
    epochs = [
        [plan.sample(epoch * plan.epoch_length + index) for index in range(plan.epoch_length)] for epoch in (0, 1)
    ]
    assert [s.bucket for s in epochs[0]] != [s.bucket for s in epochs[1]]
    of_square = [[s.image for s in epoch if s.bucket == 0] for epoch in epochs]
    assert of_square[0] != of_square[1]


def test_fixed_crops_stay_the_same_for_an_image():
    plan = make_plan(fixed_crops=True, patch=replace(BUCKETED, mode="none"))
    crops = defaultdict(set)
    for sample in map(plan.sample, range(3 * plan.epoch_length)):
        crops[sample.image].add((sample.top, sample.left, sample.flip, sample.bucket))
    assert set(crops) == set(range(len(OWN))) and all(len(seen) == 1 for seen in crops.values())


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_crops_have_one_shape_with_class_images_of_any_aspect_ratio(mode):
    sizes = [{0: (80, 80), 1: (120, 60), 2: (60, 120)}[bucket] for bucket in OWN]
    sources = {
        "instance": PhotoSource(photo_set(*(picture(*size) for size in sizes)), "a sks dog"),
        "class": PhotoSource(photo_set(picture(70, 70), picture(64, 128)), "a dog"),
    }
    patch = replace(BUCKETED, mode=mode)
    plan = make_plan(num_images={"instance": len(OWN), "class": 2}, patch=patch, batch_size=2)
    maker = SampleMaker(plan, sources, None, {}, "cpu", torch.float32)
    shapes = set()
    for first in range(0, plan.epoch_length, 2):
        samples = maker.samples(range(first, first + 2))
        crops = torch.stack([maker.crop(sample) for sample in samples])
        assert [sample.kind for sample in samples] == ["instance"] * 2 + ["class"] * 2
        assert crops.shape == (4, 3, *patch.training_shape(samples[0].bucket))
        shapes.add(crops.shape[2:])
    assert shapes == {patch.training_shape(bucket) for bucket in range(3)}


# Caption dropout


@pytest.mark.parametrize("buckets", [None, OWN], ids=["square", "buckets"])
@pytest.mark.parametrize("kind", ["instance", "class"])
def test_caption_dropout_changes_nothing_but_the_caption(kind, buckets):
    images = {"instance": len(OWN), "class": 5}
    plans = [make_plan(caption_dropout=part, num_images=images, buckets=buckets) for part in (0.0, 0.3, 0.9)]
    for index in range(150):
        samples = [plan.sample(index, kind) for plan in plans]
        assert len({replace(sample, drop_caption=False) for sample in samples}) == 1
        dropped = [sample.drop_caption for sample in samples]
        # What a small part drops, a larger one drops as well.
        assert not dropped[0] and dropped == sorted(dropped)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_captions_are_dropped_as_often_as_asked_for(part):
    count = 2000
    plan = make_plan(caption_dropout=part)
    dropped = sum(plan.sample(index).drop_caption for index in range(count))
    # Four standard deviations.
    assert abs(dropped / count - part) <= 4 * math.sqrt(part * (1 - part) / count)


def test_dropped_captions_do_not_go_by_photo_timestep_or_flip():
    count = 2000
    samples = [make_plan(caption_dropout=0.5).sample(index) for index in range(count)]
    dropped = np.array([sample.drop_caption for sample in samples], dtype=float)
    for values in (
        [sample.timestep_index for sample in samples],
        [sample.flip for sample in samples],
        [sample.top for sample in samples],
        [sample.image == 0 for sample in samples],
    ):
        # Four standard deviations of the correlation of independent draws.
        assert abs(np.corrcoef(dropped, np.array(values, dtype=float))[0, 1]) <= 4 / math.sqrt(count)


def test_a_dropped_caption_is_an_empty_prompt_and_the_others_stay():
    sources = {"instance": PhotoSource(photo_set(*[picture(64, 64)] * len(OWN)), "a sks dog")}
    plan = make_plan(caption_dropout=0.5)
    maker = SampleMaker(plan, sources, None, {}, "cpu", torch.float32)
    samples = maker.samples(range(30))
    assert [maker.prompt(s) for s in samples] == ["" if s.drop_caption else "a sks dog" for s in samples]
    assert {maker.prompt(sample) for sample in samples} == {"", "a sks dog"}
