"""PEFT's board of methods on image generation: its settings, its photos' parts, and a run of ours in its form.

The board is ``method_comparison/image-gen`` of github.com/huggingface/peft. Settings and keys are those of an entry
that it published, ``results/shadow--flux2-klein-explicit.json`` of 2026-09-16; layers and rank are those of its plain
LoRA, ``experiments/lora/flux2-klein-default``. Nothing here needs a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from safetensors import safe_open

from blockskip_hooks.lora import WEIGHTS_NAME


SETTINGS: dict[str, Any] = {
    "model_id": "black-forest-labs/FLUX.2-klein-base-4B",
    "dataset_id": "peft-internal-testing/cat-image-dataset",
    "dataset_split": "train",
    "dtype": "bfloat16",
    "resolution": 512,
    "batch_size": 2,
    "batch_size_eval": 1,
    "repeats": 1000,
    "max_steps": 750,
    "eval_steps": 100,
    "compile": False,
    "use_gc": True,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 0.0001, "weight_decay": 0.0001},
    "lr_scheduler": None,
    "use_amp": False,
    "autocast_adapter_dtype": True,
    # One for each row of the dataset, in its order.
    "instance_prompts": [
        "sks cat sitting on a chair in front of a box of chocolates",
        "sks cat playing on the Steam Deck",
        "sks cat wearing a necklace while sitting in a box on a sofa",
        "a box with four donuts in front of sks cat",
        "sks cat wearing a pink veil with flowers on it and a dagger made out of yellow cardboard",
        "sks cat between two pillows, with one pillow showing a polar bear and the other a fox",
        "sks cat with an espresso reading the newspaper",
        "a close up of a hand petting sks cat on the head",
        "sks cat opens a white door",
        'sks cat with a VIP "all access" pass',
        'sks cat in front of a monitor showing the video game "RimWorld"',
        "sks cat reads a newspaper about cannabis",
        'sks cat reading the newspaper with the title "DIE BOX"',
        "sks cat being fed sushi",
        "sks cat in front of a box of tomatoes",
        "a gingerbread house in front of sks cat",
        "sks cat is wearing a Wednesday Addams costume",
        "sks cat looks skeptical as he reads a magazine depicting a black cat",
        "sks cat wearing a striped scarf",
        "sleepy sks cat lying in bed covered by a blue blanket",
    ],
    "image_column": "image",
    "valid_size": 2,
    "test_size": 4,
    "num_inference_steps": 20,
    "guidance_scale": 3.5,
    "max_sequence_length": 512,
    "text_encoder_out_layers": [10, 20, 30],
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "dino_model_id": "facebook/dinov2-base",
    "dino_image_size": 224,
    "sample_image_prompts": [
        "a photo of sks cat",
        "a color drawing of sks cat",
        "sks cat at the beach",
        "a photo of sks dog",
        "a photo of an orange cat",
    ],
    "drift_image_prompts": [
        "a photo of cat",
        "a color drawing of cat",
        "cat sitting in a bathtub",
        "cat looks into a mirror",
        "a photo of cat next to a tree",
        "the Mona Lisa but she looks angry",
        "a dog holding a sign that says hello world",
        "a photo of the Eiffel tower at night",
        "an astronaut riding a horse",
        "3d design concept of a chair that looks like an avocado",
    ],
}
"""The board's ``train_config``."""

LAYERS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "add_k_proj",
    "add_q_proj",
    "add_v_proj",
    "to_add_out",
    "linear_in",
    "linear_out",
    "to_qkv_mlp_proj",
)
RANK = 32
TEST_REPEATS = 3
EVALUATION_SEED, DRIFT_SEED = 100_000, 100_000_000
"""They are added to the run's seed."""

_NEEDED = ("created_at", "lora", "settings", "machine")
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}
"""What the board calls dtype, as values of ``--mixed_precision``."""

_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "dtype": tuple(PRECISIONS),
    "compile": (False,),
    "dataset_split": ("train",),
    "lr_scheduler": (None, "cosine"),
}
_WARMUP = 0.1
"""Part of the steps over which the board's cosine schedule warms up."""


