"""``--memory_budget``: what costs the result least comes first, and what is said when nothing fits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from blockskip_hooks.planning.budget import BudgetSteps, fit_budget, selections_for_budget
from blockskip_hooks.selection import Selection
from tests import script
from tests.tiny import TINY_FAMILIES


GIB = 2**30


SELECTIONS = selections_for_budget([GIB] * 20)


def plan_for(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
    """A model of 20 blocks of 1 GiB beside 4 GiB; each option takes 2 GiB off."""
    train = (24 - selection.num_skipped - 2 * len(options)) * GIB
    stages = [{"name": "encode", "needed_bytes": 3 * GIB}, {"name": "train", "needed_bytes": train}]
    return {"stages": stages, "skip": {"leading": selection.leading, "trailing": selection.trailing}}


@pytest.mark.parametrize(
    ("gib", "options", "last", "spans", "used"),
    [
        (30, (), (), (0, 0), ()),
        (24, (), (), (0, 0), ()),
        (23.5, (), (), (1, 0), ()),
        (14, (), (), (10, 0), ()),
        (13, (), (), (10, 1), ()),
        (5, (), (), (10, 9), ()),
        # What costs the result less than skipping comes first, what costs it more after half of the blocks.
        (23.5, ("a", "b"), ("z",), (0, 0), ("a",)),
        (21, ("a", "b"), ("z",), (0, 0), ("a", "b")),
        (19, ("a", "b"), ("z",), (1, 0), ("a", "b")),
        (10, ("a", "b"), ("z",), (10, 0), ("a", "b")),
        (8, ("a", "b"), ("z",), (10, 0), ("a", "b", "z")),
        (7, ("a", "b"), ("z",), (10, 1), ("a", "b", "z")),
    ],
)
def test_what_costs_the_result_least_comes_first(gib: float, options: tuple, last: tuple, spans: tuple, used: tuple):
    choice = fit_budget(plan_for, BudgetSteps(SELECTIONS, options, last), int(gib * GIB))
    assert ((choice.selection.leading, choice.selection.trailing), choice.options) == (spans, used)
    assert f"{sum(spans)} of 20" in choice.reason and all(option in choice.reason for option in used)


def test_more_memory_never_costs_the_result_more():
    steps = BudgetSteps(SELECTIONS, ("a", "b"), ("z",))
    choices = [fit_budget(plan_for, steps, tenths * GIB // 10) for tenths in range(30, 260)]
    for poorer, richer in itertools.pairwise(choices):
        assert richer.selection.leading <= poorer.selection.leading
        assert richer.selection.trailing <= poorer.selection.trailing
        assert set(richer.options) <= set(poorer.options)


def test_curves_choose_by_harm_and_the_reason_says_so():
    """A pair of more blocks that harms less comes first."""
    selections = [
        Selection(20, 0, 0, "flag"),
        Selection(20, 0, 6, "table", "t", 0.1),
        Selection(20, 7, 0, "table", "t", 0.4),
    ]
    choice = fit_budget(plan_for, BudgetSteps(selections), 20 * GIB)
    assert choice.selection == selections[1] and choice.reason.startswith(
        "the least harmful selection that fits, 6 of 20"
    )


def test_it_asks_for_few_plans():
    asked = []

    def counted(*args):
        asked.append(args)
        return plan_for(*args)

    fit_budget(counted, BudgetSteps(SELECTIONS), 17 * GIB)
    assert len(asked) <= 6


@pytest.mark.parametrize("options", [(), ("a", "b")])
def test_the_least_is_said_when_nothing_fits(options: tuple):
    with pytest.raises(
        ValueError, match="^--memory_budget 2.50 GiB is less than any setting needs: the least is"
    ) as e:
        fit_budget(plan_for, BudgetSteps(SELECTIONS, options), int(2.5 * GIB))
    assert "\n" not in str(e.value) and ("3.00 GiB" if options else "5.00 GiB") in str(e.value)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script.save_photos(tmp_path_factory.mktemp("photos"), [(64, 64)])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models fill no segment of a GPU's allocator, so on one all settings would need the same."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def plan_only(photos: Path, output: Path, *flags: str) -> dict[str, Any]:
    script.train(TINY_FAMILIES[0].folder, photos, output, "--plan_only", *flags)
    return json.loads((output / "plan.json").read_text())


def peak(plan: dict[str, Any]) -> int:
    return max(stage["needed_bytes"] for stage in plan["stages"])


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
def test_more_memory_never_costs_a_run_more(photos: Path, tmp_path: Path):
    """From all that the model needs to the least there is."""
    options = ("--memory_options", "checkpointing", "8bit_adam", "int8", "patches", "nf4")
    largest, choices = peak(plan_only(photos, tmp_path / "plain")), []
    for share in (1.0, 0.8, 0.5):
        budget = int(share * largest)
        plan = plan_only(photos, tmp_path / str(share), "--memory_budget", str(budget), *options)
        assert peak(plan) <= budget
        choices.append((plan["skip"]["leading"] + plan["skip"]["trailing"], len(used_options(plan))))
    assert choices == sorted(choices) and choices[0] == (0, 0) and choices[1][0] == 0 < choices[1][1]


def used_options(plan: dict[str, Any]) -> list[str]:
    names = ("checkpointing", "8bit_adam", "int8", "patches", "nf4")
    return [name for name in names if name in plan["fits"]["reason"]]


def test_fixed_spans_get_the_options_that_they_need(photos: Path, tmp_path: Path):
    fixed = plan_only(photos, tmp_path / "fixed", "--skip_blocks", "1,1")
    flags = (
        "--skip_blocks",
        "1,1",
        "--memory_budget",
        str(peak(fixed) - 1),
        "--memory_options",
        "checkpointing",
        "nf4",
    )
    plan = plan_only(photos, tmp_path / "fits", *flags)
    assert (plan["skip"]["leading"], plan["skip"]["trailing"]) == (1, 1) and plan["fits"]["ok"]
    assert used_options(plan)[:1] == ["checkpointing"]


def test_fixed_spans_that_do_not_fit_are_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(AssertionError, match="ended with 2"):
        plan_only(photos, tmp_path, "--skip_blocks", "1,1", "--memory_budget", "10KB")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --skip_blocks 1,1 needs") and "--memory_budget 10KB" in error
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory_budget", "1KB"), "error: --memory_budget 1KB is less than any setting needs"),
        (("--memory_budget", "much"), "error: --memory_budget: 'much' is not a number of bytes"),
        (("--memory_budget", "1GB", "--memory_options", "magic"), "error: --memory_options is 'magic'; choose from"),
    ],
)
def test_bad_budgets_are_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple, message: str
):
    with pytest.raises((AssertionError, SystemExit), match="2$"):
        plan_only(photos, tmp_path, *flags)
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
