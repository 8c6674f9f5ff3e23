"""The check for owners of a GPU runs from end to end where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.script import ROOT


@pytest.mark.slow
def test_the_gpu_check_measures_plans_and_a_resumed_run(standin: Path, tmp_path: Path) -> None:
    figures, settings = tmp_path / "figures.json", ["plain LoRA", "50 %, images"]
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--smoke", "--scratch", str(tmp_path)]
    command += ["--runner", "tests.accelerator.run", "--json", str(figures), "--only", *settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf-home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["schema"] == 1 and found["benchmark"] == "gpu_check"
    assert [result["setting"] for result in found["results"]] == settings
    stages = {result["setting"]: {stage["name"]: stage for stage in result["stages"]} for result in found["results"]}
    assert set(stages["plain LoRA"]) == {"encode", "train"}
    assert set(stages["50 %, images"]) == {"encode", "precompute", "train", "validate"}
    assert all(stage["live_bytes"] > 0 for of_run in stages.values() for stage in of_run.values())
    assert all(result["step_seconds_median"] > 0 for result in found["results"])
    assert found["results"][1]["record_seconds"] > 0 and found["results"][1]["images_seconds"] > 0
    assert found["resume"] == {"same_bits": True, "losses": found["resume"]["losses"], "faults": []}
    assert "the same bits" in done.stdout
    # Nothing but the figures is left.
    assert not list(tmp_path.glob("full-size-*"))