def read_settings(file: Path | None) -> dict[str, Any]:
    """The board's settings, overruled by a file of the board's kind: its ``training_params.json``.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if file is None:
        return dict(SETTINGS)
    try:
        changes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--training_params {file} cannot be read as JSON; correct the name or the file.") from error
    if not isinstance(changes, dict):
        raise ValueError(f"--training_params {file} is no JSON object; give names and values as in the board's files.")
    if unknown := sorted(set(changes) - set(SETTINGS)):
        raise ValueError(f"--training_params {file} has {unknown[0]}, which the board does not know; remove it.")
    settings = SETTINGS | changes
    settings["optimizer_kwargs"] = SETTINGS["optimizer_kwargs"] | dict(settings["optimizer_kwargs"])
    for name, usual in SETTINGS.items():
        kinds = (int, float) if isinstance(usual, float) else type(usual)
        if usual is not None and not isinstance(settings[name], kinds):
            raise ValueError(f"--training_params {file}: {name} is {settings[name]!r}; the board has {usual!r}.")
    for name, possible in _POSSIBLE.items():
        if settings[name] not in possible:
            choices = " or ".join(map(str, possible))
            raise ValueError(f"--training_params {file}: {name} is {settings[name]}; the script only does {choices}.")
    return settings


def split_rows(count: int, settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """Rows of the dataset that are for training, validation and the test, as the board divides them.

    Raises:
        ValueError: if the rows are not those that the settings are for.
    """
    prompts, valid, test = len(settings["instance_prompts"]), settings["valid_size"], settings["test_size"]
    if count != prompts:
        raise ValueError(f"instance_prompts holds {prompts} prompts for {count} photos; give one for each photo.")
    if min(valid, test) < 1 or count <= valid + test:
        raise ValueError(f"valid_size {valid} and test_size {test} must be 1 or more and leave some of {count} rows.")
    order = np.random.RandomState(0).permutation(count).tolist()
    train = count - valid - test
    return {"train": order[:train], "valid": order[train : train + valid], "test": order[train + valid :]}


def training_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as flags of the training script; ``True`` for those without a value."""
    optimizer = settings["optimizer_kwargs"]
    flags: dict[str, Any] = {
        "--pretrained_model_name_or_path": settings["model_id"],
        "--mixed_precision": PRECISIONS[settings["dtype"]],
        "--resolution": settings["resolution"],
        "--image_interpolation_mode": "bilinear",
        "--cache_latents": True,
        "--train_batch_size": settings["batch_size"],
        "--max_train_steps": settings["max_steps"],
        "--checkpointing_steps": settings["eval_steps"],
        "--seed": settings["seed"],
        "--max_grad_norm": settings["grad_norm_clip"],
        "--optimizer": settings["optimizer_type"],
        "--learning_rate": optimizer["lr"],
        "--adam_weight_decay": optimizer["weight_decay"],
        "--lr_scheduler": settings["lr_scheduler"] or "constant",
        "--lr_warmup_steps": int(_WARMUP * settings["max_steps"]) if settings["lr_scheduler"] else 0,
        "--max_sequence_length": settings["max_sequence_length"],
        "--text_encoder_out_layers": settings["text_encoder_out_layers"],
        "--weighting_scheme": settings["weighting_scheme"],
        "--logit_mean": settings["logit_mean"],
        "--logit_std": settings["logit_std"],
        "--mode_scale": settings["mode_scale"],
        "--lora_layers": ",".join(LAYERS),
        "--rank": RANK,
        "--lora_alpha": RANK,
        # The board keeps the LoRA in float32.
        "--upcast_before_saving": True,
        "--num_validation_images": 0,
        "--report_to": "none",
    }
    return flags | {"--gradient_checkpointing": True} if settings["use_gc"] else flags


def check_report(report: Mapping[str, Any], where: Path) -> None:
    """Check that a ``run_report.json`` says what an entry needs.

    Raises:
        ValueError: naming the file.
    """
    if missing := [name for name in _NEEDED if name not in report]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: it is of an older version; train again.")


def adapter_config(folder: Path) -> dict[str, Any]:
    """The LoRA's config as peft has it, from the metadata of a run's weights."""
    with safe_open(str(folder / WEIGHTS_NAME), framework="pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    return {
        name.removeprefix("transformer."): value
        for name, value in described.items()
        if name.startswith("transformer.")
    }


