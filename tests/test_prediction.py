"""Times of a plan: what a run has to do, and seconds from speeds that are measured on this device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blockskip_hooks.cli.arguments import parse_args
from blockskip_hooks.cli.preparation import prepare_run
from blockskip_hooks.cli.run_plan import describe_plan, plan_for
from blockskip_hooks.planning.description import format_plan
from blockskip_hooks.reporting import prediction, speeds
from blockskip_hooks.reporting.prediction import expect_work, pieces_of_run, predict_seconds
from blockskip_hooks.reporting.progress import Progress
from blockskip_hooks.reporting.speeds import Speeds, measure_speeds
from blockskip_hooks.training.settings import Run
from blockskip_hooks.utils.monitor import StageMonitor
from tests import script
from tests.tiny import TinyFamily


CPU = torch.device("cpu")
BEACH = "a photo of sks dog on the beach"
SPEEDS = Speeds(train=1e9, forward=2e9, encode=4e9, decode=5e9, read=1e8)


@pytest.fixture
def prepare(model: Path, photos: Path, tmp_path: Path):
    """A prepared run with its plan and stretches."""

    def run(*flags: str):
        prepared = prepare_run(parse_args(script.settings(model, photos, tmp_path / "out", *flags)))
        plan = plan_for(prepared, torch.float32, 1)
        return prepared, plan, prepared.stretches(plan, 1, None)

    return run


def predicted(run: Run, plan: dict, stretches, monkeypatch: pytest.MonkeyPatch, speeds: Speeds = SPEEDS) -> dict:
    monkeypatch.setattr(prediction, "measure_speeds", lambda *_: speeds)
    predict_seconds(run, plan, torch.float32, CPU, stretches)
    return {stage["name"]: stage["seconds"] for stage in plan["stages"]}


def test_pieces_of_a_run(prepare):
    flags = ("--skip_blocks", "1,2", "--no-refresh_residuals")
    run, plan, stretches = prepare(*flags, "--record_repeats", "2", "--gradient_accumulation_steps", "3")
    assert pieces_of_run(run, plan, stretches, 1) == {
        "prompts": 1, "photos": 12, "records": 12, "steps": 4, "images": 0,
    }  # fmt: skip
    run, plan, stretches = prepare("--skip_blocks", "none")
    assert pieces_of_run(run, plan, stretches, 1)["records"] == 0


def test_pieces_that_are_left_of_a_resumed_run(prepare):
    run, plan, stretches = prepare("--skip_blocks", "1,2", "--stretch_steps", "2")
    left = pieces_of_run(run, plan, stretches, 1, first_step=3)
    assert left["steps"] == 1 and left["records"] == 4


def test_images_are_those_that_a_run_makes(prepare, model: Path, photos: Path, tmp_path: Path):
    """Steps 2, 4 and 6 validate; the base model's images are made once, whenever they are wanted first."""
    flags = (
        "--skip_blocks",
        "1,2",
        "--max_train_steps",
        "7",
        "--validation_prompt",
        BEACH,
        "--validation_epochs",
        "1",
    )
    flags += ("--num_validation_images", "2")
    run, plan, stretches = prepare(*flags)
    assert pieces_of_run(run, plan, stretches, 1)["images"] == 2 * (3 + 2)
    shown: list[int] = []
    module = script.load_script()
    with pytest.MonkeyPatch.context() as patch:
        original = module.Progress.stage

        def spy(self, name, initial=0, **pieces):
            shown.extend(pieces.values() if name == "validate" else ())
            return original(self, name, initial, **pieces)

        patch.setattr(module.Progress, "stage", spy)
        script.train(model, photos, tmp_path / "out", *flags)
    assert sum(shown) == 2 * (3 + 2)


def test_a_run_that_ends_has_nothing_left(model: Path, photos: Path, tmp_path: Path):
    seen: list[Progress] = []
    module = script.load_script()
    with pytest.MonkeyPatch.context() as patch:
        original = module.expect_work
        patch.setattr(module, "expect_work", lambda *args: (seen.append(args[0]), original(*args)))
        flags = ("--skip_blocks", "1,2", "--stretch_steps", "3", "--validation_prompt", BEACH)
        script.train(model, photos, tmp_path / "out", *flags)
    assert seen[-1].seconds_left() == 0.0
    assert all(seen[-1].seconds_of(kind) for kind in ("photos", "records", "steps", "images"))


