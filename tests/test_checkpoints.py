"""Checkpoints: found by number, complete or absent, and enough to continue to the same bit."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from blockskip_hooks.training.checkpoints import (
    OPTIMIZER_NAME,
    STATE_NAME,
    begin_checkpoint,
    commit_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_training_state,
    read_state,
    save_training_state,
)


def make_checkpoint(output_dir, name, complete=True):
    folder = output_dir / name
    folder.mkdir(parents=True)
    if complete:
        (folder / STATE_NAME).write_text("{}")
    return folder


def written(output_dir, step, total_limit=None):
    folder = begin_checkpoint(output_dir, step)
    (folder / STATE_NAME).write_text(f'{{"step": {step}}}')
    return commit_checkpoint(folder, total_limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_state_is_read_as_utf8_whatever_the_machines_encoding(tmp_path, monkeypatch):
    """Prompts are part of it; on Windows files are read in the code page of the country by default."""
    (tmp_path / STATE_NAME).write_bytes('{"made_with": {"prompts": ["ein Foto von Möhrle"]}}'.encode())
    monkeypatch.setattr(
        Path, "read_text", lambda self, encoding="cp1252", errors=None: self.read_bytes().decode(encoding)
    )
    assert read_state(tmp_path)["made_with"]["prompts"] == ["ein Foto von Möhrle"]


# Finding


def test_checkpoints_are_listed_by_number_and_other_names_do_not_matter(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-9"):
        make_checkpoint(tmp_path, name)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-5.tmp", "checkpoint-3-copy", "my-checkpoint-4", "logs"):
        make_checkpoint(tmp_path, name)
    for name in ("checkpoint--1", "checkpoint-1.5", "Checkpoint-7", "checkpoint-8 "):
        make_checkpoint(tmp_path, name)
    (tmp_path / "checkpoint-999").write_text("a file")
    make_checkpoint(tmp_path, "checkpoint-200", complete=False)
    listed = [path.name for path in list_checkpoints(tmp_path)]
    assert listed == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-100"


def test_without_a_checkpoint_latest_starts_anew_and_says_so(tmp_path, caplog):
    make_checkpoint(tmp_path, "checkpoint-7", complete=False)
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "not there", "latest") is None
    assert ["starting anew" in record.getMessage() for record in caplog.records] == [True, True]


def test_without_the_flag_no_checkpoint_is_used(tmp_path):
    make_checkpoint(tmp_path, "checkpoint-7")
    assert find_checkpoint(tmp_path, None) is None and list_checkpoints(tmp_path / "not there") == []


def test_a_checkpoint_is_named_in_the_output_dir_or_by_its_path(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "out", "checkpoint-7")
    moved = make_checkpoint(tmp_path, "kept for later")
    assert find_checkpoint(tmp_path / "out", "checkpoint-7") == folder
    assert find_checkpoint(tmp_path / "elsewhere", str(folder)) == folder
    assert find_checkpoint(tmp_path / "out", str(moved)) == moved


@pytest.mark.parametrize("name", ["checkpoint-7", "checkpoint-8"])
def test_a_named_checkpoint_that_is_incomplete_or_absent_is_refused(tmp_path, name):
    make_checkpoint(tmp_path, "checkpoint-7", complete=False)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {name} .*complete checkpoint"):
        find_checkpoint(tmp_path, name)


# Writing


def test_a_crash_before_commit_leaves_no_checkpoint(tmp_path):
    folder = begin_checkpoint(tmp_path, 10)
    (folder / STATE_NAME).write_text("{}")
    assert list_checkpoints(tmp_path) == [] and "checkpoint-10" not in names(tmp_path)
    again = begin_checkpoint(tmp_path, 10)
    assert list(again.iterdir()) == []
    (again / STATE_NAME).write_text("{}")
    assert commit_checkpoint(again, None) == tmp_path / "checkpoint-10"
    assert names(tmp_path) == ["checkpoint-10"]


def test_a_crash_while_writing_again_leaves_the_old_one(tmp_path):
    old = written(tmp_path, 10)
    (old / "mark").write_text("old")
    begin_checkpoint(tmp_path, 10)
    assert list_checkpoints(tmp_path) == [old] and (old / "mark").is_file()


def test_a_step_written_again_replaces_its_checkpoint(tmp_path):
    (written(tmp_path, 10) / "mark").write_text("old")
    assert names(written(tmp_path, 10)) == [STATE_NAME] and names(tmp_path) == ["checkpoint-10"]


def test_the_oldest_are_dropped_above_the_limit_by_number(tmp_path):
    for step in (8, 9, 10, 11, 100):
        written(tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-11"]


def test_the_limit_counts_complete_checkpoints_and_drops_nothing_else(tmp_path):
    make_checkpoint(tmp_path, "checkpoint-1", complete=False)
    make_checkpoint(tmp_path, "checkpoint-best")
    (tmp_path / "notes.txt").write_text("kept")
    for step in (2, 3, 4):
        written(tmp_path, step, total_limit=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-best", "notes.txt"]


def test_without_a_limit_all_are_kept(tmp_path):
    for step in range(1, 13):
        written(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in range(1, 13)]


def test_the_checkpoint_just_written_is_not_the_one_that_is_dropped(tmp_path):
    # A run started anew beside the checkpoints of a longer one.
    written(tmp_path, 500)
    assert written(tmp_path, 10, total_limit=1).is_dir()


# Continuing


def make_training(optimizer_name, scheduler_name="cosine", groups=1, shape=(6, 4)):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2 * groups)]
    parameters.append(torch.nn.Parameter(torch.zeros(5)))
    parts = [{"params": parameters[: len(parameters) // groups]}]
    if groups == 2:
        parts.append({"params": parameters[len(parameters) // groups :], "weight_decay": 0.3})
    if optimizer_name == "prodigy":
        prodigyopt = pytest.importorskip("prodigyopt")
        optimizer = prodigyopt.Prodigy(
            parts, lr=1.0, weight_decay=0.01, decouple=True, use_bias_correction=True, safeguard_warmup=True
        )
    elif optimizer_name == "amsgrad":
        optimizer = torch.optim.AdamW(parts, lr=1e-2, amsgrad=True)
    else:
        optimizer = torch.optim.AdamW(parts, lr=1e-2, betas=(0.8, 0.95))
    scheduler = get_scheduler(
        scheduler_name, optimizer=optimizer, num_warmup_steps=3, num_training_steps=12, num_cycles=2
    )
    return parameters, optimizer, scheduler


def train(training, steps):
    parameters, optimizer, scheduler = training
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = parameter.detach() * 0.1 + torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def state_of(training):
    """Everything that decides the next step, without references to live tensors."""
    _, optimizer, scheduler = training
    return copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_same(*pair)
    else:
        assert left == right


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup", "cosine_with_restarts", "polynomial"])
@pytest.mark.parametrize("optimizer", ["adamw", "amsgrad", "prodigy"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, optimizer, scheduler, groups):
    whole = make_training(optimizer, scheduler, groups)
    train(whole, range(5))
    save_training_state(tmp_path, whole[1], whole[2], step=5, seed=3, loss=[0.1, 1 / 3])
    saved_parameters = [parameter.detach().clone() for parameter in whole[0]]
    saved_state = state_of(whole)

    resumed = make_training(optimizer, scheduler, groups)
    for parameter, value in zip(resumed[0], saved_parameters):
        parameter.data.copy_(value)
    state = load_training_state(tmp_path, resumed[1], resumed[2])
    assert (state["step"], state["seed"], state["loss"]) == (5, 3, [0.1, 1 / 3])
    assert_same(state_of(resumed), saved_state)

    train(whole, range(5, 12))
    train(resumed, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], resumed[0]))
    assert_same(state_of(resumed), state_of(whole))


def test_a_state_before_the_first_step_comes_back(tmp_path):
    save_training_state(tmp_path, *make_training("adamw")[1:], step=0)
    fresh = make_training("adamw")
    assert load_training_state(tmp_path, *fresh[1:])["step"] == 0
    assert_same(state_of(fresh), state_of(make_training("adamw")))


def test_the_state_is_plain_files_without_pickle(tmp_path):
    training = make_training("adamw")
    train(training, range(2))
    save_training_state(tmp_path, *training[1:], step=2)
    assert names(tmp_path) == [OPTIMIZER_NAME, STATE_NAME]
    assert (tmp_path / STATE_NAME).read_text().lstrip().startswith("{")
    assert b"\x80\x04" not in (tmp_path / STATE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ({"optimizer_name": "adamw"}, {"optimizer_name": "prodigy"}),
        ({"optimizer_name": "prodigy"}, {"optimizer_name": "adamw"}),
        ({"optimizer_name": "adamw"}, {"optimizer_name": "adamw", "groups": 2}),
    ],
    ids=["adamw to prodigy", "prodigy to adamw", "other groups"],
)
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(tmp_path, saved, resumed):
    training = make_training(**saved)
    train(training, range(2))
    save_training_state(tmp_path, *training[1:], step=2)
    fresh = make_training(**resumed)
    before = state_of(fresh)
    with pytest.raises(ValueError, match="--resume_from_checkpoint .*another optimizer") as error:
        load_training_state(tmp_path, *fresh[1:])
    assert "\n" not in str(error.value)
    assert_same(state_of(fresh), before)


@pytest.mark.parametrize("name", [OPTIMIZER_NAME, STATE_NAME])
def test_a_damaged_file_is_refused_by_its_flag(tmp_path, name):
    training = make_training("adamw")
    train(training, range(2))
    save_training_state(tmp_path, *training[1:], step=2)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="--resume_from_checkpoint"):
        load_training_state(tmp_path, *make_training("adamw")[1:])
