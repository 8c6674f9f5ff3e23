"""Bad input of the training script: flags and checkpoints to resume from, and all of its tables in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.bad_input.cases import MODEL, OUT, PHOTOS, TRANSFORMER, Case, Make
from tests.bad_input.model_cases import MODEL_CASES, model
from tests.bad_input.photo_cases import DATASET_CASES, PHOTO_CASES


# Flags

_WHOLE = [
    "rank",
    "resolution",
    "seed",
    "max_train_steps",
    "train_batch_size",
    "checkpointing_steps",
    "dataloader_num_workers",
    "repeats",
]
_RATES = [
    "learning_rate",
    "guidance_scale",
    "prior_loss_weight",
    "adam_epsilon",
    "max_grad_norm",
    "logit_std",
    "mode_scale",
]
_TEXTS = [
    "output_dir",
    "instance_data_dir",
    "pretrained_model_name_or_path",
    "lora_layers",
    "lora_blocks",
    "resume_from_checkpoint",
    "variant",
    "revision",
    "cache_dir",
    "residual_dir",
    "residual_budget",
    "stream_cache",
    "logging_dir",
    "report_to",
    "hub_model_id",
]

FLAG_CASES: dict[str, Case] = {
    **{f"half a {name}": ({f"--{name}": "1.5"}, [f"--{name}", "1.5"]) for name in _WHOLE},
    **{f"{name} of {value}": ({f"--{name}": value}, [f"--{name} is"]) for name in _RATES for value in ("nan", "inf")},
    **{f"an empty {name}": ({f"--{name}": ""}, [f"--{name} is empty"]) for name in _TEXTS},
    **{
        f"--skip_blocks '{value}'": ({"--skip_blocks": value}, ["--skip_blocks"])
        for value in ("1;1", "1,", ",1", "1 1", "all", "9" * 30, "٣", "0x1", "4,4", "5", "0,5", "1,1,")
    },
    "a negative --skip_blocks": ({"--skip_blocks=-1": True, "--skip_blocks": None}, ["--skip_blocks is '-1'"]),
    "a comma as --lora_layers": ({"--lora_layers": ","}, ["--lora_layers '' is"]),
    "a name too many": ({"--lora_layers": "attn.to_q,nothing"}, ["--lora_layers 'nothing' is"]),
    "text layers that are skipped": (
        {"--skip_blocks": "2,1", "--lora_layers": "attn.add_k_proj,attn.add_q_proj"},
        ["--lora_layers", "matches no layer of a kept block"],
    ),
    "a repository with blanks": ({"--push_to_hub": True, "--hub_model_id": "my lora"}, ["--hub_model_id"]),
    "a repository of three parts": ({"--push_to_hub": True, "--hub_model_id": "a/b/c"}, ["--hub_model_id"]),
    "a token for a tracker": ({"--hub_token": "SECRET", "--report_to": "all"}, ["--hub_token", "--report_to all"]),
    "a path that is too long": ({PHOTOS: "x" * 300}, ["File name too long"]),
    "an output that is too long": ({OUT: "x" * 300}, ["File name too long"]),
    "an output that no one may write": ({OUT: "/proc/nothing"}, ["/proc/nothing"]),
    "too little memory": ({"--memory_budget": "1KB"}, ["--memory_budget 1KB", "--skip_blocks auto"]),
    "a word of memory": ({"--memory_budget": "much"}, ["--memory_budget: 'much' is not"]),
    "an unknown option": ({"--memory_budget": "1GB", "--memory_options": "magic"}, ["--memory_options", "magic"]),
    "two budgets": (
        {"--skip_blocks": "auto", "--skip_budget": "1KB", "--memory_budget": "1GB"},
        ["--skip_budget", "--memory_budget"],
    ),
    "a budget and a pair": ({"--skip_budget": "1KB"}, ["--skip_budget", "--skip_blocks"]),
    "a budget above the model": ({"--skip_blocks": "auto", "--skip_budget": "1TB"}, ["--skip_budget"]),
    "a table that is not there": (
        {"--skip_blocks": "auto", "--selection_table": "nothing"},
        ["--selection_table nothing"],
    ),
    "a table that is a photo": ({"--skip_blocks": "auto", "--selection_table": "photos/0.png"}, ["photos/0.png"]),
    "buckets in words": ({"--aspect_ratio_buckets": "wide"}, ["--aspect_ratio_buckets"]),
    "buckets without bounds": ({"--aspect_ratio_buckets": "64,640000000"}, ["--aspect_ratio_buckets"]),
    "half precision without a GPU": ({"--mixed_precision": "fp16"}, ["--mixed_precision fp16"]),
    "8-bit Adam of another optimizer": ({"--optimizer": "adagrad", "--use_8bit_adam": True}, ["--optimizer"]),
    "quantising twice": (
        {"--quantization": "nf4", "--bnb_quantization_config_path": "a file"},
        ["--bnb_quantization_config_path", "--quantization"],
    ),
    "a quantisation that is no JSON": (
        {"--bnb_quantization_config_path": "a file"},
        ["--bnb_quantization_config_path"],
    ),
    "prior preservation of a blank": (
        {"--with_prior_preservation": True, "--class_prompt": "a dog", "--class_data_dir": ""},
        ["--class_data_dir"],
    ),
    "text encoders that cannot train": ({"--train_text_encoder": "yes"}, ["unrecognized"]),
}


# Resuming


def checkpoint(change: Callable[[Path], Any]) -> Make:
    """A copy of the checkpoint of a finished run, changed."""

    def build(folder: Path) -> Path:
        shutil.copytree("finished/out/checkpoint-1", folder, dirs_exist_ok=True)
        change(folder)
        return folder

    return build


def state(**values: Any) -> Make:
    def change(folder: Path) -> None:
        path = folder / "training_state.json"
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return checkpoint(change)


def damaged(name: str, content: bytes | None = None) -> Make:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1] if content is None else content)

    return checkpoint(change)


RESUME, LORA = "--resume_from_checkpoint", "pytorch_lora_weights.safetensors"
_DONE = {RESUME: "finished/out/checkpoint-1", "--max_train_steps": "2"}

RESUME_CASES: dict[str, Case] = {
    "another rank": ({**_DONE, "--rank": "8"}, [RESUME, "--rank 4 (now 8)"]),
    "other layers": ({**_DONE, "--lora_layers": "attn.to_q"}, [RESUME, "other LoRA layers"]),
    "fewer blocks with LoRA": ({**_DONE, "--lora_blocks": "2"}, [RESUME, "other LoRA layers"]),
    "fewer skipped blocks": ({**_DONE, "--skip_blocks": "1,0"}, [RESUME, "--skip_blocks 1,1 (now 1,0)"]),
    "nothing skipped": ({**_DONE, "--skip_blocks": "none"}, [RESUME, "--skip_blocks 1,1 (now 0,0)"]),
    "another pair with the same layers": (
        {**_DONE, RESUME: state(made_with={"skip": [0, 1]})},
        [RESUME, "--skip_blocks 0,1 (now 1,1)"],
    ),
    "other weights": ({**_DONE, RESUME: state(made_with={"base_weights": "0"})}, [RESUME, "other weights"]),
    "a text encoder": ({**_DONE, "--train_text_encoder": True}, [RESUME, "without --train_text_encoder"]),
    "another prompt": ({**_DONE, "--instance_prompt": "a cat"}, [RESUME, "dog' (now 'a cat')"]),
    "another alpha": ({**_DONE, "--lora_alpha": "64"}, [RESUME, "--lora_alpha 4 (now 64)"]),
    "fewer steps": (
        {**_DONE, RESUME: state(step=3), "--no-refresh_residuals": True},
        [RESUME, "3 steps done", "--max_train_steps 2", "earlier checkpoint"],
    ),
    "another model": (
        {**_DONE, MODEL: model(lambda folder: _noise(folder / "transformer" / f"{TRANSFORMER}.safetensors"))},
        [RESUME, "other weights"],
    ),
    **{f"{name} cut short": ({**_DONE, RESUME: damaged(name)}, [RESUME]) for name in (LORA, "optimizer.safetensors")},
    **{
        f"an empty {name}": ({**_DONE, RESUME: damaged(name, b"")}, [RESUME])
        for name in (LORA, "optimizer.safetensors", "training_state.json")
    },
    "a state that is a list": ({**_DONE, RESUME: damaged("training_state.json", b"[]")}, [RESUME, "schema"]),
    "a state in Latin-1": ({**_DONE, RESUME: damaged("training_state.json", b'"\xfc"')}, [RESUME]),
    "a state of tomorrow": ({**_DONE, RESUME: state(schema=9)}, [RESUME, "schema"]),
    "a state without a seed": ({**_DONE, RESUME: state(seed=...)}, [RESUME, "seed"]),
    "a step in words": ({**_DONE, RESUME: state(step="one")}, [RESUME, "step"]),
    "a checkpoint without LoRA": ({**_DONE, RESUME: checkpoint(lambda folder: (folder / LORA).unlink())}, [RESUME]),
    "a folder of photos": ({**_DONE, RESUME: "photos"}, [f"{RESUME} photos", "complete"]),
}


def _noise(path: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


# All of them

TRAIN_CASES = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("photos", PHOTO_CASES),
        ("dataset", DATASET_CASES),
        ("model", MODEL_CASES),
        ("flags", FLAG_CASES),
        ("resume", RESUME_CASES),
    )
    for name, case in cases.items()
}
