"""A run that goes on: what its flags change, what of it is refused, and that its report is of the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler
from PIL import Image

from blockskip_hooks.cli.arguments import printable_command
from blockskip_hooks.training import validation
from blockskip_hooks.training.checkpoints import STATE_NAME, load_training_state, save_training_state, use_settings
from blockskip_hooks.training.history import History
from blockskip_hooks.training.validation import Validation
from blockskip_hooks.utils import accelerator
from blockskip_hooks.utils.monitor import StageMonitor
from tests import script


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def make_training(schedule: str = "cosine", steps: int = 12, **settings):
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter], **{"lr": 0.01, **settings})
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=steps, num_cycles=2)
    return parameter, optimizer, scheduler


def step(training) -> None:
    parameter, optimizer, scheduler = training
    parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    scheduler.step()


def resumed(folder: Path, training):
    _, optimizer, scheduler = training
    wanted = optimizer.state_dict()["param_groups"]
    load_training_state(folder, optimizer, scheduler)
    use_settings(optimizer, wanted, scheduler)
    return optimizer.param_groups[0]


# What flags change


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_changes_the_learning_rate_is_the_same_to_the_last_bit(tmp_path: Path, schedule: str):
    whole = make_training(schedule)
    for _ in range(5):
        step(whole)
    save_training_state(tmp_path, *whole[1:], step=5)
    again = make_training(schedule)
    assert resumed(tmp_path, again) == {**whole[1].param_groups[0], "params": [again[0]]}
    for _ in range(5):
        step(whole)
        again[0].data.copy_(whole[0].data)
        again[1].load_state_dict(whole[1].state_dict())
        again[2].step()
        assert again[2].get_last_lr() == whole[2].get_last_lr()


def test_rate_decay_betas_and_schedule_are_those_of_the_flags(tmp_path: Path):
    first = make_training("constant")
    for _ in range(5):
        step(first)
    save_training_state(tmp_path, *first[1:], step=5)
    second = make_training("linear", 20, lr=0.4, weight_decay=0.5, betas=(0.7, 0.8), eps=1e-3)
    group = resumed(tmp_path, second)
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.5, (0.7, 0.8), 1e-3)
    # Warmed up over 2 steps, then falling to zero at step 20.
    assert group["lr"] == pytest.approx(0.4 * (20 - 5) / (20 - 2))
    assert second[2].get_last_lr() == [group["lr"]]
    # What was learnt of the gradients is still there.
    assert second[1].state[second[0]]["step"] == 5


# What is kept of a run


def test_a_history_comes_back_with_the_settings_of_each_leg():
    def history():
        plan = SimpleNamespace(timesteps=torch.linspace(1000, 1, 10))
        return History(SimpleNamespace(gather=lambda value: value), SimpleNamespace(plan=plan))

    first = history()
    first.begin_leg({"learning_rate": 0.1}, 2)
    first.step, first.losses, first.step_seconds = 3, [0.5, 0.4, 0.3], [1.0, 1.1]
    first.loss_by_timestep, first.step_memory = {"0-250": [(1, 0.5), (3, 0.3)]}, [(10, 20)] * 3
    # A checkpoint is written before the clock of its step stops.
    assert len(first.state()["step_seconds"]) == 3
    first.stop_clock()
    kept = json.loads(json.dumps({"step": 3, **first.state()}))

    same, other = history(), history()
    for second, rate, samples in ((same, 0.1, 2), (other, 0.2, 4)):
        second.begin_leg({"learning_rate": rate}, samples)
        second.resume(kept)
        second.begin_leg({"learning_rate": rate}, samples)
        assert second.losses == first.losses and second.step_seconds == first.step_seconds
        assert second.loss_by_timestep == first.loss_by_timestep and second.step_memory == first.step_memory
        second.step = 5
    assert same.legs == first.legs and same.samples == 10
    assert [leg["step"] for leg in other.legs] == [0, 3] and other.samples == 3 * 2 + 2 * 4


def test_stages_of_earlier_legs_add_up():
    monitor = StageMonitor()
    with monitor.stage("train"):
        earlier = {"name": "train", "seconds": 100.0, "peak_rss_bytes": 2**50, "peak_device_bytes": None}
        monitor.add([{**earlier, "peak_device_reserved_bytes": None}])
    (stage,) = monitor.as_list()
    assert 100 < stage["seconds"] < 110 and stage["peak_rss_bytes"] == 2**50 and stage["peak_device_bytes"] is None


@pytest.mark.parametrize("words", [["--resume_from_checkpoint", "latest"], ["--resume_from_checkpoint=latest"]])
def test_the_command_that_repeats_a_run_begins_it_anew(words: list[str]):
    assert (
        printable_command(["train.py", *words, "--hub_token", "x", "--rank", "4"])
        == "train.py --hub_token '***' --rank 4"
    )


# The script


@pytest.fixture(scope="module")
def begun(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each, in stretches."""
    return script.train(model, photos, tmp_path_factory.mktemp("begun") / "out", *FLAGS, "--max_train_steps", "2")