def test_seconds_grow_with_what_there_is_to_do(prepare, monkeypatch):
    flags = ("--skip_blocks", "1,2", "--validation_prompt", BEACH)
    few = predicted(*prepare(*flags), monkeypatch)
    many = predicted(*prepare(*flags, "--max_train_steps", "40"), monkeypatch)
    assert many["train"] == pytest.approx(10 * few["train"])
    assert many["precompute"] > 5 * few["precompute"]
    assert many["encode"] == few["encode"] and many["validate"] == few["validate"]
    slow = predicted(*prepare(*flags), monkeypatch, replace(SPEEDS, train=1e7))
    assert slow["train"] > few["train"] and slow["precompute"] == few["precompute"]
    repeated = predicted(*prepare(*flags, "--num_validation_images", "8"), monkeypatch)
    assert repeated["validate"] == pytest.approx(2 * few["validate"])


def test_what_is_not_known_is_a_dash(prepare, monkeypatch):
    run, plan, stretches = prepare("--skip_blocks", "1,2")

    def broken(*_):
        raise RuntimeError("a model of its own")

    monkeypatch.setattr(prediction, "measure_speeds", broken)
    predict_seconds(run, plan, torch.float32, CPU, stretches)
    assert {stage["seconds"] for stage in plan["stages"]} == {None}
    text = describe_plan(run, plan)
    assert "no time is predicted" in text and "–" in text and "Time " not in text
    progress = Progress()
    expect_work(progress, run, plan, stretches, 1)
    assert progress.seconds_left() is None


def test_the_first_screen(prepare, monkeypatch, photos: Path, tmp_path: Path):
    run, plan, stretches = prepare("--skip_blocks", "1,2", "--report_to", "tensorboard", "--logging_dir", "logged")
    predicted(run, plan, stretches, monkeypatch)
    plan["stages"][1]["seconds"], plan["stages"][2]["seconds"] = 125.0, 5000.0
    lines = describe_plan(run, plan).splitlines()
    assert lines[0].startswith("Model ") and lines[1].startswith(f"Photos   3 from {photos}")
    assert lines[2] == "Blocks   □■■□□" and "2 of 5 train" in lines[3]
    assert any("times are estimates for this device" in line for line in lines)
    times = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert "  2 min" in times["precompute"] and "  1 h 23 min" in times["train"]
    assert "Time     about 1 h 25 min in all" in lines
    out = tmp_path / "out"
    written = [line.removeprefix("Writes   ") for line in lines if line.startswith("Writes")]
    assert written[0] == f"LoRA: {out / 'pytorch_lora_weights.safetensors'}"
    assert f"tracker logs: {out / 'logged'} (tensorboard)" in written
    assert f"records: {out / 'residuals'} (removed at the end)" in written


def test_part_of_the_times_is_said_to_be_a_part(prepare, monkeypatch):
    run, plan, stretches = prepare("--skip_blocks", "1,2")
    predicted(run, plan, stretches, monkeypatch)
    plan["stages"][0]["seconds"] = None
    assert "in all, and what has no estimate" in format_plan(plan)


def test_time_left_before_anything_is_measured_is_the_plan_s(prepare, monkeypatch):
    run, plan, stretches = prepare("--skip_blocks", "1,2", "--validation_prompt", BEACH, "--no-refresh_residuals")
    seconds = predicted(run, plan, stretches, monkeypatch)
    progress = Progress(StageMonitor())
    expect_work(progress, run, plan, stretches, 1)
    assert progress.seconds_left() == pytest.approx(sum(seconds.values()))
    expect_work(progress, run, plan, stretches, 1, 2)
    assert progress.seconds_left() == pytest.approx(seconds["precompute"] + seconds["train"] / 2 + seconds["validate"])


def test_a_block_that_would_take_long_sees_less(prepare, monkeypatch):
    run, plan, _ = prepare("--skip_blocks", "1,2", "--max_sequence_length", "64")
    seen: list[tuple] = []
    original = speeds.FakeTransformer.block_inputs

    def spy(self, names, *shape):
        seen.append(shape)
        return original(self, names, *shape)

    monkeypatch.setattr(speeds.FakeTransformer, "block_inputs", spy)
    measured = measure_speeds(run, plan, torch.float32, CPU)
    monkeypatch.setitem(speeds.LARGEST_FORWARD, "cpu", 1.0)
    reduced = measure_speeds(run, plan, torch.float32, CPU)
    assert seen == [(2, (32, 32), 64), (1, (16, 16), 32)]
    assert reduced.train > 0 and measured.train > 0


def test_speeds_of_every_family(tiny: TinyFamily, photos: Path, tmp_path: Path):
    """Every family's blocks and VAE run on numbers that are none of its own."""
    flags = script.settings(
        tiny.folder, photos, tmp_path / "out", "--skip_blocks", "1,1", "--validation_prompt", BEACH,
        resolution=tiny.resolution,
    )  # fmt: skip
    run = prepare_run(parse_args(flags))
    plan = plan_for(run, torch.float32, 1)
    found = measure_speeds(run, plan, torch.float32, CPU)
    measured = (found.train, found.forward, found.encode, found.decode, found.read)
    assert all(speed is not None and 0 < speed < 1e15 for speed in measured)
