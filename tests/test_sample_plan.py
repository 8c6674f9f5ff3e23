"""The sample plan: exact patch sizes, upstream's timesteps, uniform crops, and one answer per (seed, i) anywhere."""

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image

from blockskip_hooks.config import PatchSamplingConfig
from blockskip_hooks.data.photo_set import PhotoSet
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.data.sample_plan import SamplePlan
from blockskip_hooks.patch_sampling import patch_size_for
from blockskip_hooks.residuals.batches import PhotoSource, SampleMaker
from blockskip_hooks.utils.seeds import derived_seed


T = 1000
RANGES = [(256, 512, 16), (32, 64, 8), (240, 400, 16), (512, 1024, 16), (48, 56, 8), (96, 224, 32), (64, 64, 8)]
TIMESTEPS = FlowMatchEulerDiscreteScheduler().timesteps
SHIFTED = FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps
DYNAMIC = PatchSamplingConfig(mode="dynamic", min_size=32, max_size=64, multiple=8)


def make_plan(**changes):
    settings = {
        "seed": 7,
        "num_images": {"instance": 5},
        "timesteps": TIMESTEPS,
        "patch": DYNAMIC,
        "random_flip": True,
    }
    return SamplePlan(**{**settings, **changes})


def nearest_on_grid(low, high, thousandths, multiple):
    """Eq. 1 at t = thousandths / 1000 in whole numbers, rounded to the grid, halves up."""
    size = low * T + thousandths * (high - low)
    return min(max((2 * size + T * multiple) // (2 * T * multiple) * multiple, low), high)


def ks_distance(left, right):
    """Largest difference of two empirical distribution functions."""
    left, right = np.sort(left), np.sort(right)
    values = np.concatenate([left, right])
    cdfs = [np.searchsorted(part, values, side="right") / len(part) for part in (left, right)]
    return np.abs(cdfs[0] - cdfs[1]).max()


def ks_limit(n, m=math.inf):
    """Distance that two samples of one distribution exceed once in a thousand times."""
    return 1.95 * math.sqrt(1 / n + 1 / m)


# Patch sizes


@pytest.mark.parametrize(("low", "high", "multiple"), RANGES)
def test_dynamic_size_is_eq_1_on_the_grid_at_every_timestep(low, high, multiple):
    config = PatchSamplingConfig(mode="dynamic", min_size=low, max_size=high, multiple=multiple)
    sizes = [patch_size_for(config, t / T) for t in range(T + 1)]
    assert sizes == [nearest_on_grid(low, high, t, multiple) for t in range(T + 1)]
    assert sizes[0] == low and sizes[-1] == high and sizes == sorted(sizes)
    assert set(sizes) == set(range(low, high + 1, multiple))


@pytest.mark.parametrize(("low", "high", "multiple"), RANGES)
def test_high_to_low_is_dynamic_in_reverse(low, high, multiple):
    config = PatchSamplingConfig(mode="high_to_low", min_size=low, max_size=high, multiple=multiple)
    sizes = [patch_size_for(config, t / T) for t in range(T + 1)]
    assert sizes[0] == high and sizes[-1] == low and sizes == sorted(sizes, reverse=True)
    exact = [high - t / T * (high - low) for t in range(T + 1)]
    assert all(abs(size - s) <= multiple / 2 + 1e-9 and size % multiple == 0 for size, s in zip(sizes, exact))


@pytest.mark.parametrize(("low", "high", "multiple"), RANGES)
def test_random_size_follows_the_draw_and_not_the_timestep(low, high, multiple):
    config = PatchSamplingConfig(mode="random", min_size=low, max_size=high, multiple=multiple)
    for u in range(T):
        sizes = {patch_size_for(config, t, u / T) for t in (0.0, 0.3, 1.0)}
        assert sizes == {nearest_on_grid(low, high, u, multiple)}


@pytest.mark.parametrize("mode", ["none", "resize"])
def test_none_and_resize_always_take_the_largest_crop(mode):
    config = PatchSamplingConfig(mode=mode, min_size=32, max_size=64, multiple=8)
    assert {patch_size_for(config, t / T, u) for t in range(T + 1) for u in (0.0, 0.5)} == {64}


def test_only_mode_none_trains_at_the_largest_size():
    resolutions = {
        mode: PatchSamplingConfig(mode=mode, min_size=32, max_size=64, multiple=8).training_resolution
        for mode in ("dynamic", "high_to_low", "random", "resize", "none")
    }
    assert resolutions == {"dynamic": 32, "high_to_low": 32, "random": 32, "resize": 32, "none": 64}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"min_size": 30, "max_size": 64, "multiple": 8}, ["PatchSamplingConfig.min_size is 30", "8 px", "use 32"]),
        ({"min_size": 32, "max_size": 60, "multiple": 16}, ["PatchSamplingConfig.max_size is 60", "16 px", "use 64"]),
        ({"min_size": 0, "max_size": 64, "multiple": 8}, ["PatchSamplingConfig.min_size is 0", "above 0"]),
        (
            {"min_size": 64, "max_size": 32, "multiple": 8},
            ["PatchSamplingConfig.min_size 64", "PatchSamplingConfig.max_size 32"],
        ),
        (
            {"mode": "big", "min_size": 32, "max_size": 64, "multiple": 8},
            ["PatchSamplingConfig.mode is 'big'", "dynamic"],
        ),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes, words):
    with pytest.raises(ValueError) as error:
        PatchSamplingConfig(**sizes)
    assert [word for word in words if word not in str(error.value)] == [] and "\n" not in str(error.value)