FLAGS = ("--skip_blocks", "1,1", "--checkpointing_steps", "1", "--skip_final_inference", "--stretch_steps", "1")


@pytest.fixture
def go_on(begun: Path, model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Go on from the last checkpoint with some flags."""
    plan = json.loads((begun / "plan.json").read_text())
    monkeypatch.setattr(script.load_script(), "make_plan", lambda run, *_: (run, plan))

    def run(*flags: str, checkpoint: Path = begun / "checkpoint-2", name: str = "on") -> Path:
        given = (*FLAGS, "--max_train_steps", "4") if "--max_train_steps" not in flags else FLAGS
        return script.train(
            model, photos, tmp_path / name, *given, "--resume_from_checkpoint", str(checkpoint), *flags
        )

    return run


def report_of(output: Path) -> dict:
    return json.loads((output / "run_report.json").read_text())


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_NAME).read_text())


def test_the_report_is_of_all_legs(go_on, begun: Path):
    output = go_on()
    before, after = state_of(begun / "checkpoint-2"), report_of(output)
    train = after["train"]
    assert train["steps"] == len(train["loss"]) == len(train["step_seconds"]) == 4 and train["samples"] == 8
    assert train["loss"][:2] == before["loss"] and train["step_seconds"][:2] == before["step_seconds"]
    points = [tuple(point) for points in train["loss_by_timestep"].values() for point in points]
    assert {step for step, _ in points} == {1, 2, 3, 4}
    seconds = {stage["name"]: stage["seconds"] for stage in after["stages"]}
    for stage in before["stages"]:
        assert seconds[stage["name"]] > stage["seconds"]
    page = (output / "report.html").read_text()
    command = page.partition("<h2>Repeat the run</h2>")[2].partition("</pre>")[0]
    assert "--max_train_steps" in command and "--resume_from_checkpoint" not in command
    assert train["changed_settings"] == {}
    # Each of the four steps has a stretch and two records of its own.
    made = before["records_made"]
    assert made[0] == 4 and made[1] > 0
    assert after["residuals"]["records"] == 8 and after["residuals"]["bytes"] == 2 * made[1]


def test_records_of_a_stretch_that_was_stopped_before_its_first_step_count_once(go_on, begun: Path, monkeypatch):
    """They are on the disk, and the checkpoint that the run goes on from is older than they are."""
    original = script.load_script().train_steps

    def stopped(steps, *others):
        if steps.start == 3:
            raise MemoryError("out of memory")
        original(steps, *others)

    monkeypatch.setattr(script.load_script(), "train_steps", stopped)
    with pytest.raises(AssertionError, match="ended with 1"):
        go_on(name="out")
    monkeypatch.setattr(script.load_script(), "train_steps", original)
    output = go_on(name="out", checkpoint=Path("latest"))
    assert report_of(output)["residuals"]["records"] == 8


def test_what_may_change_is_honoured_and_reported(go_on, begun: Path):
    changes = {"--learning_rate": "0.001", "--adam_weight_decay": "0.5", "--adam_beta1": "0.5", "--seed": "7"}
    output = go_on(*(word for change in changes.items() for word in change), "--max_grad_norm", "0.5")
    group = state_of(output / "checkpoint-4")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], group["betas"][0]) == (0.001, 0.5, 0.5)
    assert state_of(output / "checkpoint-4")["seed"] == 7
    report = report_of(output)
    assert report["train"]["changed_settings"]["learning_rate"] == [
        {"from_step": 1, "value": 0.01},
        {"from_step": 3, "value": 0.001},
    ]
    assert set(report["train"]["changed_settings"]) == {
        *("learning_rate", "adam_weight_decay", "adam_beta1", "seed", "max_grad_norm")
    }
    assert "0.01, from step 3 on 0.001" in (output / "README.md").read_text()
    assert "0.01, from step 3 on 0.001" in (output / "report.html").read_text()
    assert report["train"]["loss"][:2] == state_of(begun / "checkpoint-2")["loss"]


def test_another_seed_draws_the_remaining_samples(go_on, begun: Path):
    """Step 3 has the LoRA of before and other samples: its loss alone shows which."""
    same, other = (
        script.losses(go_on(*flags, name=name)) for name, flags in {"same": (), "other": ("--seed", "7")}.items()
    )
    assert same[:2] == other[:2] == state_of(begun / "checkpoint-2")["loss"]
    assert same[2] != other[2] and same[3] != other[3]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora_alpha", "64"), "--lora_alpha 4 (now 64)"),
        (("--resolution", "32", "--weighting_scheme", "mode"), "--weighting_scheme none (now mode)"),
        (("--instance_prompt", "sks"), "the prompt 'a photo of sks dog' (now 'sks')"),
        (("--max_train_steps", "1"), "has 2 steps done, and --max_train_steps 1 is a run of 1; raise it"),
    ],
)
def test_what_may_not_change_is_refused_with_both_values(go_on, capfd, flags: tuple[str, ...], words: str):
    with pytest.raises(AssertionError, match="ended with 2"):
        go_on(*flags)
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert words in line and line.startswith("error: --resume_from_checkpoint")


def test_a_checkpoint_of_before_goes_on_and_is_counted(go_on, begun: Path, tmp_path: Path):
    import shutil

    output = tmp_path / "out"
    for number in (1, 2):
        shutil.copytree(begun / f"checkpoint-{number}", output / f"checkpoint-{number}")
        state = state_of(output / f"checkpoint-{number}")
        new = {"run", "saved_at", "stages", "legs", "step_seconds", "step_memory", "loss_by_timestep", "grad_scaler"}
        new |= {"records_made"}
        state = {name: value for name, value in state.items() if name not in new}
        state["made_with"] = {name: state["made_with"][name] for name in ("skip", "optimizer")}
        (output / f"checkpoint-{number}" / STATE_NAME).write_text(json.dumps(state))
    go_on("--checkpoints_total_limit", "2", "--seed", "3", checkpoint=Path("latest"), name="out")
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert report_of(output)["train"]["samples"] == 8 and len(script.losses(output)) == 4


def test_the_state_of_the_loss_scale_goes_on(go_on, begun: Path, monkeypatch: pytest.MonkeyPatch):
    """float16 itself needs a GPU; what is kept of it does not."""
    scalers: list[torch.amp.GradScaler] = []
    module = script.load_script()
    original = module.make_accelerator

    def with_scaler(run):
        made = original(run)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scalers.append(made.scaler)
        return made

    monkeypatch.setattr(module, "make_accelerator", with_scaler)
    first = go_on("--max_train_steps", "3", name="first")
    kept = state_of(first / "checkpoint-3")["grad_scaler"]
    assert kept["scale"] == 4.0
    (first / "checkpoint-3" / STATE_NAME).write_text(
        json.dumps({**state_of(first / "checkpoint-3"), "grad_scaler": {**kept, "scale": 32.0, "_growth_tracker": 5}})
    )
    go_on(checkpoint=first / "checkpoint-3", name="second")
    # One more step without an overflow.
    assert scalers[1].state_dict()["scale"] == 32.0 and scalers[1].state_dict()["_growth_tracker"] == 6


# Several processes


@pytest.mark.parametrize(
    ("num_prompts", "num_seeds", "at_once", "processes"), [(1, 4, 1, 2), (2, 5, 2, 3), (3, 1, 4, 2)]
)
def test_images_of_several_processes_come_together_in_order(
    monkeypatch: pytest.MonkeyPatch, num_prompts: int, num_seeds: int, at_once: int, processes: int
):
    whole = [[Image.new("RGB", (1, 1), (p, s, 0)) for s in range(num_seeds)] for p in range(num_prompts)]
    calls = [(p, s) for p in range(num_prompts) for s in range(0, num_seeds, at_once)]
    parts = [
        [
            [image for q, s in calls[rank::processes] if q == p for image in whole[p][s : s + at_once]]
            for p in range(num_prompts)
        ]
        for rank in range(processes)
    ]
    monkeypatch.setattr(validation, "gather_object", lambda mine: parts)
    assert Validation._from_all(parts[0], at_once) == whole


def test_processes_wait_a_day_for_the_one_that_works_alone(monkeypatch: pytest.MonkeyPatch):
    given: dict = {}
    made = SimpleNamespace(mixed_precision="no", device=torch.device("cpu"), num_processes=2)
    monkeypatch.setattr(accelerator, "Accelerator", lambda **settings: given.update(settings) or made)
    accelerator.start_accelerator("no")
    (handler,) = given["kwargs_handlers"]
    assert handler.to_kwargs()["timeout"].days == 1
