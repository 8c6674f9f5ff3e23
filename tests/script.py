"""The training script, run in this process with small settings."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
PROMPT = "a photo of sks dog"
WEIGHTS = "pytorch_lora_weights.safetensors"


@functools.cache
def load_script(name: str = "train_dreambooth_blockskip") -> ModuleType:
    """A script of the examples as a module."""
    return load_module(ROOT / "examples" / "dreambooth_blockskip" / f"{name}.py")


def load_module(path: Path) -> ModuleType:
    """A file outside the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(
    model: Path, photos: Path, output: Path, *flags: str, resolution: int = 64, text_tokens: int = 12
) -> list[str]:
    """A command line with small settings, which ``flags`` overrule."""
    defaults = {
        "--pretrained_model_name_or_path": model,
        "--instance_data_dir": photos,
        "--instance_prompt": PROMPT,
        "--output_dir": output,
        "--resolution": resolution,
        "--max_sequence_length": text_tokens,
        "--train_batch_size": 2,
        "--max_train_steps": 4,
        "--checkpointing_steps": 100,
        "--rank": 2,
        "--lora_alpha": 4,
        "--learning_rate": 1e-2,
        "--lr_warmup_steps": 0,
        "--seed": 3,
        "--report_to": "none",
    }
    given = {flag for flag in flags if flag.startswith("--")}
    argv = [str(part) for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    return [*argv, *map(str, flags)]


def train(model: Path, photos: Path, output: Path, *flags: str, resolution: int = 64, text_tokens: int = 12) -> Path:
    """Run the script with small settings, which ``flags`` overrule, and return its output folder."""
    # Accelerate's state lives as long as the process; a run of its own would start without.
    AcceleratorState._reset_state(reset_partial_state=True)
    code = load_script().main(settings(model, photos, output, *flags, resolution=resolution, text_tokens=text_tokens))
    assert code == 0, f"the script ended with {code}"
    return output


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Noise pictures of the given widths and heights."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number, (width, height) in enumerate(sizes):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def losses(output: Path) -> list[float]:
    """Loss of each step of a finished run."""
    return json.loads((output / "run_report.json").read_text())["train"]["loss"]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The exported LoRA."""
    return load_file(output / WEIGHTS)


def assert_same_weights(actual: Path, expected: Path) -> None:
    """Bit for bit."""
    a, b = weights(actual), weights(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