# Timesteps


@pytest.mark.parametrize("timesteps", [TIMESTEPS, SHIFTED], ids=["plain", "shifted"])
def test_the_size_follows_from_the_timestep_that_was_drawn(timesteps):
    plan = make_plan(timesteps=timesteps)
    for sample in map(plan.sample, range(200)):
        t = float(timesteps[sample.timestep_index]) / T
        assert sample.patch_size == patch_size_for(DYNAMIC, t)


def test_the_timestep_is_drawn_first_so_that_patch_settings_do_not_change_it():
    plans = [
        make_plan(patch=replace(DYNAMIC, mode=mode)) for mode in ("dynamic", "high_to_low", "random", "resize", "none")
    ]
    for index in range(100):
        samples = [plan.sample(index) for plan in plans]
        assert len({(s.timestep_index, s.top, s.left, s.flip, s.image, s.noise_seed) for s in samples}) == 1


@pytest.mark.parametrize("timesteps", [TIMESTEPS, SHIFTED], ids=["plain", "shifted"])
@pytest.mark.parametrize(
    "scheme",
    [
        {"weighting_scheme": "none"},
        {"weighting_scheme": "sigma_sqrt"},
        {"weighting_scheme": "cosmap"},
        {"weighting_scheme": "logit_normal"},
        {"weighting_scheme": "logit_normal", "logit_mean": 0.8, "logit_std": 0.5},
        {"weighting_scheme": "mode"},
        {"weighting_scheme": "mode", "mode_scale": 0.5},
    ],
    ids=lambda scheme: "-".join(map(str, scheme.values())),
)
def test_timesteps_are_distributed_as_upstream_draws_them(scheme, timesteps):
    settings = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **scheme}
    generator = torch.Generator().manual_seed(0)
    # As in the upstream training loop, in one batch.
    u = compute_density_for_timestep_sampling(batch_size=100_000, generator=generator, **settings)
    upstream = timesteps[(u * T).long().clamp(max=T - 1)].numpy()
    plan = make_plan(timesteps=timesteps, **scheme)
    count = 1500
    ours = timesteps[[plan.sample(index).timestep_index for index in range(count)]].numpy()
    assert ks_distance(ours, upstream) < ks_limit(count, len(upstream))


def test_the_distribution_test_can_tell_the_schemes_apart():
    drawn = {
        scheme: [make_plan(weighting_scheme=scheme).sample(index).timestep_index for index in range(1500)]
        for scheme in ("none", "logit_normal", "mode")
    }
    for one, other in (("none", "logit_normal"), ("none", "mode"), ("mode", "logit_normal")):
        assert ks_distance(drawn[one], drawn[other]) > ks_limit(1500, 1500)


