"""Runs of two processes by gloo: they share the work, equal one process, and do not wait for a dead one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

from blockskip_hooks.planning.plan import planned_stage
from blockskip_hooks.training.checkpoints import list_checkpoints
from tests import script
from tests.kills import KillTest
from tests.tiers import fast_first
from tests.tiny import TINY_FAMILIES


TOLERANCE = 1e-5
"""Of weights and losses: gradients of two processes are added in another order."""
LAST_BATCH = 8
"""Four steps of two batches."""
ONE, TWO = ("--train_batch_size", "4"), ("--train_batch_size", "2")
FLAGS = (
    *("--skip_blocks", "1,2", "--gradient_accumulation_steps", "2", "--residual_budget", "1MB"),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--checkpointing_steps", "2"),
    # Records of the LoRA so far carry its last bits into the next steps.
    "--no-refresh_residuals",
)


SHARED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    # By default; it is for models that accelerate sends to the other processes, and nothing here is one.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What accelerate's launcher sets for ``configs/fsdp2.yaml``."""


@pytest.fixture(scope="module", params=fast_first(["flux-dev", "sana"]))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KillTest:
    """With a run of one process, ``whole``, that all runs of two must equal."""
    folder = tmp_path_factory.mktemp(request.param)
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == request.param)
    photos = script.save_photos(folder / "photos", [(80, 64), (64, 64), (64, 96)])
    sizes = {"resolution": tiny.resolution, "text_tokens": tiny.text_tokens}
    return KillTest(tiny.folder, photos, folder, (*FLAGS, *ONE), sizes)


def assert_like_one_process(runs: KillTest, name: str) -> dict:
    """The run's report, once its losses and weights were compared."""
    whole, output = runs.scratch / "whole" / "out", runs.scratch / name / "out"
    assert script.losses(output) == pytest.approx(script.losses(whole), rel=TOLERANCE)
    expected, actual = script.weights(whole), script.weights(output)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).abs().max() <= TOLERANCE, key
    assert not (output / "residuals").exists()
    return json.loads((output / "run_report.json").read_text())


def test_two_processes_equal_one(runs: KillTest):
    assert runs.run_ranks("two", more=TWO) == [0, 0], runs.log("two")
    whole = json.loads((runs.scratch / "whole" / "out" / "run_report.json").read_text())
    report = assert_like_one_process(runs, "two")
    assert report["residuals"]["records"] == whole["residuals"]["records"] == 32
    assert report["train"]["samples"] == whole["train"]["samples"] == 32


@pytest.mark.slow
def test_two_processes_refresh_the_same_records(runs: KillTest):
    """Losses alone: where a gradient is next to nothing, Adam makes a step of its last bits."""
    assert runs.run_ranks("two refreshed", more=(*TWO, "--refresh_residuals")) == [0, 0], runs.log("two refreshed")
    assert runs.run_ranks("one refreshed", (0,), ("--refresh_residuals",)) == [0], runs.log("one refreshed")
    two, one = runs.scratch / "two refreshed" / "out", runs.scratch / "one refreshed" / "out"
    assert script.losses(two) == pytest.approx(script.losses(one), rel=TOLERANCE)
    assert script.losses(one) != pytest.approx(script.losses(runs.scratch / "whole" / "out"), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, SHARED], ids=["whole weights", "shared weights"])
@pytest.mark.parametrize("resumed_by", ["two", "one"])
def test_a_dead_process_ends_the_other_and_the_run_goes_on_later(
    runs: KillTest, resumed_by: str, environment: dict[str, str]
):
    name = f"killed, then {resumed_by}, {'shared' if environment else 'whole'}"
    assert runs.run_ranks(name, (0, LAST_BATCH), TWO, environment) == [1, -9], runs.log(name)
    assert runs.log(name).count("error: Another process of this run ended") == 1
    assert "Traceback" not in runs.log(name)
    output = runs.scratch / name / "out"
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2"]
    codes = runs.run_ranks(name, (0, 0), TWO, environment) if resumed_by == "two" else [runs.run(name)]
    assert set(codes) == {0}, runs.log(name)
    assert_like_one_process(runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, SHARED], ids=["whole weights", "shared weights"])
def test_a_signal_to_one_process_ends_both_after_the_same_step(
    runs: KillTest, environment: dict[str, str], monkeypatch
):
    monkeypatch.setattr(runs, "fault", "term")
    name = f"stopped, {'shared' if environment else 'whole'}"
    assert runs.run_ranks(name, (0, LAST_BATCH - 2), TWO, environment) == [143, 143], runs.log(name)
    assert runs.log(name).count("Stopped by SIGTERM") == 1
    checkpoints = list_checkpoints(runs.scratch / name / "out")
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-3"]
    assert runs.run_ranks(name, (0, 0), TWO, environment) == [0, 0], runs.log(name)
    assert_like_one_process(runs, name)


