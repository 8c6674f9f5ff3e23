"""The stand-in, built once per machine, and runs of the scripts on it, each done once per session."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.accelerator import device
from tests.script import ROOT


EXAMPLES = ROOT / "examples" / "dreambooth_blockskip"
TRAIN, SELECT, EVALUATE = (f"{name}.py" for name in ("train_dreambooth_blockskip", "select_blocks", "evaluate"))


@dataclass(frozen=True)
class Job:
    """A command to run on the stand-in.

    Attributes:
        flags: Its flags. ``{name}`` is the folder of that name in the session's scratch folder.
        script: Which script.
        limit: Bytes of the device while a stage runs, as ``stage=bytes``.
        after: A run whose output folder this one goes on in.
        device: What the device is called: libraries have lists of those that they know.
    """

    flags: str
    script: str = TRAIN
    limit: str = ""
    after: str = ""
    device: str = "standin"


@dataclass(frozen=True)
class Ran:
    """What a command came to.

    Attributes:
        folder: Its output folder.
        code: Exit code.
        said: What it printed, errors included.
        left_bytes: What was left on the device at the end.
        traffic: By stage, bytes ``to_device`` and ``to_host``, and ``waits``.
    """

    folder: Path
    code: int
    said: str
    left_bytes: int
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        return json.loads((self.folder / "plan.json").read_text())

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "run_report.json").read_text())

    def peaks(self) -> dict[str, tuple[int, int]]:
        """Measured and planned bytes of each stage that the plan has."""
        planned = {stage["name"]: stage["peak_device_bytes"] for stage in self.plan["stages"]}
        measured = {stage["name"]: stage["peak_device_bytes"] for stage in self.report["stages"]}
        return {name: (measured[name], planned[name]) for name in measured if name in planned}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all of a session's processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "standin"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def standin() -> Path:
    """The compiled device."""
    missing = device.missing_tool()
    if missing is not None:
        pytest.skip(f"the stand-in accelerator needs {missing} to be built")
    return device.build()


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[Path], Any]], Any]:
    """Make something in a folder of the session, in whichever process asks for it first."""

    def make(name: str, maker: Callable[[Path], Any]) -> Any:
        # Pickled by this session and read by it alone.
        done = shared / f"{name}.pickle"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                done.write_bytes(pickle.dumps(maker(shared / name)))
        return pickle.loads(done.read_bytes())

    return make


@pytest.fixture(scope="session")
def run(standin: Path, shared: Path, once: Any) -> Callable[[str, Job], Ran]:
    """Run a job of some name on the stand-in in a process of its own, unless that was done in this session."""

    def start(name: str, job: Job, folder: Path) -> Ran:
        report = shared / f"{name}.json"
        output = shared / job.after if job.after else folder
        flags = [part.replace("{", f"{shared}/").replace("}", "") for part in shlex.split(job.flags)]
        command = [sys.executable, "-m", "tests.accelerator.run", "--report", str(report), "--limit", job.limit]
        command += [str(EXAMPLES / job.script), "--output_dir", str(output), *flags]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(shared / "hf-home")}
        environment["STANDIN_NAME"] = job.device
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=3000, cwd=shared, errors="replace"
        )
        found = json.loads(report.read_text()) if report.exists() else {"left_bytes": -1}
        return Ran(output, done.returncode, done.stdout + done.stderr, **found)

    return lambda name, job: once(name, functools.partial(start, name, job))
