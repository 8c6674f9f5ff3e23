"""``--memory_budget``: the fewest skipped blocks that fit, options in their order, what is said when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockskip_hooks.planning.budget import fit_budget
from blockskip_hooks.selection import Selection
from tests import script
from tests.tiny import TINY_FAMILIES


GIB = 2**30


SELECTIONS = [Selection(20, number, 0, "rule") for number in range(20)]


def plan_for(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
    """A model of 20 blocks of 1 GiB beside 4 GiB; each option takes 2 GiB off."""
    num_skipped = selection.num_skipped
    train = (24 - num_skipped - 2 * len(options)) * GIB
    stages = [{"name": "encode", "peak_device_bytes": 3 * GIB}, {"name": "train", "peak_device_bytes": train}]
    return {"stages": stages, "skip": {"leading": num_skipped, "trailing": 0}}


@pytest.mark.parametrize(
    ("gib", "options", "num_skipped", "used"),
    [
        (30, (), 0, ()),
        (24, (), 0, ()),
        (23.5, (), 1, ()),
        (14, (), 10, ()),
        (13, (), 11, ()),
        (13, ("a", "b"), 9, ("a",)),
        (11, ("a", "b"), 9, ("a", "b")),
        (14, ("a", "b"), 10, ()),
        (7, ("a", "b"), 13, ("a", "b")),
        (5, (), 19, ()),
    ],
)
def test_the_fewest_blocks_with_the_fewest_options(gib: float, options: tuple, num_skipped: int, used: tuple):
    choice = fit_budget(plan_for, SELECTIONS, int(gib * GIB), options)
    assert (choice.selection.num_skipped, choice.options) == (num_skipped, used)
    assert f"{num_skipped} of 20" in choice.reason and all(option in choice.reason for option in used)


def test_curves_choose_by_harm_and_the_reason_says_so():
    """A pair of more blocks that harms less comes first."""
    selections = [
        Selection(20, 0, 0, "flag"),
        Selection(20, 0, 6, "table", "t", 0.1),
        Selection(20, 7, 0, "table", "t", 0.4),
    ]
    choice = fit_budget(plan_for, selections, 20 * GIB)
    assert choice.selection == selections[1] and choice.reason.startswith(
        "the least harmful selection that fits, 6 of 20"
    )


def test_it_asks_for_few_plans():
    asked = []

    def counted(*args):
        asked.append(args)
        return plan_for(*args)

    fit_budget(counted, SELECTIONS, 17 * GIB)
    assert len(asked) <= 6


@pytest.mark.parametrize("options", [(), ("a", "b")])
def test_the_least_is_said_when_nothing_fits(options: tuple):
    with pytest.raises(
        ValueError, match="^--memory_budget 2.50 GiB is less than any setting needs: the least is"
    ) as e:
        fit_budget(plan_for, SELECTIONS, int(2.5 * GIB), options)
    assert "\n" not in str(e.value) and ("3.00 GiB" if options else "5.00 GiB") in str(e.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(64, 64)])


def plan_only(photos: Path, output: Path, *flags: str) -> dict[str, Any]:
    script.train(TINY_FAMILIES[0].folder, photos, output, "--plan_only", *flags)
    return json.loads((output / "plan.json").read_text())


def peak(plan: dict[str, Any]) -> int:
    return max(stage["peak_device_bytes"] for stage in plan["stages"])


def test_the_script_skips_as_few_blocks_as_fit(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Against every number of blocks, one by one."""
    every = [plan_only(photos, tmp_path / str(n), "--skip_blocks", str(n) if n else "none") for n in range(5)]
    budget = peak(every[2])
    fewest = next(n for n in range(5) if peak(every[n]) <= budget)
    plan = plan_only(photos, tmp_path / "fit", "--memory_budget", str(budget))
    assert plan["skip"]["leading"] + plan["skip"]["trailing"] == fewest
    assert plan["fits"]["ok"] and plan["fits"]["budget_bytes"] == budget and peak(plan) <= budget
    assert f"{fewest} of 5" in capsys.readouterr().out


@pytest.mark.slow
def test_allowed_options_are_used_before_more_than_half_is_skipped(photos: Path, tmp_path: Path):
    half = plan_only(photos, tmp_path / "half", "--skip_blocks", "2")
    budget = peak(half) - 1
    without = plan_only(photos, tmp_path / "without", "--memory_budget", str(budget))
    options = ("--memory_budget", str(budget), "--memory_options", "checkpointing", "nf4")
    allowed = plan_only(photos, tmp_path / "with", *options)
    assert without["skip"]["ratio"] > 0.5 >= allowed["skip"]["ratio"]
    assert peak(allowed) <= budget
    assert "checkpointing" in allowed["fits"]["reason"]


def test_fixed_spans_that_do_not_fit_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(AssertionError, match="ended with 2"):
        plan_only(photos, tmp_path, "--skip_blocks", "1,1", "--memory_budget", "10KB")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --skip_blocks 1,1 needs") and "--memory_budget 10KB" in error
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory_budget", "1KB"), "error: --memory_budget 1000 B is less than any setting needs"),
        (("--memory_budget", "much"), "error: --memory_budget is 'much' is not a number of bytes"),
        (("--memory_budget", "1GB", "--memory_options", "magic"), "error: --memory_options is 'magic'; choose from"),
    ],
)
def test_bad_budgets_are_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
):
    with pytest.raises(AssertionError, match="ended with 2"):
        plan_only(photos, tmp_path, *flags)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