@pytest.mark.slow
def test_two_processes_share_the_images_and_make_those_of_one(runs: KillTest):
    images = ("--validation_prompt", "a dog", "--num_validation_images", "3", "--validation_epochs", "1")
    # Small steps, so that by plan the pipeline is called once for each image.
    flags = (*images, "--report_to", "tensorboard", "--min_patch_size", "16", "--train_batch_size")
    assert runs.run_ranks("one, images", (0,), (*flags, "2")) == [0], runs.log("one, images")
    assert runs.run_ranks("two, images", (0, 0), (*flags, "1")) == [0, 0], runs.log("two, images")
    for name in ("one", "two"):
        plan = json.loads((runs.scratch / f"{name}, images" / "out" / "plan.json").read_text())
        assert planned_stage(plan, "validate").batch_size == 1
    one, two = (logged_images(runs.scratch / f"{name}, images" / "out") for name in ("one", "two"))
    assert one.keys() == two.keys() and sum("/seed " in name for name in one) >= 3
    for name, pair in one.items():
        middle = pair.shape[1] // 2
        # Upstream's tags have no pairs, but images of the LoRA alone.
        if "/seed " in name:
            assert (two[name][:, :middle] == pair[:, :middle]).all(), "the base model's"
        # The LoRA's weights differ in their last bits.
        assert abs(two[name].astype(int) - pair).max() <= 2


FOLLOWING = {
    "records that follow the LoRA": ("--refresh_residuals",),
    "online residuals": ("--residuals", "online"),
    "images": ("--validation_prompt", "a dog", "--num_validation_images", "1", "--report_to", "tensorboard"),
}
"""All of what runs the shared model."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_run_with_shared_weights_is_the_same_bit_for_bit(runs: KillTest, name: str):
    flags = (*TWO, *FOLLOWING[name])
    assert runs.run_ranks(f"whole, {name}", more=flags) == [0, 0], runs.log(f"whole, {name}")
    assert runs.run_ranks(f"shared, {name}", (0, 0), flags, SHARED) == [0, 0], runs.log(f"shared, {name}")
    whole, shared = (runs.scratch / f"{weights}, {name}" / "out" for weights in ("whole", "shared"))
    script.assert_same_weights(shared, whole)
    assert script.losses(shared) == script.losses(whole)
    assert "divide the frozen weights" in runs.log(f"shared, {name}")
    # The main process logs it, and all processes have run the model for it.
    assert trailing_errors(shared) == trailing_errors(whole)
    assert bool(trailing_errors(shared)) == ("--report_to" in flags)


@pytest.mark.slow
def test_records_lost_in_training_end_a_run_with_shared_weights(runs: KillTest, monkeypatch):
    """A process that made some again would wait for the other's part of the weights for ever."""
    monkeypatch.setattr(runs, "fault", "lose")
    flags = (*TWO, "--max_train_steps", "12", "--residual_budget", "1GB")
    assert runs.run_ranks("lost", (2, 0), flags, SHARED) == [1, 1], runs.log("lost")
    assert "cannot be read, and processes that share weights make records together only" in runs.log("lost")
    assert "Traceback" not in runs.log("lost")
    assert runs.run_ranks("lost", (0, 0), flags, SHARED) == [0, 0], runs.log("lost")


def logged_images(output: Path) -> dict[str, np.ndarray]:
    """The validation images that tensorboard was given, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = {}
    for folder in (output / "logs").glob("*"):
        events = EventAccumulator(str(folder), size_guidance={"images": 0})
        events.Reload()
        for name in events.Tags()["images"]:
            for event in events.Images(name):
                image = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
                images[f"{name} {event.step}"] = np.asarray(image)
    return images


def trailing_errors(output: Path) -> list[float]:
    """What tensorboard was given, if it was."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in (output / "logs").glob("*"):
        events = EventAccumulator(str(folder))
        events.Reload()
        if "trailing_error" in events.Tags()["scalars"]:
            return [event.value for event in events.Scalars("trailing_error")]
    return []


@pytest.mark.parametrize(("name", "kind"), [("multi_gpu", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_the_configs_for_several_gpus_are_ones_that_accelerate_reads(name: str, kind: str):
    folder = script.ROOT / "examples" / "dreambooth_blockskip" / "configs"
    config = load_config_from_file(str(folder / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, 2, "bf16")