@pytest.mark.parametrize("mode_scale", [-3.0, -1.0, 0.0, 1.29, 1.75, 8.0])
def test_mode_scheme_never_leaves_the_timesteps(mode_scale):
    plan = make_plan(weighting_scheme="mode", mode_scale=mode_scale)
    indices = [plan.sample(index).timestep_index for index in range(500)]
    assert min(indices) >= 0 and max(indices) < T


@pytest.mark.parametrize(("density", "expected"), [(0.0, 0), (0.9999, 999), (1.0, 999)])
def test_a_draw_at_either_end_is_a_timestep(monkeypatch, density, expected):
    monkeypatch.setattr(
        "blockskip_hooks.data.sample_plan.compute_density_for_timestep_sampling",
        lambda *args, **kwargs: torch.tensor([density]),
    )
    assert make_plan().sample(0).timestep_index == expected


# Identity


def test_the_same_seed_and_number_give_the_same_sample_in_any_order():
    forwards = [make_plan().sample(index) for index in range(50)]
    plan = make_plan()
    backwards = [plan.sample(index) for index in reversed(range(50))]
    torch.manual_seed(123)
    assert forwards == backwards[::-1]
    assert [plan.sample(index) for index in range(50)] == forwards


def test_drawing_samples_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_plan(weighting_scheme="logit_normal").sample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fresh_process_draws_the_same_samples():
    program = (
        "import torch\n"
        "from blockskip_hooks.config import PatchSamplingConfig\n"
        "from blockskip_hooks.data.sample_plan import SamplePlan\n"
        "patch = PatchSamplingConfig(mode='dynamic', min_size=32, max_size=64, multiple=8)\n"
        "plan = SamplePlan(seed=7, num_images={'instance': 5, 'class': 4}, random_flip=True,\n"
        "    timesteps=torch.arange(1000.0, 0, -1), patch=patch, weighting_scheme='logit_normal')\n"
        "print([plan.sample(i, kind) for i in (9, 3, 0, 4_000_000) for kind in ('class', 'instance')])"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": str(Path(__file__).parents[1] / "src")},
        timeout=120,
    )
    plan = make_plan(weighting_scheme="logit_normal", num_images={"instance": 5, "class": 4})
    here = {i: [plan.sample(i, kind) for kind in ("class", "instance")] for i in (0, 3, 9, 4_000_000)}
    expected = [sample for i in (9, 3, 0, 4_000_000) for sample in here[i]]
    assert run.stdout.strip().splitlines()[-1:] == [repr(expected)], run.stderr


def test_derived_seeds_are_the_same_on_every_machine():
    assert derived_seed(7, "noise", "instance", 0) == derived_seed("7", "noise", "instance", "0")
    assert derived_seed(0, "a") == 6612858177627257344
    assert min(derived_seed(i) for i in range(1000)) >= 0 and max(derived_seed(i) for i in range(1000)) < 2**63


def test_other_seeds_give_other_samples():
    one, other = ([make_plan(seed=seed).sample(index) for index in range(40)] for seed in (7, 8))
    assert not {s.noise_seed for s in one} & {s.noise_seed for s in other}
    assert sum(a.timestep_index == b.timestep_index for a, b in zip(one, other)) < 5
    assert not {(s.top, s.left) for s in one} & {(s.top, s.left) for s in other}
    assert [s.image for s in one] != [s.image for s in other]


def test_no_two_samples_share_their_noise_or_their_name():
    plan = make_plan(num_images={"instance": 5, "class": 5})
    samples = [plan.sample(index, kind) for kind in ("instance", "class") for index in range(1000)]
    assert len({s.noise_seed for s in samples}) == len({s.id for s in samples}) == 2000


