"""A checkpoint belongs to a run: which one is found, counted, deleted and refused, and who may write to a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockskip_hooks.cli.arguments import family_flags
from blockskip_hooks.data.photos import scan_photos
from blockskip_hooks.training import resume_checks
from blockskip_hooks.training.checkpoints import STATE_NAME, begin_checkpoint, commit_checkpoint
from blockskip_hooks.training.resume_checks import differences
from blockskip_hooks.training.resume_flags import ON_RESUME
from blockskip_hooks.training.settings import TrainSettings
from blockskip_hooks.utils.errors import UserError
from blockskip_hooks.utils.locks import LOCK_NAME, FolderLock
from tests import script


MADE = {
    "skip": [1, 1],
    "layers": "a",
    "optimizer": "adamw",
    "base_weights": "a",
    "components": {"vae": "a", "text_encoder": "b"},
    "assistant": None,
    "photos": ["a", "b"],
    "prompts": ["a dog", "a dog"],
    "flags": {"rank": 4, "lora_alpha": 4, "random_flip": False, "refresh_residuals": True},
}


def test_every_flag_says_what_it_may_do_to_a_run_that_goes_on():
    flags = {field.name for field in fields(TrainSettings)} - {"given", "family_flags"} | family_flags().keys()
    assert ON_RESUME.keys() == flags


# What differs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flags": {**MADE["flags"], "lora_alpha": 64}}, "with --lora_alpha 4 (now 64)"),
        ({"flags": {**MADE["flags"], "random_flip": True}}, "without --random_flip (now with)"),
        ({"flags": {**MADE["flags"], "refresh_residuals": False}}, "with --refresh_residuals (now without)"),
        ({"skip": [0, 2]}, "with --skip_blocks 1,1 (now 0,2)"),
        ({"layers": "b"}, "with other LoRA layers"),
        ({"optimizer": "prodigy"}, "with the optimizer adamw (now prodigy)"),
        ({"assistant": "a"}, "without --assistant_lora (now with)"),
        ({"base_weights": "b"}, "on other weights of transformer"),
        ({"components": {"vae": "b"}}, "on other weights of text_encoder and vae"),
        ({"photos": ["a", "c"]}, "on other photos (2, now 2)"),
        ({"photos": ["a"], "prompts": ["a dog"]}, "on other photos (2, now 1)"),
        ({"prompts": ["a dog", "a\ncat"]}, "with the prompt 'a dog' (now 'a cat')"),
    ],
)
def test_each_difference_is_named_with_both_values(changes: dict, words: str):
    assert differences(MADE, {**MADE, **changes}) == [words]


def test_what_an_older_checkpoint_does_not_know_is_not_compared():
    assert differences({}, MADE) == [] and differences({"skip": [1, 1], "optimizer": "adamw"}, MADE) == []
    assert differences({"skip": [1, 2]}, MADE) == ["with --skip_blocks 1,2 (now 1,1)"]
    assert differences({**MADE, "flags": {"rank": 4, "gone": 1}}, MADE) == []


def test_a_photo_is_known_by_its_pixels(tmp_path: Path):
    script.save_photos(tmp_path / "a", [(64, 64), (80, 64)])
    script.save_photos(tmp_path / "b", [(64, 64), (80, 64)])
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "holiday.png")
    script.save_photos(tmp_path / "c", [(64, 64), (96, 64)])
    a, b, c = ([photo.digest for photo in scan_photos(tmp_path / name)] for name in "abc")
    assert a == b and None not in a and a[0] == c[0] and a[1] != c[1]


# Counting


def written(folder: Path, step: int, run: str | None, limit: int | None = None) -> Path:
    checkpoint = begin_checkpoint(folder, step)
    (checkpoint / STATE_NAME).write_text(json.dumps({"step": step, **({"run": run} if run else {})}))
    return commit_checkpoint(checkpoint, limit)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_limit_counts_and_deletes_the_runs_own_checkpoints(tmp_path: Path):
    for step in (3, 6):
        written(tmp_path, step, "dog")
    written(tmp_path, 9, None)
    for step in (1, 2, 4):
        written(tmp_path, step, "cat", limit=2)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in (2, 3, 4, 6, 9)}


def test_a_checkpoint_of_another_run_makes_room_and_is_kept(tmp_path: Path):
    for run in ("dog", "cat", "cat", "cow"):
        written(tmp_path, 3, run, limit=1)
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-3.earlier-1", "checkpoint-3.earlier-2"}
    runs = {path.name: json.loads((path / STATE_NAME).read_text())["run"] for path in tmp_path.iterdir()}
    assert runs == {"checkpoint-3": "cow", "checkpoint-3.earlier-1": "dog", "checkpoint-3.earlier-2": "cat"}


@pytest.mark.parametrize(("num_steps", "goes_on"), [(4, False), (8, True)])
def test_going_on_is_offered_where_the_steps_allow_it(
    num_steps: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resume_checks, "made_with", lambda run: MADE)
    written(tmp_path, 8, "dog")
    run: Any = SimpleNamespace(output_dir=tmp_path)
    said = " ".join(resume_checks.describe_output(run, None, num_steps).split())
    assert "holds checkpoint-8 of an earlier run like this one" in said
    assert "one whose name is needed becomes checkpoint-N.earlier-1" in said
    assert ("--resume_from_checkpoint latest goes on with it" in said) == goes_on


# One run at a time

HOLD = """
import os, sys, time
from pathlib import Path
from blockskip_hooks.utils.locks import FolderLock
lock = FolderLock()
lock.take(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(60)
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that has the folder, and a child of it that outlives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    yield process
    os.killpg(process.pid, 9)
    process.wait()


def test_a_second_run_is_refused_until_the_first_is_gone_even_if_it_was_killed(holder, tmp_path: Path):
    with FolderLock() as lock:
        with pytest.raises(UserError, match=f"--output_dir {tmp_path} is in use by another run; wait"):
            lock.take(tmp_path)
        holder.kill()
        holder.wait()
        lock.take(tmp_path)
        assert (tmp_path / LOCK_NAME).is_file()
    assert names(tmp_path) == set()


def test_a_lock_that_cannot_be_had_is_said(tmp_path: Path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("blockskip_hooks.utils.locks._lock", refuse)
    with FolderLock() as lock:
        lock.take(tmp_path)
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


# The script


@pytest.fixture
def train(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the script on one folder; only the first run makes a plan."""
    plans: list[dict] = []
    module = script.load_script()
    make_plan = module.make_plan

    def once(run, *args):
        if not plans:
            plans.append(make_plan(run, *args)[1])
        return run, plans[0]

    monkeypatch.setattr(module, "make_plan", once)

    def run(*flags: str) -> Path:
        return script.train(model, photos, tmp_path / "out", "--skip_final_inference", *flags)

    return run


CAT = ("--instance_prompt", "a photo of sks cat")


def test_a_new_run_in_a_used_folder_says_so_and_goes_on_from_its_own(train, capfd):
    out = train("--max_train_steps", "4", "--checkpointing_steps", "2")
    dog = script.weights(out)
    capfd.readouterr()
    limited = (*CAT, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1")
    train(*limited, "--max_train_steps", "2")
    said = " ".join(capfd.readouterr().out.split())
    assert "Output " in said and "holds checkpoint-2, checkpoint-4 of another run, made with the prompt" in said
    assert {"checkpoint-2", "checkpoint-2.earlier-1", "checkpoint-4"} <= names(out) and "checkpoint-1" not in names(
        out
    )

    train(*limited, "--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert {"checkpoint-2.earlier-1", "checkpoint-3", "checkpoint-4"} <= names(out)
    assert "checkpoint-2" not in names(out) and len(script.losses(out)) == 3
    assert any(not value.equal(dog[name]) for name, value in script.weights(out).items())
    assert LOCK_NAME not in names(out)

    with pytest.raises(AssertionError, match="ended with 2"):
        train(*CAT, "--resume_from_checkpoint", "checkpoint-4")
    err = capfd.readouterr().err
    assert "is of another run, made with the prompt 'a photo of sks dog' (now 'a photo of sks cat'); use" in err


def test_a_second_run_in_the_folder_of_a_running_one_is_refused_at_the_start(holder, model, photos, tmp_path, capfd):
    with pytest.raises(AssertionError, match="ended with 2"):
        script.train(model, photos, tmp_path)
    assert f"error: --output_dir {tmp_path} is in use by another run" in capfd.readouterr().err
    assert names(tmp_path) == {LOCK_NAME}
