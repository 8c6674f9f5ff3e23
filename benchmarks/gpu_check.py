#!/usr/bin/env python
"""What a GPU says to the plans: the training script in every kind of setting, measured against what was planned.

Needs no network and no checkpoint: models have random weights, made on the spot in a scratch folder. Each setting runs
in a process of its own; its plan is compared with the peak of live bytes that torch counts on the device. A plan is
off if it misses by more than 10 % and by more than 64 MiB, which libraries take for workspaces that no plan knows.

Prints a table; `--json` writes the figures. The exit code is 1 if a run fails or a plan is off.

Example:
    python benchmarks/gpu_check.py --json gpu_check.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from common import (
    PROMPT,
    REPOSITORY,
    SCRIPT,
    FluxSize,
    benchmark_parser,
    save_photos,
    save_random_flux,
    write_figures,
)
from full_size import scratch_folder

from blockskip_hooks.utils.formatting import format_bytes
from blockskip_hooks.utils.machine import describe_machine


TOLERANCE = 0.1
WORKSPACES = 64 * 2**20
MIB, GIB = 2**20, 2**30
# The weights of FLUX.1-dev on disk, one process that plans and reads them, and half of them on the device.
FULL_DISK, FULL_MEMORY, FULL_DEVICE = 26 * GIB, 16 * GIB, 12 * GIB
NEEDS = {"nf4": "bitsandbytes", "int8": "torchao", "--use_8bit_adam": "bitsandbytes"}
NO_IMAGES = ("--skip_final_inference",)


@dataclass(frozen=True)
class Setting:
    """One run of the training script.

    Attributes:
        name: Name in the table.
        model: Which model it runs on.
        flags: Its flags besides those of all.
    """

    name: str
    model: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A model to run on.

    Attributes:
        folder: Its folder; ``None`` for the embedded one.
        resolution: Side of its images in pixels; the embedded one has its own.
        skip: Value of ``--skip_blocks`` for half of its blocks.
        steps: Optimiser steps of a run.
    """

    folder: Path | None
    resolution: int
    skip: str
    steps: int


