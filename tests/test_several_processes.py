"""Runs of two processes by gloo: they share the work, equal one process, and do not wait for a dead one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from blockskip_hooks.checkpoints import list_checkpoints
from tests import script
from tests.kills import KillTest
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


@pytest.fixture(scope="module", params=["flux-dev", "sana"])
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


def test_two_processes_refresh_the_same_records(runs: KillTest):
    """Losses alone: where a gradient is next to nothing, Adam makes a step of its last bits."""
    assert runs.run_ranks("two refreshed", more=(*TWO, "--refresh_residuals")) == [0, 0], runs.log("two refreshed")
    assert runs.run_ranks("one refreshed", (0,), ("--refresh_residuals",)) == [0], runs.log("one refreshed")
    two, one = runs.scratch / "two refreshed" / "out", runs.scratch / "one refreshed" / "out"
    assert script.losses(two) == pytest.approx(script.losses(one), rel=TOLERANCE)
    assert script.losses(one) != pytest.approx(script.losses(runs.scratch / "whole" / "out"), rel=TOLERANCE)


@pytest.mark.parametrize("resumed_by", ["two", "one"])
def test_a_dead_process_ends_the_other_and_the_run_goes_on_later(runs: KillTest, resumed_by: str):
    name = f"killed, then {resumed_by}"
    assert runs.run_ranks(name, at_batch=(0, LAST_BATCH), more=TWO) == [1, -9], runs.log(name)
    assert runs.log(name).count("error: Another process of this run ended") == 1
    assert "Traceback" not in runs.log(name)
    output = runs.scratch / name / "out"
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-2"]
    codes = runs.run_ranks(name, more=TWO) if resumed_by == "two" else [runs.run(name)]
    assert set(codes) == {0}, runs.log(name)
    assert_like_one_process(runs, name)


def test_a_signal_to_one_process_ends_both_after_the_same_step(runs: KillTest, monkeypatch):
    monkeypatch.setattr(runs, "fault", "term")
    assert runs.run_ranks("stopped", at_batch=(0, LAST_BATCH - 2), more=TWO) == [143, 143], runs.log("stopped")
    assert runs.log("stopped").count("Stopped by SIGTERM") == 1
    assert [path.name for path in list_checkpoints(runs.scratch / "stopped" / "out")] == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert runs.run_ranks("stopped", more=TWO) == [0, 0], runs.log("stopped")
    assert_like_one_process(runs, "stopped")


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused_in_one_line(name: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    (tiny,) = (tiny for tiny in TINY_FAMILIES if tiny.name == "flux-dev")
    photos = script.save_photos(tmp_path / "photos", [(64, 64)])
    assert script.load_script().main(script.settings(tiny.folder, photos, tmp_path / "out")) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert f"asks for {name}" in line and "configs/multi_gpu.yaml" in line


def test_the_config_for_several_gpus_is_one_that_accelerate_reads():
    config = load_config_from_file(
        str(script.ROOT / "examples" / "dreambooth_blockskip" / "configs" / "multi_gpu.yaml")
    )
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == ("MULTI_GPU", 2, "bf16")
