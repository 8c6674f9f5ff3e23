"""A plan without weights: of a folder of configs alone, and of a hub id, of which no weights are downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from tests.fake_hub import USER, fake_hub
from tests.script import load_script, settings


TOKEN = "Sesame0pen7"
WEIGHTS = (".safetensors", ".bin")


def plan(model: Path | str, photos: Path, output: Path, *flags: str) -> dict[str, Any]:
    """The plan without times, which are measured."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert load_script().main(settings(model, photos, output, "--plan_only", "--skip_blocks", "1,1", *flags)) == 0
    written = json.loads((output / "plan.json").read_text())
    written["stages"] = [{key: s[key] for key in s if "second" not in key} for s in written["stages"]]
    return written


@pytest.fixture
def configs(model: Path, tmp_path: Path) -> Path:
    """The tiny FLUX without weights and tokenizers' files."""
    folder = tmp_path / "configs"
    shutil.copytree(model, folder, ignore=lambda _, names: [n for n in names if n.endswith((*WEIGHTS, ".txt"))])
    return folder


def test_configs_alone_are_planned_like_the_whole_model(model: Path, configs: Path, photos: Path, tmp_path: Path):
    assert plan(configs, photos, tmp_path / "a") == plan(model, photos, tmp_path / "b")


def test_a_broken_config_is_found_without_weights(
    configs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (configs / "vae" / "config.json").write_text("{}")
    assert load_script().main(settings(configs, photos, tmp_path / "out", "--plan_only")) == 2
    assert "names the class None" in capsys.readouterr().err


def test_training_needs_the_weights(configs: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert load_script().main(settings(configs, photos, tmp_path / "out")) == 2
    assert "holds no safetensors weights" in capsys.readouterr().err


def test_of_a_hub_id_no_weights_are_downloaded(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with fake_hub(TOKEN) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        name = f"{USER}/tiny-flux"
        files = [path for path in model.rglob("*") if path.is_file()]
        hub.repositories.append(name)
        hub.files[name] = {str(path.relative_to(model)): path.read_bytes() for path in files}
        cache = ("--cache_dir", str(tmp_path / "cache"), "--hub_token", TOKEN)
        assert plan(name, photos, tmp_path / "a", *cache) == plan(model, photos, tmp_path / "b")
        assert "transformer/config.json" in hub.downloaded
        assert not [file for file in hub.downloaded if file.endswith(WEIGHTS)]
