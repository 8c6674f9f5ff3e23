"""The benchmark scripts start, and on a tiny model they run and write valid JSON; figures are not tested here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.state import AcceleratorState

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
