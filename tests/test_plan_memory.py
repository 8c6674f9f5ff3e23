"""The script ``plan_memory.py``: the plan of a preset as JSON and as text, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from blockskip_hooks.embedded import embedded_photos
from blockskip_hooks.planning.presets import find_preset, write_preset
from tests.plans import stage
from tests.script import load_script
from tests.tiny import TINY_FAMILIES


@pytest.mark.parametrize("as_json", [True, False])
def test_script(as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def write_tiny(name: str, folder: Path, pipeline_settings: Any) -> str:
        shutil.copytree(TINY_FAMILIES[0].folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        return name

    script = load_script("plan_memory")
    monkeypatch.setattr(script, "write_preset", write_tiny)
    monkeypatch.setattr(script, "find_preset", lambda name: name)
    command = ["--preset", "tiny", "--skip_blocks", "1,2", "--resolution", "64", "--max_sequence_length", "5"]
    command += ["--precompute_batch_size", "1"]
    monkeypatch.setattr(logging.getLogger("blockskip_hooks"), "level", logging.WARNING)
    if as_json:
        assert script.main([*command, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["patch"]["training_resolution"] == 32
        assert plan["plain_lora"]["peak_device_bytes"] > stage(plan, "train")["peak_device_bytes"]
    else:
        assert script.main(command) == 0
        said = capsys.readouterr().out
        assert "plain LoRA at 64 px: " in said and max(map(len, said.splitlines())) <= 80
    # A command that follows in this process warns as ever.
    assert logging.getLogger("blockskip_hooks").level == logging.WARNING


@pytest.mark.slow
def test_a_preset_is_planned_as_the_training_script_plans_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers for the folder that a preset is written to."""
    flags = ["--skip_blocks", "6,2", "--resolution", "512", "--train_batch_size", "1", "--mixed_precision", "bf16"]
    assert load_script("plan_memory").main(["--preset", "sana-0.6b", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    name = write_preset("sana-0.6b", tmp_path / "model")
    command = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--instance_prompt", "a dog", *flags]
    command += ["--instance_data_dir", str(embedded_photos()), "--max_train_steps", "500", "--plan_only"]
    command += ["--residual_budget", "16GB", "--skip_final_inference", "--output_dir", str(tmp_path / "out")]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert load_script().main(command) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert planned["model"] == name
    for written in (plan, planned):
        written["stages"] = [{key: s[key] for key in s if "second" not in key} for s in written["stages"]]
    assert plan == {key: planned[key] for key in plan}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "model"], "--preset 'model' does not exist; choose one of flux.1-dev, "),
        (["--preset", "flux1-dev"], "--preset 'flux1-dev' does not exist; did you mean flux.1-dev? There are "),
        (["flux.1-dev"], "arguments: flux.1-dev; a text of several words needs quotes, a value its flag before it"),
        (["--presets", "flux.1-dev"], "did you mean --preset?"),
        (["--preset", "flux.1-dev", "--skip_blocks", "30,27"], "--skip_blocks 30,27"),
        (["--preset", "flux.1-dev", "--resolution", "500"], "--resolution is 500"),
        (["--preset", "flux.1-dev", "--rank", "0"], "--rank is 0"),
        (["--preset", "flux.1-dev", "--memory_budget", "much"], "'much' is not a number of bytes"),
    ],
)
def test_script_rejects(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The parser ends the process by itself.
    with contextlib.suppress(SystemExit):
        assert load_script("plan_memory").main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_base_model_has_the_preset_of_its_distilled_one_and_others_are_planned_by_training() -> None:
    assert find_preset("black-forest-labs/FLUX.2-klein-base-9B") == "flux.2-klein-9b"
    with pytest.raises(ValueError, match="other models: blockskip train .* --plan_only"):
        find_preset("black-forest-labs/FLUX.1-Kontext-dev")


@pytest.mark.parametrize("text", ["sana-1.6b", "SANA-1.6B", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"])
def test_a_preset_is_found_by_the_names_that_people_know(text: str) -> None:
    assert find_preset(text) == "sana-1.6b"
