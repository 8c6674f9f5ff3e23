"""Bad input of the script that measures which blocks to skip."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.bad_input.cases import MODEL, OUT, Case, Harmful, Make
from tests.bad_input.model_cases import pickled, weights


def lora(
    layer: str | None, features: int = 32, change: Callable[[bytes], bytes] = bytes, name: str = "lora.safetensors"
) -> Make:
    def build(folder: Path) -> Path:
        tensors = {
            f"{layer}.lora_A.weight": torch.zeros(2, features),
            f"{layer}.lora_B.weight": torch.zeros(features, 2),
        }
        save_file(tensors if layer else {"unet.x": torch.zeros(1)}, folder / name)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder / name

    return build


def pickled_lora(folder: Path) -> Path:
    (folder / "lora.bin").write_bytes(pickle.dumps(Harmful()))
    return folder / "lora.bin"


_LAYER = "transformer.transformer_blocks.0.attn.to_q"


def adapted(make: Make | str) -> dict[str, Any]:
    return {"--lora_weights": make, "--prompts": "a photo of sks dog"}


SELECT_CASES: dict[str, Case] = {
    **{
        f"{name} of {value}": ({f"--{name}": value}, [f"--{name}"])
        for name in ["max_sequence_length", "resolution", "num_inference_steps", "search_stride", "images_at_once"]
        for value in ("0", "-1", "1.5")
    },
    "no blocks to measure": ({"--search_stride": "5"}, ["--search_stride is 5", "5 blocks"]),
    "windows above the model": ({"--window_lengths": "9"}, ["--window_lengths is 9"]),
    "a size off the grid": ({"--resolution": "60"}, ["--resolution is 60"]),
    "a seed in words": ({"--seeds": "one"}, ["--seeds", "one"]),
    "a negative seed": ({"--seeds=-1": True}, ["--seeds has -1"]),
    "a blank prompt": ({"--prompts": " "}, ["--prompts"]),
    "a LoRA without a prompt": ({"--lora_weights": "photos"}, ["--lora_weights", "--prompts"]),
    "a LoRA that is not there": (adapted("nothing"), ["--lora_weights nothing"]),
    "a LoRA of another model": (adapted(lora("transformer.blocks.0.to_q")), ["--lora_weights", "another model"]),
    "a LoRA of other widths": (adapted(lora(_LAYER, 48)), ["--lora_weights", "takes 48 features", "has 32"]),
    "a LoRA cut short": (
        adapted(lora(_LAYER, change=lambda content: content[:-1])),
        ["--lora_weights", "not a whole"],
    ),
    "an empty LoRA": (adapted(lora(_LAYER, change=lambda _: b"")), ["--lora_weights", "it is empty"]),
    "weights that are no LoRA": (adapted(lora(None)), ["--lora_weights", "holds no LoRA"]),
    "a pickled LoRA": (adapted(pickled_lora), ["--lora_weights", "pickled weights are not read"]),
    "a LoRA of streamed blocks": (
        {**adapted("photos"), "--stream_blocks": True},
        ["--stream_blocks", "--lora_weights"],
    ),
    "an output that is a file": ({OUT: "a file"}, ["--output_dir a file", "is a file"]),
    "an output in no one's folder": ({OUT: "/proc/nothing"}, ["/proc/nothing"]),
    "a model of photos": ({MODEL: "photos"}, [f"{MODEL} photos"]),
    "a model cut short": ({MODEL: weights("vae", lambda content: content[:-1])}, [MODEL, "vae", "not a whole"]),
    "a model of pickles": ({MODEL: pickled("text_encoder")}, [MODEL, "text_encoder"]),
    "a flag of the other script": ({"--rank": "4"}, ["--rank"]),
    "an unknown precision": ({"--mixed_precision": "fp8"}, ["--mixed_precision", "fp8"]),
}