def used_settings(settings: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """The board's ``train_config``, with the values that the run had: flags may have changed some."""
    flags, train = report["settings"], report["train"]
    samples = train["samples"] // train["steps"]
    return {
        **settings,
        "model_id": report["model"],
        "dtype": train["dtype"],
        "resolution": flags["resolution"],
        "batch_size": samples,
        # The photos are gone through again and again, whatever their number.
        "repeats": flags["repeats"],
        "max_steps": train["steps"],
        "eval_steps": flags["checkpointing_steps"],
        "use_gc": flags["gradient_checkpointing"],
        "seed": flags["seed"],
        "grad_norm_clip": flags["max_grad_norm"],
        "optimizer_type": flags["optimizer"],
        "optimizer_kwargs": {
            "lr": flags["learning_rate"] * (samples if flags["scale_lr"] else 1),
            "weight_decay": flags["adam_weight_decay"],
        },
        "lr_scheduler": None if flags["lr_scheduler"] == "constant" else flags["lr_scheduler"],
        # The script trains half precision under autocast.
        "use_amp": train["dtype"] != "float32",
        "max_sequence_length": flags["max_sequence_length"],
        "text_encoder_out_layers": flags["text_encoder_out_layers"],
        **{name: flags[name] for name in ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")},
    }


def make_entry(
    report: Mapping[str, Any],
    results: Mapping[str, Any],
    peft_config: Mapping[str, Any],
    *,
    name: str | None = None,
    model_info: Mapping[str, Any] | None = None,
    dataset_info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An entry of the board: what was measured in its form, and ``None`` for what was not.

    Args:
        report: A run's ``run_report.json``.
        results: Its evaluation's ``results.json``.
        peft_config: From :func:`adapter_config`.
        name: ``method/experiment``; by default it names the spans.
        model_info: Commit and date of the model on the hub, if known.
        dataset_info: Those of the dataset.
    """
    train, machine, versions, skip = report["train"], report["machine"], report["versions"], report["skip"]
    settings = used_settings(results["settings"], report)
    sources, unknown = machine["sources"], {"sha": None, "created_at": None}
    stages = {stage["name"]: stage for stage in report["stages"]}
    # A resumed run only knows the steps since.
    whole = len(train["step_seconds"]) == train["steps"]
    evaluated = results["test"]["seconds"] + results["drift"]["seconds"]
    trained = sum(stages[stage]["seconds"] for stage in ("encode", "precompute", "train") if stage in stages)
    total = sum(stage["seconds"] for stage in report["stages"]) + results["seconds"]
    held = (train["step_memory"] or {}).get("reserved_bytes")
    peaks = [stages[stage]["peak_device_reserved_bytes"] for stage in ("precompute", "train") if stage in stages]
    packages = {}
    for library in ("transformers", "peft", "datasets", "diffusers", "torch"):
        packages[f"{library}-version"] = machine["datasets"] if library == "datasets" else versions[library]
        packages[f"{library}-commit-hash"] = (sources[library] or {}).get("commit")
    return {
        "run_info": {
            "created_at": report["created_at"],
            "total_time": total if whole else None,
            "experiment_name": name or f"blockskip/flux2-klein-skip-{skip['leading']}-{skip['trailing']}",
            "peft_branch": (sources["peft"] or {}).get("branch"),
            "peft_worktree_is_dirty": None,
            "train_config": settings,
            "peft_config": dict(peft_config),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(mean(held)) if held else None,
            "accelerator_memory_max": None if None in peaks else max(peaks),
            "accelerator_memory_reserved_99th": int(np.percentile(held, 99)) if held else None,
            "train_time": trained + evaluated if whole else None,
            "file_size": report["lora"]["file_bytes"],
            "num_trainable_params": report["lora"]["trainable_parameters"],
            "num_total_params": report["lora"]["total_parameters"],
            "status": "success",
            "metrics": _metrics(train, results, settings),
        },
        "meta_info": {
            "model_info": dict(model_info or unknown),
            "dataset_info": dict(dataset_info or unknown),
            "package_info": packages,
            "system_info": {**machine["system"], "accelerator": machine["device_name"]},
            "pytorch_info": machine["pytorch"],
        },
    }


def _metrics(
    train: Mapping[str, Any], results: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[dict[str, float | None]]:
    """One line for each checkpoint that was evaluated, and the last one for the test."""
    steps, losses, interval = train["steps"], train["loss"], settings["eval_steps"]
    memory = train["step_memory"] or {}

    def latest(values: Sequence[float] | None, step: int) -> Sequence[float] | None:
        """Those of the last steps before ``step``, if they are known: values end at the run's last step."""
        first = step - interval - (steps - len(values or ()))
        return values[first : first + interval] if values and first >= 0 else None

    def average(values: Sequence[float] | None) -> float | None:
        return mean(values) if values else None

    metrics: list[dict[str, float | None]] = []
    for line in results["valid"]:
        step = line["step"]
        seconds = latest(train["step_seconds"], step)
        metrics.append(
            {
                "step": step,
                "valid dino_similarity": line["similarity"],
                "train loss": average(latest(losses, step)),
                "train samples": step * settings["batch_size"],
                "train time": sum(seconds) if seconds else None,
                "eval time": line["seconds"],
                "mem allocated avg": average(latest(memory.get("allocated_bytes"), step)),
                "mem reserved avg": average(latest(memory.get("reserved_bytes"), step)),
                # Checkpoints are evaluated after training, so there is no such moment.
                "elapsed time": None,
            }
        )
    metrics.append(
        {
            "step": steps,
            "test dino_similarity": results["test"]["similarity"],
            "drift": results["drift"]["drift"],
            "train loss": average(losses[-interval:]),
            "train samples": train["samples"],
        }
    )
    return metrics


__all__ = [
    "DRIFT_SEED",
    "EVALUATION_SEED",
    "PRECISIONS",
    "SETTINGS",
    "TEST_REPEATS",
    "adapter_config",
    "check_report",
    "make_entry",
    "read_settings",
    "split_rows",
    "training_flags",
    "used_settings",
]
