"""Runs of the training script that something happens to at a chosen moment, in processes forked from a warm one."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests import script


# Imported before processes are forked, so that a run does not spend seconds on it.
script.load_script()
torch.set_num_threads(1)

BASE = ("--upcast_before_saving", "--skip_final_inference")
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flux: accumulation, prior preservation, cosine, stretches": (
        "flux-dev",
        (
            *("--skip_blocks", "1,2", "--gradient_accumulation_steps", "2", "--residual_budget", "130KB"),
            *("--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", "2"),
            *("--lr_scheduler", "cosine", "--lr_warmup_steps", "1", "--checkpointing_steps", "2"),
            "--no-refresh_residuals",
        ),
    ),
    "sana: prodigy, refreshed, dropout, checkpoint limit": (
        "sana",
        (
            *("--skip_blocks", "2,1", "--optimizer", "prodigy", "--learning_rate", "1", "--lora_dropout", "0.2"),
            *("--residual_budget", "70KB", "--checkpointing_steps", "1", "--checkpoints_total_limit", "1"),
        ),
    ),
    "flux: text encoder, float8 records, loader process": (
        "flux-schnell",
        (
            *("--skip_blocks", "1,1", "--train_text_encoder", "--residual_dtype", "float8"),
            *("--dataloader_num_workers", "1", "--checkpointing_steps", "3"),
        ),
    ),
    "flux: refreshed residuals, repeated records": (
        "flux-dev",
        (
            *("--skip_blocks", "1,2", "--refresh_residuals", "--stretch_steps", "3", "--record_repeats", "2"),
            *("--lora_dropout", "0.2", "--checkpointing_steps", "1"),
        ),
    ),
    "sana: nothing skipped, crops in every step": (
        "sana",
        ("--skip_blocks", "none", "--lr_scheduler", "polynomial", "--checkpointing_steps", "1"),
    ),
    "flux: cached latents, buckets, validation": (
        "flux-dev",
        (
            *("--skip_blocks", "1,1", "--cache_latents", "--aspect_ratio_buckets", "64,64;64,96", "--random_flip"),
            *("--validation_prompt", "a dog", "--validation_epochs", "1", "--num_validation_images", "1"),
            *("--checkpointing_steps", "2"),
        ),
    ),
}
"""By name: the tiny pipeline and the flags."""


FILE_LIMIT = 12_000
"""Bytes that a file may have once the disk is full: more than what is printed, less than any file of weights."""
FAULTS = {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "int": 128 + signal.SIGINT, "full": 1, "lose": 1}
"""What may happen to a run, and the exit code that it then has."""
WORDS = {"term": "Stopped by SIGTERM.", "int": "Stopped by SIGINT.", "full": "error: No room for "}
"""What it then says."""


class Reaper:
    """Counts what a run does to its files and its weights, and lets a fault happen at one of these events.

    Args:
        folder: Where the run writes; other files do not count.
        at: Number of the event before which it happens; 0: never.
        fault: What happens, one of ``FAULTS``.
        at_batch: Number of the batch in training before which it happens, instead; 0: never. Of several processes not
            every event is in every run, but every batch is.
    """

    def __init__(self, folder: Path, at: int, fault: str, at_batch: int = 0) -> None:
        self.folder, self.at, self.fault, self.count = str(folder), at, fault, 0
        self.at_batch, self.batches = at_batch, 0

    def event(self, half_written: Path | None = None) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.fault == "lose":
            for shard in Path(self.folder).rglob("records-*.safetensors"):
                shard.unlink()
            return
        if self.fault == "full":
            # A file that cannot grow is what a process sees of a full disk, without root.
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
            return
        if self.fault == "kill" and half_written is not None and half_written.is_file():
            os.truncate(half_written, half_written.stat().st_size // 2)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[self.fault])

    def install(self) -> None:
        """Watch files through Python's audit events, syncs and the training steps through wrappers."""
        from blockskip_hooks.residuals import precompute
        from blockskip_hooks.training import checkpoints
        from blockskip_hooks.training.history import History
        from blockskip_hooks.training.records import RecordSource
        from blockskip_hooks.utils import files

        def audit(name: str, args: tuple[Any, ...]) -> None:
            if name == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                with contextlib.suppress(TypeError):
                    if os.fsdecode(args[0]).startswith(self.folder):
                        self.event()

        def sync(path: Path, original: Callable[[Path], None] = files.sync) -> None:
            self.event(half_written=path)
            original(path)

        def batch(*args: Any, original: Callable[..., Any] = RecordSource.complete) -> Any:
            self.batches += 1
            if self.batches == self.at_batch:
                self.at = self.count + 1
            self.event()
            return original(*args)

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.event()
                return function(*args, **kwargs)

            return call

        sys.addaudithook(audit)
        files.sync = checkpoints.sync = sync
        precompute.capture = watched(precompute.capture)
        RecordSource.complete = batch  # type: ignore[method-assign, assignment]
        History.end_step = watched(History.end_step)  # type: ignore[method-assign]


