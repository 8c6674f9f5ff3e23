"""What fits a GPU: two settings of each model, in the planner's order and by compute."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from blockskip_hooks.cli.gpu_sizes import Fit, format_fits
from blockskip_hooks.planning.budget import BudgetSteps, Choice, selections_for_budget
from blockskip_hooks.planning.presets import preset_facts
from blockskip_hooks.planning.ranking import USABLE, closest_to_plain, known_fidelity, least_compute, tflops_per_sample
from blockskip_hooks.selection import Selection
from tests.script import ROOT, load_module, load_script


GIB = 2**30
PAIRS = [Selection(20, 0, 0, "flag"), Selection(20, 6, 0, "flag"), Selection(20, 4, 2, "rule")]


def plan_for(selection: Selection, options: tuple[str, ...]) -> dict[str, Any]:
    """20 blocks of 1 GiB, of half a GiB in int8; 4 GiB of activations, 1 GiB with checkpointing.

    A forward of the model takes 20 TFLOP; whatever is skipped, the records need one for each sample, in a batch of 2.
    """
    block = 0.5 if "int8" in options else 1
    activations = 1 if "checkpointing" in options else 4
    kept = 20 - selection.num_skipped
    train = {
        "name": "train",
        "needed_bytes": int((block * kept + activations) * GIB),
        "tflops_per_step": kept * (3.0 if "checkpointing" in options else 2.0),
        "vae_tflops": 0.0,
        "batch_size": 1,
    }
    stages = [train]
    if selection.num_skipped:
        record = {"name": "precompute", "tflops_per_step": 50.0, "vae_tflops": 10.0, "batch_size": 2}
        stages.insert(0, {**record, "needed_bytes": GIB})
    pair = {"leading": selection.leading, "trailing": selection.trailing}
    return {"stages": stages, "skip": pair, "patch": {"mode": "none", "min": 512, "max": 512}}


def test_compute_is_that_of_a_step_and_its_record_without_the_vae():
    assert tflops_per_sample(plan_for(PAIRS[0], ())) == 40
    assert tflops_per_sample(plan_for(PAIRS[1], ())) == 14 * 2 + (50 - 10) / 2


@pytest.mark.parametrize(
    ("gib", "pair", "options"),
    [
        # 20 blocks and 4 GiB: nothing is skipped, because a record costs more than the blocks that it saves.
        (24, (0, 0), ("8bit_adam", "patches")),
        (23, (6, 0), ("8bit_adam", "patches")),
        (18, (6, 0), ("8bit_adam", "patches")),
        # Of what fits with checkpointing: 15 GiB.
        (17, (6, 0), ("checkpointing", "8bit_adam", "patches")),
        # Quantised only where weights as they are do not fit.
        (14, (0, 0), ("8bit_adam", "int8", "patches")),
        (11, (6, 0), ("8bit_adam", "int8", "patches")),
        (10, (6, 0), ("checkpointing", "8bit_adam", "int8", "patches")),
    ],
)
def test_the_least_compute_that_fits(gib: int, pair: tuple[int, int], options: tuple[str, ...]):
    choice = least_compute(plan_for, PAIRS, gib * GIB)
    assert choice is not None
    assert ((choice.selection.leading, choice.selection.trailing), choice.options) == (pair, options)


def test_nothing_fits():
    assert least_compute(plan_for, PAIRS, 7 * GIB) is None
    steps = BudgetSteps(selections_for_budget([GIB] * 20), ("checkpointing",))
    assert closest_to_plain(plan_for, steps, GIB) is None
    closest = closest_to_plain(plan_for, steps, 21 * GIB)
    assert closest is not None and closest.options == ("checkpointing",) and closest.selection.num_skipped == 0


def test_what_the_paper_reports_is_of_its_own_settings():
    choice = Choice(Selection(57, 0, 0, "flag"), ("8bit_adam", "patches"), {}, "")
    assert known_fidelity(preset_facts("flux.1-dev")["reported"], choice) == "DINO 0.725 of 0.732"
    assert known_fidelity(preset_facts("flux.1-dev")["reported"], replace(choice, options=("int8", "patches"))) is None
    assert known_fidelity(preset_facts("flux.1-dev")["reported"], replace(choice, options=())) is None
    assert known_fidelity({}, choice) is None


def test_a_ranking_lists_what_changes_least_first():
    def fit(pair: Selection, *options: str) -> Fit:
        return Fit(512, Choice(pair, options, plan_for(pair, options), ""), 0.5)

    some, none = fit(PAIRS[1], "int8"), fit(PAIRS[0])
    lines = format_fits([("a", some, None), ("b", none, some), ("c", None, None)]).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["b", "closest"],
        ["b", "fastest"],
        ["a", "closest"],
        ["c", "nothing"],
    ]
    assert lines[3].split()[2:] == ["6,0", "(30%)", "int8", "–", "512", "px", "11.0", "GiB", "(train)", "50%", "–"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--preset names the model; choose one of flux.1-dev"),
        (
            ["--gpu", "12GB", "--skip_blocks", "3", "--json"],
            "--gpu chooses --skip_blocks, --json itself; leave it out",
        ),
        (["--gpu", "large"], "'large' is not a number of bytes"),
        (["--gpu", "12GB", "--preset", "flux"], "--preset 'flux' does not exist"),
    ],
)
def test_what_cannot_be_ranked_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    try:
        assert load_script("plan_memory").main(words) == 2
    except SystemExit as error:
        assert error.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# The recipes


@pytest.fixture(scope="module")
def recipes():
    return load_module(ROOT / "tools" / "make_recipes.py")


@pytest.fixture(scope="module")
def results(recipes) -> dict[str, Any]:
    return json.loads(recipes.RESULTS.read_text())


def test_the_pages_and_the_configs_are_what_was_planned(recipes, results: dict[str, Any]):
    for page, models in recipes.PAGES.items():
        assert recipes.BEGIN + recipes.table(results, models) + recipes.END in page.read_text()
    assert set(recipes.MODELS) <= set(results)
    for size in recipes.SIZES:
        setting = results[recipes.FLUX][str(size)]
        assert (ROOT / "configs" / f"flux-{size}gb.yaml").read_text() == recipes.config(size, setting)


def test_more_memory_never_costs_more(recipes, results: dict[str, Any]):
    """No more blocks are skipped, and no setting needs more than there is."""
    for model in recipes.MODELS:
        settings = [(size, results[model][str(size)]) for size in recipes.SIZES if results[model][str(size)]]
        for size, setting in settings:
            assert max(setting["stages"].values()) <= USABLE * size * 1e9, (model, size)
        skipped = [setting["leading"] + setting["trailing"] for _, setting in settings]
        assert skipped == sorted(skipped, reverse=True), model


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux.1-dev", "sana-1.6b"])
def test_the_recipes_are_what_the_planner_says(recipes, results: dict[str, Any], model: str):
    planned = recipes.plan(recipes.load_planner(), model)
    assert json.loads(json.dumps(planned)) == results[model]


@pytest.mark.parametrize("size", [6, 8, 12, 16, 24])
def test_a_config_plans_what_it_says(size: int, recipes, results: dict[str, Any]):
    """Its flags are those of the setting."""
    setting = results[recipes.FLUX][str(size)]
    flags = yaml.safe_load((ROOT / "configs" / f"flux-{size}gb.yaml").read_text())
    leading, trailing = setting["leading"], setting["trailing"]
    assert flags["skip_blocks"] == (f"{leading},{trailing}" if leading or trailing else "none")
    assert flags.get("quantization", "bf16") == setting["held"]
    assert flags.get("gradient_checkpointing", False) == ("checkpointing" in setting["options"])
    assert flags["resolution"] == setting["resolution"]
    # Images are as large as what is trained on; the plan has room for those of the model's own size.
    assert flags.get("validation_resolution", recipes.FULL_RESOLUTION) == setting["resolution"]