def test_class_samples_neither_change_nor_follow_the_instance_ones():
    alone, together = make_plan(), make_plan(num_images={"instance": 5, "class": 5})
    instances = [together.sample(index) for index in range(300)]
    assert instances == [alone.sample(index) for index in range(300)]
    classes = [together.sample(index, "class") for index in range(300)]
    assert {s.kind for s in classes} == {"class"}
    for name in ("timestep_index", "top", "left"):
        pair = [[getattr(s, name) for s in part] for part in (instances, classes)]
        assert abs(np.corrcoef(pair)[0, 1]) < 0.2
    assert sum(a.image == b.image for a, b in zip(instances, classes)) < 100


# Images


@pytest.mark.parametrize(("images", "repeats"), [(5, 1), (5, 3), (1, 1), (1, 4), (7, 2)])
def test_every_epoch_sees_every_image_as_often_as_it_is_repeated(images, repeats):
    length = images * repeats
    plan = make_plan(num_images={"instance": images}, repeats=repeats)
    for epoch in range(4):
        seen = Counter(plan.sample(index).image for index in range(epoch * length, (epoch + 1) * length))
        assert seen == dict.fromkeys(range(images), repeats)


def test_epochs_have_orders_of_their_own():
    plan = make_plan(num_images={"instance": 8})
    orders = {tuple(plan.sample(8 * epoch + i).image for i in range(8)) for epoch in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("buckets", [None, (0, 1, 0, 1, 1)])
def test_the_order_of_an_epoch_is_drawn_once_and_does_not_depend_on_who_asks(monkeypatch, buckets):
    patch = replace(DYNAMIC, buckets=((64, 64), (48, 80)) if buckets else ())
    settings = {"num_images": {"instance": 5, "class": 3}, "repeats": 4, "buckets": buckets, "patch": patch}
    asked = [(index, kind) for index in range(70) for kind in ("instance", "class")]
    shuffled = [asked[place] for place in np.random.default_rng(0).permutation(len(asked))]
    plan = make_plan(**settings)
    apart = {request: make_plan(**settings).sample(*request) for request in asked}
    assert {request: plan.sample(*request) for request in shuffled} == apart
    draws, randperm = [], torch.randperm

    def counted(*args, **kwargs):
        draws.append(args)
        return randperm(*args, **kwargs)

    monkeypatch.setattr(torch, "randperm", counted)
    plan = make_plan(**settings)
    assert {request: plan.sample(*request) for request in asked} == apart
    epochs = -(-70 // plan.epoch_length)
    # With buckets, one for each of them, one for the batches, and one for the class images.
    assert len(draws) == epochs * (4 if buckets else 2)


def test_the_order_of_an_epoch_follows_from_seed_kind_and_epoch():
    plan = make_plan(repeats=3)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(derived_seed(7, "order", "instance", epoch))
        expected = [image % 5 for image in torch.randperm(15, generator=generator).tolist()]
        assert [plan.sample(15 * epoch + place).image for place in range(15)] == expected


def test_a_kind_with_fewer_images_than_the_epoch_uses_them_evenly():
    plan = make_plan(num_images={"instance": 7, "class": 3})
    for epoch in range(3):
        seen = Counter(plan.sample(7 * epoch + i, "class").image for i in range(7))
        assert sorted(seen) == [0, 1, 2] and max(seen.values()) - min(seen.values()) <= 1


# Crops and flips


def test_crop_positions_are_uniform_and_independent():
    samples = [make_plan().sample(index) for index in range(3300)]
    tops, lefts = np.array([s.top for s in samples]), np.array([s.left for s in samples])
    for values in (tops, lefts):
        assert values.min() >= 0 and values.max() < 1
        # Offsets of a 32 px patch in 64 px: 33 bins; chi-square exceeds 62.5 at 32 degrees of freedom in 1 of 1000.
        counts = np.bincount((values * 33).astype(int), minlength=33)
        assert len(counts) == 33 and ((counts - 100) ** 2 / 100).sum() < 62.5
    timesteps = [s.timestep_index for s in samples]
    correlations = np.corrcoef([tops, lefts, timesteps, [s.flip for s in samples]])
    assert np.abs(correlations - np.eye(4)).max() < 0.06


def test_half_of_the_samples_are_mirrored_and_none_without_the_flag():
    flips = sum(make_plan().sample(index).flip for index in range(2000))
    assert abs(flips - 1000) < 3.3 * math.sqrt(500)
    assert not any(make_plan(random_flip=False).sample(index).flip for index in range(50))


def test_mirroring_does_not_move_crops():
    pairs = [(make_plan().sample(i), make_plan(random_flip=False).sample(i)) for i in range(20)]
    assert all(replace(a, flip=False) == b for a, b in pairs)


def test_fixed_crops_depend_on_the_image_alone_and_timesteps_still_vary():
    plan = make_plan(patch=replace(DYNAMIC, mode="none"), fixed_crops=True)
    samples = [plan.sample(index) for index in range(100)]
    crops = {(s.image, s.top, s.left, s.flip, s.patch_size) for s in samples}
    assert len(crops) == 5 and len({crop[1:3] for crop in crops}) == 5
    assert len({s.timestep_index for s in samples}) > 80 and len({s.noise_seed for s in samples}) == 100
    free = make_plan(patch=replace(DYNAMIC, mode="none"))
    assert [s.timestep_index for s in samples] == [free.sample(index).timestep_index for index in range(100)]


@pytest.fixture
def photos(tmp_path):
    """Two photos whose red and green tell column and row."""
    rows, columns = np.mgrid[0:64, 0:80].astype(np.uint8)
    for number in range(2):
        pixels = np.stack([columns, rows, np.full_like(rows, 100 * number)], axis=-1)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return PhotoSet(scan_photos(tmp_path), 64)


def make_maker(plan, photos):
    return SampleMaker(plan, {"instance": PhotoSource(photos, "a photo")}, None, {}, "cpu", torch.float32)


@pytest.mark.parametrize("mode", ["dynamic", "high_to_low", "random", "resize", "none"])
def test_the_same_sample_twice_is_the_same_tensor(photos, mode):
    settings = {"num_images": {"instance": 2}, "patch": replace(DYNAMIC, mode=mode)}
    first, second = (make_maker(make_plan(**settings), photos) for _ in range(2))
    crops = [first.crop(sample) for sample in first.samples(range(10))]
    side = 64 if mode == "none" else 32
    assert {tuple(crop.shape) for crop in crops} == {(3, side, side)}
    again = [second.crop(sample) for sample in reversed(second.samples(range(10)))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(crops, again))
    assert not torch.equal(crops[0], crops[1])


def test_crops_are_the_pixels_the_sample_names(photos):
    plan = make_plan(num_images={"instance": 2}, patch=replace(DYNAMIC, mode="none"))
    maker = make_maker(plan, photos)
    for sample in maker.samples(range(20)):
        red, green, blue = (maker.crop(sample) * 0.5 + 0.5).mul(255).round().int()
        left = int(sample.left * 17)
        columns = torch.arange(left, left + 64, dtype=torch.int32)
        assert torch.equal(red[0], columns.flip(0) if sample.flip else columns)
        assert torch.equal(green[:, 0], torch.arange(64, dtype=torch.int32))
        assert blue.unique().tolist() == [100 * sample.image]


def test_center_crop_ignores_positions(photos):
    plan = make_plan(num_images={"instance": 1}, center_crop=True, random_flip=False)
    maker = make_maker(replace(plan, patch=replace(DYNAMIC, mode="none")), photos)
    crops = [maker.crop(sample) for sample in maker.samples(range(5))]
    assert all(torch.equal(crop, crops[0]) for crop in crops)
    assert (crops[0][0, 0, 0] * 0.5 + 0.5).mul(255).round() == 8


def test_samples_of_a_step_are_instance_first(photos):
    plan = make_plan(num_images={"instance": 2, "class": 2})
    source = PhotoSource(photos, "a photo")
    maker = SampleMaker(plan, {"instance": source, "class": source}, None, {}, "cpu", torch.float32)
    names = [sample.id for sample in maker.samples([3, 4])]
    assert names == ["instance-00000003", "instance-00000004", "class-00000003", "class-00000004"]
