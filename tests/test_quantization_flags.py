"""``--quantization`` and its config file: what is read, and what is refused in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blockskip_hooks.loading import quantization
from blockskip_hooks.loading.quantization import QuantizationConfig, read_quantization
from tests.quantized import FLUX, METHODS, needs, run_script
from tests.script import WEIGHTS


FLAG = "--bnb_quantization_config_path"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read", "name a JSON file"]),
        ("{load", ["is not JSON", "correct the file"]),
        ("\xff", ["is not JSON"]),
        ("[1]", ["no JSON object"]),
        ('{"load_in_4bits": true, "x": 1}', ["unknown keys: load_in_4bits, x", "load_in_4bit,"]),
        ("{}", ["either load_in_4bit or load_in_8bit"]),
        ('{"load_in_8bit": false}', ["either load_in_4bit or load_in_8bit"]),
        ('{"load_in_4bit": true, "load_in_8bit": true}', ["not both"]),
    ],
)
def test_a_config_file_that_cannot_work_is_one_line(tmp_path: Path, content: str | None, words: list[str]):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="bnb_quantization_config_path") as error:
        read_quantization("none", str(file))
    message = str(error.value)
    assert "\n" not in message and str(file) in message and all(word in message for word in words)


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": 1}, "load_in_4bit must be a boolean"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf16"}, "bf16"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "nn"}, "torch.dtype"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "choose nf4 or fp4"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6}, "must be a float"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "saves nothing"),
    ],
)
def test_a_value_that_bitsandbytes_cannot_use_is_one_line(tmp_path: Path, settings: dict, words: str):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="bnb_quantization_config_path") as error:
        read_quantization("none", str(file))
    assert "\n" not in str(error.value) and words in str(error.value)


@needs("bitsandbytes")
def test_a_config_file_is_read(tmp_path: Path):
    file = tmp_path / "config.json"
    settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    file.write_text(json.dumps({**settings, "bnb_4bit_compute_dtype": "bfloat16", "quant_method": "bitsandbytes"}))
    config = read_quantization("none", str(file))
    assert config == QuantizationConfig(
        library="bitsandbytes", bits=4, double_quant=True, compute_dtype=torch.bfloat16
    )
    file.write_text(json.dumps({"load_in_8bit": True, "llm_int8_skip_modules": ["to_q"], "llm_int8_threshold": 4.0}))
    config = read_quantization("none", str(file))
    assert config is not None and (config.bits, config.threshold, config.skipped_layers) == (8, 4.0, ("to_q",))
    assert read_quantization("none") is None


@pytest.mark.parametrize(("method", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_a_missing_package_is_named(method: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(ValueError, match=f"--quantization {method} needs .* pip install {package}"):
        read_quantization(method)
    if package == "bitsandbytes":
        file = tmp_path / "config.json"
        file.write_text('{"load_in_8bit": true}')
        with pytest.raises(ValueError, match=f"{FLAG} .* pip install bitsandbytes"):
            read_quantization("none", str(file))


def test_both_flags_at_once_are_refused():
    with pytest.raises(ValueError, match="--quantization nf4 .* give one of them"):
        read_quantization("nf4", "x.json")


@pytest.mark.parametrize("method", METHODS)
def test_a_device_that_the_library_cannot_use_ends_the_run_before_it_starts(
    method: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel for this device\nmore lines")

    monkeypatch.setattr(quantization, "quantize_layer", fail)
    tiny = FLUX
    with pytest.raises(AssertionError, match="ended with 2"):
        run_script(tiny, photos, tmp_path / "out", "--quantization", method)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "no kernel for this device; leave --quantization" in error
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_bad_config_file_ends_the_script_with_code_two(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(AssertionError, match="ended with 2"):
        run_script(FLUX, photos, tmp_path / "out", FLAG, str(tmp_path / "none.json"))
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "out" / WEIGHTS).exists()