def settings(models: Mapping[str, Model], quick: bool) -> list[Setting]:
    """The runs in order; ``quick`` leaves out what takes longest."""
    chosen = [Setting("float32", "embedded", ("--skip_blocks", models["embedded"].skip, *NO_IMAGES))]
    bf16, checkpointing = ("--mixed_precision", "bf16"), "--gradient_checkpointing"
    half = ("--skip_blocks", models["flux"].skip, *bf16)
    further: dict[str, tuple[str, ...]] = {
        "plain LoRA": ("--skip_blocks", "none", *bf16, *NO_IMAGES),
        "plain LoRA, checkpointing": ("--skip_blocks", "none", *bf16, checkpointing, *NO_IMAGES),
        "50 %": (*half, *NO_IMAGES),
        "50 %, checkpointing": (*half, checkpointing, *NO_IMAGES),
        "50 %, online": (*half, "--residuals", "online", *NO_IMAGES),
        "50 %, nf4": (*half, "--quantization", "nf4", *NO_IMAGES),
        "50 %, int8": (*half, "--quantization", "int8", *NO_IMAGES),
        "50 %, 8-bit Adam": (*half, "--use_8bit_adam", *NO_IMAGES),
        "50 %, text encoder": (*half, "--train_text_encoder", *NO_IMAGES),
        "50 %, prior preservation": (
            *half,
            *("--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", "2"),
            *NO_IMAGES,
        ),
        "50 %, images": (*half, "--validation_prompt", PROMPT, "--num_validation_images", "2"),
    }
    left_out = {"50 %, online", "50 %, text encoder", "50 %, prior preservation"} if quick else set()
    chosen += [Setting(name, "flux", flags) for name, flags in further.items() if name not in left_out]
    if "full" in models:
        full = (*bf16, "--skip_blocks", models["full"].skip, *NO_IMAGES)
        chosen += [Setting("50 %", "full", full), Setting("50 %, nf4", "full", (*full, "--quantization", "nf4"))]
    missing = [flag for flag, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    if missing:
        print(f"Left out, because packages are not installed: {', '.join(missing)}.", flush=True)
    return [setting for setting in chosen if not set(missing) & set(setting.flags)]


def make_models(folder: Path, args: argparse.Namespace) -> dict[str, Model]:
    """The models to run on, as far as they fit this machine, and their photos."""
    side = 64 if args.smoke else 512
    save_photos(folder / "photos", 2, side)
    models = {"embedded": Model(None, 128, "3,6", args.steps)}
    size = FluxSize(2, 3, heads=1) if args.smoke else FluxSize(heads=16)
    save_random_flux(folder / "flux", size, torch.bfloat16)
    # Two denoising steps: an image's cost is a forward, which precompute measures as well.
    images = {"height": side, "width": side, "num_inference_steps": 2}
    (folder / "flux" / "blockskip_defaults.json").write_text(json.dumps({"schema": 1, "pipeline_kwargs": images}))
    models["flux"] = Model(folder / "flux", side, "2,1" if args.smoke else "19,9", args.steps)
    if args.quick or args.smoke:
        return models
    reasons = {
        f"{format_bytes(FULL_DISK)} of disk": shutil.disk_usage(folder).free >= FULL_DISK,
        f"{format_bytes(FULL_MEMORY)} of host memory": psutil.virtual_memory().total >= FULL_MEMORY,
        f"{format_bytes(FULL_DEVICE)} on the device": torch.accelerator.get_memory_info()[1] >= FULL_DEVICE,
    }
    if lacking := [reason for reason, there in reasons.items() if not there]:
        print(f"FLUX.1-dev's size is left out: it needs {' and '.join(lacking)}.", flush=True)
        return models
    import full_size_flux

    wanted = argparse.Namespace(double_blocks=19, single_blocks=38, skip_blocks="19,9", text_layers=2, smoke=False)
    full_size_flux.flux_checkpoint(wanted).save(folder / "full")
    return {**models, "full": Model(folder / "full", 512, "19,9", args.steps)}


def command_of(setting: Setting, models: Mapping[str, Model], folder: Path, output: Path, runner: str) -> list[str]:
    """The command of a setting."""
    model = models[setting.model]
    flags: dict[str, Any] = {"--output_dir": output, "--max_train_steps": model.steps}
    flags |= {"--train_batch_size": 1, "--rank": 16, "--lr_warmup_steps": 0, "--seed": 0, "--report_to": "none"}
    if model.folder is not None:
        flags |= {"--pretrained_model_name_or_path": model.folder, "--instance_prompt": PROMPT}
        flags |= {"--instance_data_dir": folder / "photos", "--resolution": model.resolution}
    given = [str(part) for pair in flags.items() for part in pair]
    return [sys.executable, *(["-m", runner] if runner else []), str(REPOSITORY / SCRIPT), *given, *setting.flags]


def run(command: Sequence[str], output: Path) -> dict[str, Any]:
    """Run a command; what went wrong, its seconds, and its report."""
    started = time.perf_counter()
    paths = [str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    report = output / "run_report.json"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return {
        "exit_code": done.returncode,
        "fault": None if done.returncode == 0 else next((ln for ln in lines if "error" in ln.lower()), lines[-1]),
        "seconds": time.perf_counter() - started,
        "report": json.loads(report.read_text()) if done.returncode == 0 and report.is_file() else None,
    }


def compare(report: Mapping[str, Any], plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Planned and measured bytes of each stage that was planned and measured.

    What an allocator reserves is compared where it is CUDA's: plans replay that one.
    """
    planned = {stage["name"]: stage for stage in plan["stages"]}
    stages = []
    for measured in report["stages"]:
        stage, live, reserved = planned.get(measured["name"]), measured["peak_device_bytes"], None
        if stage is None or live is None:
            continue
        if report["machine"]["device"] == "cuda":
            reserved = stage.get("peak_reserved_bytes")
        pairs = {"live": (stage["peak_device_bytes"], live)}
        pairs |= {"reserved": (reserved, measured["peak_device_reserved_bytes"])} if reserved else {}
        stages.append(
            {
                "name": measured["name"],
                "planned_bytes": stage["peak_device_bytes"],
                "live_bytes": live,
                "planned_reserved_bytes": reserved,
                "reserved_bytes": measured["peak_device_reserved_bytes"],
                "errors": {name: plan / real - 1 for name, (plan, real) in pairs.items()},
                "off": [name for name, (plan, real) in pairs.items() if is_off(plan, real)],
                "seconds": measured["seconds"],
            }
        )
    return stages


def is_off(planned: int, measured: int) -> bool:
    """Whether a plan misses by more than a tenth, and by more than what libraries take for themselves."""
    return abs(planned - measured) > max(TOLERANCE * measured, WORKSPACES)


def measure(setting: Setting, models: Mapping[str, Model], folder: Path, runner: str) -> dict[str, Any]:
    """The figures of one setting."""
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    ran = run(command_of(setting, models, folder, output, runner), output)
    report = ran.pop("report")
    figures: dict[str, Any] = {"model": setting.model, "setting": setting.name, "flags": list(setting.flags), **ran}
    if report is None:
        return {**figures, "stages": []}
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    records = (report["residuals"] or {}).get("records")
    return {
        **figures,
        "stages": compare(report, json.loads((output / "plan.json").read_text())),
        "step_seconds_median": report["train"]["step_seconds_median"],
        "record_seconds": seconds["precompute"] / records if records and "precompute" in seconds else None,
        "images_seconds": seconds.get("validate"),
        "loss": report["train"]["loss"],
    }


def check_resume(models: Mapping[str, Model], folder: Path, runner: str) -> dict[str, Any]:
    """Whether a run that is stopped half way and goes on has the losses of one that is not, to the last bit."""
    steps = models["embedded"].steps
    flags = ("--skip_blocks", models["embedded"].skip, *NO_IMAGES, "--checkpointing_steps", str(steps // 2))
    output, losses, faults = folder / "resume", [], []
    for more in ((), ("--resume_from_checkpoint", f"checkpoint-{steps // 2}")):
        ran = run(command_of(Setting("resume", "embedded", (*flags, *more)), models, folder, output, runner), output)
        faults += [ran["fault"]] if ran["fault"] else []
        losses.append(ran["report"]["train"]["loss"] if ran["report"] else None)
    return {"same_bits": None if faults else losses[0] == losses[1], "losses": losses, "faults": faults}


def print_setting(result: Mapping[str, Any]) -> None:
    """A line for each stage of a setting."""
    name = f"{result['model']}: {result['setting']}"
    if result["fault"]:
        print(f"{name:34}FAILED: {result['fault']}", flush=True)
    elif not result["stages"]:
        print(f"{name:34}ran; there is no device to measure", flush=True)
    for stage in result["stages"]:
        each = {"train": result["step_seconds_median"], "precompute": result["record_seconds"]}
        seconds = each.get(stage["name"]) or stage["seconds"]
        columns = ("planned_bytes", "live_bytes", "planned_reserved_bytes", "reserved_bytes")
        sizes = "".join(f"{stage[column] / MIB:10.1f}" if stage[column] else f"{'':10}" for column in columns)
        errors = " ".join(f"{name} {error:+.1%}" for name, error in stage["errors"].items())
        off = f"  OFF: {', '.join(stage['off'])}" if stage["off"] else ""
        print(f"{name:34}{stage['name']:13}{sizes}{seconds:10.3f}  {errors}{off}", flush=True)
        name = ""


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 if a run fails or a plan is off, 2 without an accelerator."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="Leave out the full size and some settings.")
    parser.add_argument("--smoke", action="store_true", help="Tiny models, also without an accelerator: does it run?")
    parser.add_argument("--only", nargs="+", help="Names of settings, as the table has them; default: all.")
    parser.add_argument("--steps", type=int, help="Optimiser steps of a run; default: 10, or 2 with --smoke.")
    parser.add_argument("--scratch", type=Path, help="Where to make the scratch folder; default: the system's.")
    parser.add_argument("--runner", default="", help="Module that runs the script, in place of Python itself.")
    parser.set_defaults(keep=False, reuse=None)
    args = parser.parse_args(argv)
    args.steps = args.steps or (2 if args.smoke else 10)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type == "cpu" and not args.smoke:
        print("error: torch finds no accelerator here; --smoke runs on a CPU too, with tiny models.", file=sys.stderr)
        return 2
    started, results = time.perf_counter(), []
    with scratch_folder(args) as folder:
        models = make_models(folder, args)
        print(
            f"{'MiB':34}{'stage':13}{'planned':>10}{'live':>10}{'planned':>10}{'reserved':>10}{'seconds':>10}  plan\n"
            "seconds: median of a step, mean of a record, otherwise of the whole stage"
        )
        for setting in settings(models, args.quick or args.smoke):
            if args.only and setting.name not in args.only:
                continue
            results.append(measure(setting, models, folder, args.runner))
            print_setting(results[-1])
        resume = check_resume(models, folder, args.runner)
    said = {True: "the same bits", False: "other last bits", None: f"FAILED: {resume['faults'][:1]}"}
    print(f"resumed run: {said[resume['same_bits']]}; {time.perf_counter() - started:.0f} s in all")
    write_figures(
        args.json,
        "gpu_check",
        device=describe_machine(device),
        settings={"quick": args.quick, "smoke": args.smoke, "steps": args.steps},
        results=results,
        resume=resume,
    )
    off = any(stage["off"] for result in results for stage in result["stages"])
    return 1 if off or resume["faults"] or any(result["fault"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