def run_script(
    argv: Sequence[str],
    folder: Path,
    log: Path,
    at: int,
    fault: str,
    plan: Path | None,
    environment: Mapping[str, str],
    at_batch: int = 0,
) -> None:
    """Body of a forked process: run the script, and leave its seconds and events beside what it prints.

    Args:
        argv: The script's flags.
        folder: Where the run writes.
        log: Takes what the script prints.
        at: See :class:`Reaper`.
        fault: Likewise.
        plan: A ``plan.json`` of the same settings, to save the time of planning; the plan is a function of them.
        environment: Variables to set, as a launcher would.
        at_batch: See :class:`Reaper`.
    """
    os.environ.update(environment)
    torch.set_num_threads(1)
    # Loader processes start as in a run of its own.
    multiprocessing.set_start_method("fork", force=True)
    # Collecting garbage need not walk over everything that was imported.
    gc.freeze()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module = script.load_script()
    if plan is not None:
        known = json.loads(plan.read_text())
        module.make_plan = lambda run, *_: (run, known)  # type: ignore[attr-defined]
        module.describe_plan = lambda *_: ""  # type: ignore[attr-defined]
    reaper, started = Reaper(folder, at, fault, at_batch), time.monotonic()
    reaper.install()
    code = module.main(list(argv))
    cost = log.with_name(f"{log.stem}{environment.get('RANK', '')}.json")
    cost.write_text(json.dumps([time.monotonic() - started, reaper.count]))
    sys.stdout.flush()
    os._exit(code)


@dataclass
class KillTest:
    """Lets faults happen to runs of one setting, and compares what they end with once they were resumed.

    Args:
        model: The pipeline's folder.
        photos: The photos' folder.
        scratch: Where runs write.
        flags: The setting's flags.
        sizes: Resolution and text tokens of the pipeline.
        seed: Of everything that is drawn here.
        fault: What happens to runs, one of ``FAULTS``.
        by_time: Kill after a random delay rather than at an event.

    Attributes:
        kills: Runs that ended by the fault so far.
        finished: Runs that were resumed until they finished.
        lost: What differed from the run that nothing happened to, one line each.
    """

    model: Path
    photos: Path
    scratch: Path
    flags: Sequence[str]
    sizes: Mapping[str, int]
    seed: int = 0
    fault: str = "kill"
    by_time: bool = False
    kills: int = 0
    finished: int = 0
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.kills"])
        code = self.run("whole", 0, plan=False)
        assert code == 0, self.log("whole")
        self.seconds, self.events = json.loads((self.scratch / "whole.json").read_text())

    def go(self, kills: int) -> None:
        """Until so many runs have died and the last one that was resumed has finished."""
        while self.kills < kills:
            name, most, faults = f"run-{self.finished}", self.events, 0
            while (code := self.run(name, self.random.randint(1, most) if self.kills < kills else 0)) != 0:
                # A resumed run has fewer events.
                self.kills, most, faults = self.kills + 1, self.events // 2, faults + 1
                # A killed run says nothing, and what it was writing is still there.
                clean = self.fault == "kill" or (
                    self.log(name).count(WORDS[self.fault]) == faults
                    and not list((self.scratch / name / "out").rglob("*.tmp"))
                )
                if code != FAULTS[self.fault] or not clean:
                    self.lost.append(f"{name} ended with {code}: {self.log(name)[-600:]}")
                    break
            self.finished += 1
            self._compare(name)

    def _compare(self, name: str) -> None:
        output = self.scratch / name / "out"
        try:
            script.assert_same_weights(output, self.scratch / "whole" / "out")
            assert script.losses(output) == script.losses(self.scratch / "whole" / "out"), "losses"
        except (AssertionError, OSError) as error:
            self.lost.append(f"{name} came to something else: {error}")
        left = [str(path.relative_to(output)) for path in output.rglob("*.tmp")]
        if left or (output / "residuals").exists():
            self.lost.append(f"{name} left {left or 'its records'}")
        shutil.rmtree(self.scratch / name)

    def log(self, name: str) -> str:
        """What the runs of this name printed."""
        log = self.scratch / f"{name}.log"
        return log.read_text() if log.exists() else ""

    def start(
        self,
        name: str,
        at: int = 0,
        plan: bool = True,
        more: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        at_batch: int = 0,
    ) -> BaseProcess:
        """Begin a run, or go on with one.

        Args:
            name: Of its folder.
            at: Number of the event at which the fault happens; 0: never.
            plan: Take the plan of the run that nothing happens to.
            more: Further flags.
            environment: Variables of the process.
            at_batch: Number of the batch before which the fault happens, instead; 0: never.
        """
        folder = self.scratch / name
        settings = script.settings(self.model, self.photos, folder / "out", *self.flags, *BASE, *more, **self.sizes)
        argv = [*settings, "--class_data_dir", str(folder / "class")] if "--class_prompt" in settings else settings
        known = self.scratch / "whole" / "out" / "plan.json" if plan else None
        argv = [*argv, "--resume_from_checkpoint", "latest"]
        log = self.scratch / f"{name}.log"
        process = self.context.Process(
            target=run_script, args=(argv, folder, log, at, self.fault, known, environment or {}, at_batch)
        )
        process.start()
        return process

    def run_ranks(
        self,
        name: str,
        at_batch: Sequence[int] = (0, 0),
        more: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> list[int | None]:
        """A run of several processes on this machine, as a launcher starts them.

        Args:
            name: Of its folder.
            at_batch: For each process the batch before which the fault happens; 0: never.
            more: Further flags.
            environment: Further variables of each process.

        Returns:
            Their exit codes.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        world = {
            **(environment or {}),
            **address,
            "WORLD_SIZE": str(len(at_batch)),
            "LOCAL_WORLD_SIZE": str(len(at_batch)),
        }
        ranks = [
            self.start(name, 0, False, more, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, batch)
            for rank, batch in enumerate(at_batch)
        ]
        for process in ranks:
            process.join()
        return [process.exitcode for process in ranks]

    def run(self, name: str, at: int = 0, plan: bool = True) -> int | None:
        """Begin a run, or go on with one, and return its exit code when it has ended; see :meth:`start`."""
        by_time = self.by_time and at > 0
        process = self.start(name, 0 if by_time else at, plan)
        if by_time:
            process.join(self.random.uniform(0, self.seconds))
            if process.is_alive():
                process.kill()
        process.join()
        return process.exitcode
