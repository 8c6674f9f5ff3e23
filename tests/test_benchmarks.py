"""The benchmark scripts start, and on a tiny model they run and write valid JSON; figures are not tested here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState

from blockskip_hooks.evaluation.metrics import Evaluation
from tests.tiers import fast_first


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = ("cells.py", "common.py", "full_size.py")
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.name not in SHARED)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a benchmark script; in this process, because each new one would import torch again for seconds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load_script(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses with postponed annotations look their module up.
        monkeypatch.setitem(__import__("sys").modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_script


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help(path: Path, load, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        load(path).main(["--help"])
    assert exit_info.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("name", fast_first(["plain_overhead", "step_time", "full_size_flux", "full_size_sana"], 2))
def test_smoke(name: str, load, tmp_path: Path) -> None:
    # Precision is one per process, and another test may have set it.
    AcceleratorState._reset_state(reset_partial_state=True)
    file = tmp_path / "figures.json"
    more = ["--in_turn"] if name == "full_size_flux" else []
    assert load(BENCHMARKS / f"{name}.py").main(["--smoke", "--json", str(file), *more]) == 0
    figures = json.loads(file.read_text())
    assert figures["schema"] == 1
    assert figures["benchmark"] == name
    assert figures["results"]
    if more:
        assert figures["results"][0]["precompute_seconds_in_turn"] > 0
    assert str(tmp_path) not in json.dumps(figures["settings"])


def test_a_plan_is_off_by_a_tenth_and_by_more_than_workspaces(load) -> None:
    check = load(BENCHMARKS / "gpu_check.py")
    mib = 2**20
    assert not check.is_off(1050 * mib, 1000 * mib) and not check.is_off(950 * mib, 1000 * mib)
    assert check.is_off(1150 * mib, 1000 * mib) and check.is_off(850 * mib, 1000 * mib)
    assert not check.is_off(20 * mib, 40 * mib)
    plan = {"stages": [{"name": "train", "peak_device_bytes": 850 * mib, "peak_reserved_bytes": 1200 * mib}]}
    measured = {
        "name": "train",
        "peak_device_bytes": 1000 * mib,
        "peak_device_reserved_bytes": 1200 * mib,
        "seconds": 1.0,
    }
    for device, compared in {"cuda": {"live", "reserved"}, "xpu": {"live"}}.items():
        (stage,) = check.compare({"stages": [measured], "machine": {"device": device}}, plan)
        assert stage["off"] == ["live"] and set(stage["errors"]) == compared


def test_without_an_accelerator_the_gpu_check_says_so(load, capsys: pytest.CaptureFixture[str]) -> None:
    assert load(BENCHMARKS / "gpu_check.py").main([]) == 2
    assert "--smoke" in capsys.readouterr().err


def test_a_trial_is_paired_with_the_row_that_it_varies(load) -> None:
    trials = load(BENCHMARKS / "trials.py")
    torch.manual_seed(0)
    inputs, wanted = torch.randn(4000, 6), torch.randn(6, 6)
    found = trials.ridge_map(inputs.T @ inputs, inputs.T @ (inputs @ wanted))
    # The ridge shrinks it: all channels of the inputs are equally large.
    torch.testing.assert_close(found * (1 + trials.RIDGE), wanted, rtol=0, atol=0.1)
    cells = [
        {"row": row, "subject": "dog", "seed": 0, "images": [value, value + 0.1], "processor_seconds": seconds}
        | dict.fromkeys(trials.MEASURES, value)
        for row, value, seconds in ((trials.DEFAULT, 0.5, 10.0), ("repeats2", 0.7, 8.0), (trials.BASE, 0.2, 1.0))
    ]
    lines = trials.summarise(cells, ["repeats2", trials.BASE])
    assert lines["repeats2"]["to_varied"]["dog, seed 0"] == {"mean": 0.2, "interval": [0.2, 0.2]}
    assert lines["repeats2"]["seconds_to_varied"] == 0.8
    assert "gain" not in lines["repeats2"] and "dog, seed 0: +0.200" in trials.markdown(lines)


def test_a_row_counts_the_seeds_that_all_its_subjects_have(load) -> None:
    reproduce = load(BENCHMARKS / "reproduce.py")
    fidelity = {"base": 0.2, "plain": 1.0, "dynamic": 0.6}

    def cell(row: str, subject: str, seed: int) -> dict:
        trained = {"step_seconds": 1.0, "wall_seconds": 10.0 + seed, "leading": 0, "trailing": 0, "loss": 0.1}
        measured = dict.fromkeys(reproduce.MEASURES, fidelity[row] + 0.1 * seed)
        return {"row": row, "subject": subject, "seed": seed, **measured, **(trained if row != "base" else {})}

    cells = [cell(row, subject, seed) for row in ("base", "plain") for subject in ("cat", "dog") for seed in (0, 1)]
    cells += [cell("dynamic", "cat", 0), cell("dynamic", "dog", 0), cell("dynamic", "dog", 1)]
    summary = reproduce.summarise(cells, ["base", "plain", "dynamic", "resize"])
    lines = summary["rows"]
    assert list(lines) == ["base", "plain", "dynamic"] and summary["seeds"] == [0, 1]
    assert [line["seeds"] for line in lines.values()] == [[0, 1], [0, 1], [0]]
    # Of the one seed: (0.6 - 0.2) / (1.0 - 0.2).
    assert lines["dynamic"]["gain"] == 0.5 and lines["dynamic"]["gain_by_subject"] == {"cat": 0.5, "dog": 0.5}
    assert lines["dynamic"]["subject_fidelity"][0] == pytest.approx(0.6)
    assert lines["plain"]["subject_fidelity"][0] == pytest.approx(1.05)
    table = reproduce.markdown(summary).splitlines()
    assert "| 0, 0 | 4 |" in table[3] and "| 0, 0 | 2 |" in table[4]


@pytest.mark.slow
def test_trials_correct_values_and_end_whole(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = load(BENCHMARKS / "trials.py")
    # Images take longer than so few steps.
    measured = Evaluation(["a", "a"], [dict.fromkeys(trials.MEASURES.values(), 1.0)] * 2, {"a": 1.0})
    monkeypatch.setattr(trials, "evaluate", lambda *lora_and_subject: measured)
    monkeypatch.setattr(trials, "EVERY", 2)
    rows = ["value_matrix", "whole25"]
    flags = ["--subjects", "dog", "--steps", "12", "--jobs", "1", "--cells", str(tmp_path / "cells")]
    file = tmp_path / "figures.json"
    assert trials.main(["--rows", *rows, *flags, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["benchmark"] == "trials" and list(figures["results"]) == rows
    error = figures["results"]["value_matrix"]["value_error"]
    assert 0 < error["corrected"] < error["recorded"]
    assert [cell.get("whole_steps") for cell in figures["cells"]] == [None, 3]
    assert all(cell["processor_seconds"] > 0 for cell in figures["cells"])
