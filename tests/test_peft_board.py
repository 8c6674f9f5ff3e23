"""PEFT's board: a tiny FLUX.2 through the whole command, its entry against keys and types of a published one."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.inference.image_encoders import load_image_encoder
from blockskip_hooks.planning.presets import load_preset
from blockskip_hooks.utils.machine import library_source
from tests.script import ROOT, WEIGHTS, load_module, save_photos
from tests.test_image_encoders import save_dinov2
from tests.tiny import TINY_FAMILIES


# Keys and types of results/shadow--flux2-klein-explicit.json in method_comparison/image-gen of huggingface/peft, at
# commit 354992862f4885a2b883078db0d2b6f10919f86e. "?" marks what is null in published entries, too.
ENTRY = {
    "run_info": {
        "created_at": "str",
        "total_time": "float",
        "experiment_name": "str",
        "peft_branch": "str",
        "peft_worktree_is_dirty": "bool",
        "train_config": {
            "model_id": "str",
            "dataset_id": "str",
            "dataset_split": "str",
            "dtype": "str",
            "resolution": "int",
            "batch_size": "int",
            "batch_size_eval": "int",
            "repeats": "int",
            "max_steps": "int",
            "eval_steps": "int",
            "compile": "bool",
            "use_gc": "bool",
            "seed": "int",
            "grad_norm_clip": "float",
            "optimizer_type": "str",
            "optimizer_kwargs": {"lr": "float", "weight_decay": "float"},
            "lr_scheduler": "str?",
            "use_amp": "bool",
            "autocast_adapter_dtype": "bool",
            "instance_prompts": "list",
            "image_column": "str",
            "valid_size": "int",
            "test_size": "int",
            "num_inference_steps": "int",
            "guidance_scale": "float",
            "max_sequence_length": "int",
            "text_encoder_out_layers": "list",
            "weighting_scheme": "str",
            "logit_mean": "float",
            "logit_std": "float",
            "mode_scale": "float",
            "dino_model_id": "str",
            "dino_image_size": "int",
            "sample_image_prompts": "list",
            "drift_image_prompts": "list",
        },
        "peft_config": "dict",
        "error_msg": "str",
    },
    "train_info": {
        "accelerator_memory_reserved_avg": "int",
        "accelerator_memory_max": "int",
        "accelerator_memory_reserved_99th": "int",
        "train_time": "float",
        "file_size": "int",
        "num_trainable_params": "int",
        "num_total_params": "int",
        "status": "str",
        "metrics": "list",
    },
    "meta_info": {
        "model_info": {"sha": "str?", "created_at": "str?"},
        "dataset_info": {"sha": "str?", "created_at": "str?"},
        "package_info": {
            "transformers-version": "str",
            "transformers-commit-hash": "str?",
            "peft-version": "str",
            "peft-commit-hash": "str?",
            "datasets-version": "str",
            "datasets-commit-hash": "str?",
            "diffusers-version": "str",
            "diffusers-commit-hash": "str?",
            "torch-version": "str",
            "torch-commit-hash": "str?",
        },
        "system_info": {
            "system": "str",
            "release": "str",
            "version": "str",
            "machine": "str",
            "processor": "str",
            "accelerator": "str",
        },
        "pytorch_info": "str",
    },
}
VALID_LINE = {
    "step": "int",
    "valid dino_similarity": "float",
    "train loss": "float",
    "train samples": "int",
    "train time": "float",
    "eval time": "float",
    "mem allocated avg": "float",
    "mem reserved avg": "float",
    "elapsed time": "float",
}
TEST_LINE = {
    "step": "int",
    "test dino_similarity": "float",
    "drift": "float",
    "train loss": "float",
    "train samples": "int",
}
LORA_KEYS = {"peft_type", "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type"}
"""Part of what ``peft_config`` holds in the entry of plain LoRA, ``results/lora--flux2-klein-default.json``."""

# What a release of peft on a processor cannot tell.
UNKNOWN = {
    "run_info/peft_branch",
    "run_info/peft_worktree_is_dirty",
    "train_info/accelerator_memory_reserved_avg",
    "train_info/accelerator_memory_max",
    "train_info/accelerator_memory_reserved_99th",
    "meta_info/system_info/accelerator",
}
KLEIN = next(tiny for tiny in TINY_FAMILIES if tiny.name == "flux2-klein")
PROMPTS = ["sks cat on a chair", "a box and sks cat", "sks cat asleep", "sks cat in a bath", "red sks cat", "sks cat"]


@pytest.fixture(scope="module")
def board() -> ModuleType:
    return load_module(ROOT / "benchmarks" / "peft_board.py")


@pytest.fixture(scope="module")
def command():
    """The benchmark's main, in this process."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    module = load_module(ROOT / "benchmarks" / "peft_image_gen.py")
    sys.path.remove(str(ROOT / "benchmarks"))

    def run(*argv: Any) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return module.main([str(word) for word in argv])

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command has run once, with flags of the training script."""
    folder = tmp_path_factory.mktemp("board")
    save_photos(folder / "dataset", [(80, 64), (64, 64), (64, 96), (70, 64), (64, 64), (64, 72)])
    torch.manual_seed(0)
    save_dinov2(folder / "tiny-dino")
    changes = {
        "model_id": str(KLEIN.folder),
        "dataset_id": str(folder / "dataset"),
        "dtype": "float32",
        "resolution": 64,
        "max_steps": 5,
        "eval_steps": 2,
        "valid_size": 1,
        "test_size": 2,
        "num_inference_steps": 2,
        "max_sequence_length": 12,
        "instance_prompts": PROMPTS,
        "dino_model_id": str(folder / "tiny-dino"),
        "sample_image_prompts": ["a photo of sks cat"],
        "drift_image_prompts": ["a photo of cat", "a dog"],
        "optimizer_kwargs": {"lr": 0.01, "weight_decay": 0.0001},
    }
    (folder / "params.json").write_text(json.dumps(changes))
    argv = ["--training_params", folder / "params.json", "--output", folder / "entry.json"]
    assert command(*argv, "--output_dir", folder / "run", "--skip_blocks", "1,1", "--rank", "2") == 0
    return folder


def entry_of(folder: Path, name: str = "entry") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def differences(value: Any, expected: Any, where: str = "") -> set[str]:
    """Places where keys or types are not the expected ones, null among them."""
    if isinstance(expected, dict):
        if not isinstance(value, dict) or set(value) != set(expected):
            return {where or "/"}
        return {place for key in expected for place in differences(value[key], expected[key], f"{where}/{key}")}
    right = type(value).__name__ == expected.rstrip("?") or (value is None and expected.endswith("?"))
    return set() if right else {where}


def test_entry_has_the_keys_and_types_of_the_board(finished: Path):
    entry = entry_of(finished)
    assert differences(entry, ENTRY) == {f"/{place}" for place in UNKNOWN}
    *valid, test = entry["train_info"]["metrics"]
    assert [line["step"] for line in valid] == [2, 4]
    for line in valid:
        assert differences(line, VALID_LINE) == {"/mem allocated avg", "/mem reserved avg", "/elapsed time"}
    assert not differences(test, TEST_LINE) and test["step"] == 5 and test["train samples"] == 10
    assert set(entry["run_info"]["peft_config"]) >= LORA_KEYS


def test_entry_says_what_was_done(finished: Path):
    entry, report = entry_of(finished), json.loads((finished / "run" / "run_report.json").read_text())
    config, info = entry["run_info"]["train_config"], entry["train_info"]
    assert entry["run_info"]["experiment_name"] == "blockskip/flux2-klein-skip-1-1"
    assert entry["run_info"]["peft_config"]["r"] == 2 and config["use_gc"] and not config["use_amp"]
    assert config["max_steps"] == 5 and config["optimizer_kwargs"] == {"lr": 0.01, "weight_decay": 0.0001}
    assert info["file_size"] == (finished / "run" / WEIGHTS).stat().st_size
    losses = report["train"]["loss"]
    assert [line["train loss"] for line in info["metrics"]] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:4]) / 2, sum(losses[3:]) / 2]
    )
    whole = sum(parameter.numel() for parameter in KLEIN.make_transformer().parameters())
    assert info["num_total_params"] == whole + info["num_trainable_params"]
    assert 0 < info["train_time"] < entry["run_info"]["total_time"]
    # The LoRA has changed the images.
    assert info["metrics"][-1]["drift"] > 1e-5


def test_lora_and_model_are_as_large_as_the_board_says(board: ModuleType):
    """Those of its entry of plain LoRA, ``results/lora--flux2-klein-default.json``."""
    preset, nothing_skipped = load_preset("flux.2-klein-4b"), BlockSkipConfig()
    transformer = preset.skeleton(nothing_skipped).transformer
    targets = [transformer.get_submodule(name) for name in preset.lora_targets(nothing_skipped, board.LAYERS)]
    trainable = sum(board.RANK * (layer.in_features + layer.out_features) for layer in targets)
    assert trainable == 38_338_560
    assert sum(parameter.numel() for parameter in transformer.parameters()) + trainable == 3_913_883_136


def test_cosine_schedule_warms_up_as_on_the_board(board: ModuleType):
    flags = board.training_flags(board.SETTINGS | {"lr_scheduler": "cosine"})
    assert (flags["--lr_scheduler"], flags["--lr_warmup_steps"]) == ("cosine", 75)
    flags = board.training_flags(board.SETTINGS)
    assert (flags["--lr_scheduler"], flags["--lr_warmup_steps"]) == ("constant", 0)


def test_nothing_is_evaluated_after_a_plan(finished: Path, command, tmp_path: Path):
    argv = ["--training_params", finished / "params.json", "--output_dir", tmp_path / "run"]
    assert command(*argv, "--output", tmp_path / "entry.json", "--plan_only") == 0
    assert not (tmp_path / "entry.json").exists()
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["skip"]["source"] == "rule"


def test_rows_are_divided_as_on_the_board(finished: Path, board: ModuleType):
    # The board shuffles row numbers by numpy's old generator with seed 0.
    np.random.seed(0)
    order = np.arange(6)
    np.random.shuffle(order)
    rows = board.split_rows(6, board.read_settings(finished / "params.json"))
    assert [*rows["train"], *rows["valid"], *rows["test"]] == order.tolist()
    assert [len(rows[part]) for part in ("train", "valid", "test")] == [3, 1, 2]
    photos = finished / "run" / "board" / "photos"
    captions = [path.read_text() for path in sorted(photos.glob("*.txt"))]
    assert captions == [PROMPTS[row] for row in rows["train"]]
    assert {Image.open(path).size for path in photos.glob("*.png")} == {(64, 64)}
    published = board.split_rows(20, board.SETTINGS)
    assert published["test"] == [3, 0, 15, 12] and published["valid"] == [16, 11]


def test_similarity_is_to_the_photo_of_the_prompt(finished: Path, board: ModuleType):
    encoder = load_image_encoder(finished / "tiny-dino")
    rows = board.split_rows(6, board.read_settings(finished / "params.json"))["test"]
    files = sorted((finished / "run" / "board" / "images").glob("test-final-*.png"))
    images = [Image.open(path) for path in files]
    assert len(images) == 3 * len(rows)
    references = encoder.embed([Image.open(finished / "dataset" / f"{row}.png") for row in rows]).repeat(3, 1)
    expected = (encoder.embed(images) * references).sum(1).mean().item()
    assert entry_of(finished)["train_info"]["metrics"][-1]["test dino_similarity"] == pytest.approx(expected, abs=1e-5)


def test_entry_of_a_finished_run_is_the_same(finished: Path, command, capsys):
    assert command("--from_run", finished / "run", "--output", finished / "again.json") == 0
    assert capsys.readouterr().err.count("stay null: it is a local folder") == 2
    assert entry_of(finished, "again") == entry_of(finished)


def test_a_run_without_an_evaluation_gets_one(finished: Path, command):
    argv = ["--from_run", finished / "run", "--training_params", finished / "params.json"]
    argv += ["--results", finished / "other" / "results.json", "--output", finished / "evaluated.json"]
    assert command(*argv, "--experiment_name", "lora/mine") == 0
    first, second = entry_of(finished), entry_of(finished, "evaluated")
    assert second["run_info"]["experiment_name"] == "lora/mine"
    scores = ("valid dino_similarity", "test dino_similarity", "drift")
    lines = [[line.get(name) for name in scores] for line in first["train_info"]["metrics"]]
    assert [[line.get(name) for name in scores] for line in second["train_info"]["metrics"]] == lines


def test_figures_of_a_device_and_of_a_resumed_run(finished: Path, board: ModuleType):
    report = json.loads((finished / "run" / "run_report.json").read_text())
    results = json.loads((finished / "run" / "board" / "results.json").read_text())
    report["train"]["step_memory"] = {"allocated_bytes": [1, 3, 5, 7, 9], "reserved_bytes": [10, 20, 30, 40, 50]}
    for stage in report["stages"]:
        stage["peak_device_reserved_bytes"] = {"encode": 99, "precompute": 70, "train": 60}.get(stage["name"], 0)
    report["machine"] |= {"device": "cuda", "device_name": "NVIDIA L40S"}
    report["machine"]["sources"]["peft"] = {"commit": "b2d61f5", "branch": "main"}
    entry = board.make_entry(report, results, {})
    info = entry["train_info"]
    assert differences({**entry, "run_info": {**entry["run_info"], "peft_worktree_is_dirty": False}}, ENTRY) == set()
    assert (info["accelerator_memory_reserved_avg"], info["accelerator_memory_reserved_99th"]) == (30, 49)
    # What encodes prompts is gone before training, and the board does not count it either.
    assert info["accelerator_memory_max"] == 70
    assert [line["mem reserved avg"] for line in info["metrics"][:2]] == [15, 35]
    assert entry["run_info"]["peft_branch"] == "main"
    # Two steps were done before the process that wrote the report.
    resumed = copy.deepcopy(report)
    resumed["train"]["step_seconds"] = resumed["train"]["step_seconds"][2:]
    entry = board.make_entry(resumed, results, {})
    first, second, _ = entry["train_info"]["metrics"]
    assert first["train time"] is None and second["train time"] == sum(report["train"]["step_seconds"][2:4])
    assert entry["train_info"]["train_time"] is None and entry["run_info"]["total_time"] is None


def test_source_of_a_library_is_what_its_installer_noted(monkeypatch: pytest.MonkeyPatch):
    noted = {"url": "https://example.org/peft", "vcs_info": {"vcs": "git", "commit_id": "abc"}}

    class Distribution:
        def read_text(self, name: str) -> str | None:
            return json.dumps(noted) if name == "direct_url.json" else None

    monkeypatch.setattr("blockskip_hooks.utils.machine.metadata.distribution", lambda name: Distribution())
    assert library_source("peft") == {"commit": "abc", "branch": None}
    noted.pop("vcs_info")
    assert library_source("peft") is None


def test_report_holds_no_token(finished: Path):
    settings = json.loads((finished / "run" / "run_report.json").read_text())["settings"]
    assert (
        "hub_token" not in settings and settings["rank"] == 2 and settings["text_encoder_out_layers"] == [10, 20, 30]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"instance_prompts": ["one"]}, "1 prompts for 6 photos"),
        ({"valid_size": 4}, "leave some of 6 rows"),
        ({"test_size": 0}, "must be 1 or more"),
        ({"max_step": 3}, "max_step, which the board does not know"),
        ({"max_steps": "many"}, "max_steps is 'many'; the board has 750"),
        ({"compile": True}, "compile is True; the script only does False"),
        ({"lr_scheduler": "linear"}, "only does None or cosine"),
        ({"dino_model_id": "no/such-encoder"}, "no/such-encoder cannot be loaded"),
    ],
    ids=["prompts", "sizes", "test", "name", "type", "compile", "schedule", "encoder"],
)
def test_settings_that_cannot_work(changes, words: str, finished: Path, command, tmp_path: Path, capsys):
    params = json.loads((finished / "params.json").read_text()) | changes
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert command("--training_params", tmp_path / "params.json", "--output_dir", tmp_path / "run") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line and not (tmp_path / "run").exists()


def test_runs_that_say_too_little(finished: Path, command, tmp_path: Path, capsys):
    assert command("--from_run", tmp_path, "--output", tmp_path) == 2
    assert "name a file in it" in capsys.readouterr().err
    assert command("--from_run", tmp_path) == 2
    assert "name a finished run" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"schema": 1, "results": []}')
    assert command("--from_run", finished / "run", "--results", tmp_path / "results.json") == 2
    assert "the photo of its own prompt" in capsys.readouterr().err
    (tmp_path / WEIGHTS).touch()
    (tmp_path / "run_report.json").write_text('{"schema": 1, "settings": {}}')
    assert command("--from_run", tmp_path) == 2
    assert "lacks created_at, lora, machine" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        command("--from_run", finished / "run", "--rank", "8")
    assert exit_info.value.code == 2
