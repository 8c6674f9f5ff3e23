"""Runs of the training script that are killed at a chosen moment, each in a process forked from a warm one."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        ),
    ),
    "sana: prodigy, stretches, dropout, checkpoint limit": (
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


class Reaper:
    """Counts what a run does to its files and its weights, and kills the process at one of these events.

    Args:
        folder: Where the run writes; other files do not count.
        die_at: Number of the event before which to die; 0: never.
    """

    def __init__(self, folder: Path, die_at: int) -> None:
        self.folder, self.die_at, self.count = str(folder), die_at, 0

    def event(self, half_written: Path | None = None) -> None:
        self.count += 1
        if self.count != self.die_at:
            return
        if half_written is not None and half_written.is_file():
            os.truncate(half_written, half_written.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Watch files through Python's audit events, syncs and the trainer's steps through wrappers."""
        from blockskip_hooks import checkpoints, files, precompute, trainer

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

        def watched(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.event()
                return function(*args, **kwargs)

            return call

        sys.addaudithook(audit)
        files.sync = checkpoints.sync = sync
        precompute.capture = watched(precompute.capture)
        trainer.Trainer._loss = watched(trainer.Trainer._loss)  # type: ignore[method-assign]
        trainer.Trainer._finish_step = watched(trainer.Trainer._finish_step)  # type: ignore[method-assign]


def run_script(argv: Sequence[str], folder: Path, log: Path, die_at: int, plan: Path | None) -> None:
    """Body of a forked process: run the script, and leave the number of events beside its output.

    Args:
        argv: The script's flags.
        folder: Where the run writes.
        log: Takes what the script prints.
        die_at: See :class:`Reaper`.
        plan: A ``plan.json`` of the same settings, to save the time of planning; the plan is a function of them.
    """
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
    reaper = Reaper(folder, die_at)
    reaper.install()
    code = module.main(list(argv))
    log.with_suffix(".events").write_text(str(reaper.count))
    sys.stdout.flush()
    os._exit(code)


@dataclass
class KillTest:
    """Kills runs of one setting again and again, and compares what the survivors end with.

    Args:
        model: The pipeline's folder.
        photos: The photos' folder.
        scratch: Where runs write.
        flags: The setting's flags.
        sizes: Resolution and text tokens of the pipeline.
        seed: Of everything that is drawn here.
        by_time: Kill after a random delay rather than at an event.

    Attributes:
        kills: Runs killed so far.
        lost: What differed from the run that was never killed, one line each.
    """

    model: Path
    photos: Path
    scratch: Path
    flags: Sequence[str]
    sizes: Mapping[str, int]
    seed: int = 0
    by_time: bool = False
    kills: int = 0
    finished: int = 0
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.kills"])
        started = time.monotonic()
        code = self._run("whole", 0, plan=False)
        assert code == 0, (self.scratch / "whole.log").read_text()[-2000:]
        self.seconds = time.monotonic() - started
        self.events = int((self.scratch / "whole.events").read_text())

    def go(self, kills: int) -> None:
        """Kill until so many runs have died and the last one that was resumed has finished."""
        while self.kills < kills:
            name, most = f"run-{self.finished}", self.events
            while True:
                code = self._run(name, self.random.randint(1, most) if self.kills < kills else 0)
                if code == -signal.SIGKILL:
                    # A resumed run has fewer events.
                    self.kills, most = self.kills + 1, self.events // 2
                elif code == 0:
                    break
                else:
                    self.lost.append(f"{name} ended with {code}: {self._log(name)}")
                    break
            self.finished += 1
            self._compare(name)

    def _compare(self, name: str) -> None:
        output = self.scratch / name / "out"
        try:
            script.assert_same_weights(output, self.scratch / "whole" / "out")
        except (AssertionError, OSError) as error:
            self.lost.append(f"{name} has other weights: {error}")
        if script_losses(output) != script_losses(self.scratch / "whole" / "out"):
            self.lost.append(f"{name} has other losses")
        left = [str(path.relative_to(output)) for path in output.rglob("*.tmp")]
        if left or (output / "residuals").exists():
            self.lost.append(f"{name} left {left or 'its records'}")
        shutil.rmtree(self.scratch / name)

    def _log(self, name: str) -> str:
        return " ".join((self.scratch / f"{name}.log").read_text()[-600:].split())

    def _run(self, name: str, die_at: int, plan: bool = True) -> int | None:
        folder = self.scratch / name
        settings = script.settings(self.model, self.photos, folder / "out", *self.flags, *BASE, **self.sizes)
        argv = [*settings, "--class_data_dir", str(folder / "class")] if "--class_prompt" in settings else settings
        known = self.scratch / "whole" / "out" / "plan.json" if plan else None
        by_time = self.by_time and die_at > 0
        process = self.context.Process(
            target=run_script,
            args=(
                [*argv, "--resume_from_checkpoint", "latest"],
                folder,
                self.scratch / f"{name}.log",
                0 if by_time else die_at,
                known,
            ),
        )
        process.start()
        if by_time:
            process.join(self.random.uniform(0, 1.2 * self.seconds))
            if process.is_alive():
                process.kill()
        process.join()
        return process.exitcode


def script_losses(output: Path) -> list[float] | None:
    """Losses of a run, if it finished."""
    try:
        return script.losses(output)
    except OSError:
        return None
