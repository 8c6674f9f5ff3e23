"""Runs at the size of released checkpoints: random weights on disk, the training script in a process of its own.

Only the values of the weights are made up. Classes, configs, shapes, number format and shards are those of a released
checkpoint, so memory, disk traffic and arithmetic are as well. Tokenizers spell by letters; prompts are padded to the
same length in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from common import PROMPT, REPOSITORY, SCRIPT, print_targets, save_photos, target, tree_rss, write_figures
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME as DIFFUSERS_INDEX
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as TRANSFORMERS_INDEX

from blockskip_hooks.blocks import list_blocks, split_blocks
from blockskip_hooks.config import BlockSkipConfig
from blockskip_hooks.loading.component_config import load_config
from blockskip_hooks.loading.lora_files import WEIGHTS_NAME
from blockskip_hooks.utils.formatting import format_bytes, format_seconds


DTYPE = torch.bfloat16
GIB = 2**30
SHARD_BYTES = 2 * 10**9
# Records, LoRA and reports, and what a file system does not give away.
DISK_MARGIN = 2 * 10**9
SPREAD = 0.02 * 3**0.5  # of a uniform distribution with standard deviation 0.02
INTERVAL = 0.2
NUM_PHOTOS = 3


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline to be written, as models without storage.

    Attributes:
        name: Name in the figures.
        pipeline_class: Class of the pipeline.
        transformer: The transformer.
        vae: The VAE.
        text_encoders: Text encoders by component.
        scheduler: The scheduler.
        save_tokenizers: Writes the tokenizers' folders and returns their classes' names by component.
        skip_blocks: The run's ``--skip_blocks``.
        resolution: The run's ``--resolution``.
        limit: Most resident bytes that the run may take, if there is a target.
        in_turn_limit: What precompute may take of its time with blocks read in turn, if there is a target.
    """

    name: str
    pipeline_class: type[DiffusionPipeline]
    transformer: ModelMixin
    vae: ModelMixin
    text_encoders: Mapping[str, PreTrainedModel]
    scheduler: SchedulerMixin
    save_tokenizers: Callable[[Path], dict[str, str]]
    skip_blocks: str
    resolution: int
    limit: int | None
    in_turn_limit: float | None = None

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        return {"transformer": self.transformer, "vae": self.vae, **self.text_encoders}

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(model) for model in self.models.values())

    def save(self, folder: Path) -> None:
        """Write the pipeline; no more than one shard of it is ever in memory."""
        classes: dict[str, Any] = {"_class_name": self.pipeline_class.__name__}
        classes["_diffusers_version"] = diffusers.__version__
        for name, model in {"transformer": self.transformer, **self.text_encoders}.items():
            print(f"writing {name}: {format_bytes(num_bytes(model))}", flush=True)
            save_random_weights(model, folder / name)
            classes[name] = ["diffusers" if isinstance(model, ModelMixin) else "transformers", type(model).__name__]
        # The VAE is small, and the initialisation of its class keeps latents in range.
        torch.manual_seed(0)
        vae = type(self.vae).from_config(self.vae.config)
        torch.nn.Module.to(vae, DTYPE).save_pretrained(folder / "vae")
        self.scheduler.save_pretrained(folder / "scheduler")
        classes["vae"] = ["diffusers", type(self.vae).__name__]
        classes["scheduler"] = ["diffusers", type(self.scheduler).__name__]
        for name, class_name in self.save_tokenizers(folder).items():
            classes[name] = ["transformers", class_name]
        # Last, so that a folder with it is complete.
        (folder / "model_index.json").write_text(json.dumps(classes, indent=2) + "\n")

    def is_at(self, folder: Path) -> bool:
        """Whether ``folder`` holds this pipeline: its transformer's config, and as many bytes of every large model."""
        if not (folder / "model_index.json").is_file():
            return False
        stored, wanted = load_config(folder / "transformer"), json.loads(self.transformer.to_json_string())
        sizes = {name: num_bytes(model) for name, model in self.models.items() if name != "vae"}
        return all(stored.get(name) == value for name, value in wanted.items()) and all(
            json.loads(next((folder / name).glob("*.index.json")).read_text())["metadata"]["total_size"] == size
            for name, size in sizes.items()
        )


def load_configs(preset: str) -> dict[str, Any]:
    """Configs of a released model's components, from the presets of the library."""
    return json.loads(resources.files("blockskip_hooks.planning.presets").joinpath(f"{preset}.json").read_text())


def empty_model(model_class: type, config: Mapping[str, Any]) -> Any:
    """A model of diffusers or transformers without storage."""
    with torch.device("meta"):
        if issubclass(model_class, ModelMixin):
            return model_class.from_config(dict(config))
        return model_class(model_class.config_class.from_dict(dict(config)))


def num_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters on disk."""
    return sum(parameter.numel() for parameter in model.parameters()) * DTYPE.itemsize


def save_random_weights(model: Any, folder: Path) -> None:
    """Write config and weights of a model without storage, shard by shard: norms' scales are 1, the rest is random."""
    folder.mkdir(parents=True)
    if isinstance(model, ModelMixin):
        model.save_config(folder)
        index_name = DIFFUSERS_INDEX
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        index_name = TRANSFORMERS_INDEX
    stem = index_name.removesuffix(".safetensors.index.json")
    shards = _shards(model)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in names.items():
            tensors[name] = torch.empty(shape, dtype=DTYPE)
            if len(shape) == 1 and name.endswith("weight"):
                tensors[name].fill_(1)
            else:
                tensors[name].uniform_(-SPREAD, SPREAD, generator=generator)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    index = {"metadata": {"total_size": num_bytes(model)}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(index, indent=2) + "\n")


def _shards(model: torch.nn.Module) -> list[dict[str, torch.Size]]:
    """Names and shapes of the parameters, tied ones once, in shards of at most :data:`SHARD_BYTES` where possible."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        tensor_bytes = parameter.numel() * DTYPE.itemsize
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.shape
        size += tensor_bytes
    return shards


@dataclass
class Cost:
    """What the script's process took.

    Attributes:
        exit_code: Its exit code.
        seconds: From start to end.
        peak_rss_bytes: Most resident bytes of it and its children, read every :data:`INTERVAL` seconds, or the
            kernel's own peak of the process if that is higher.
        peak_private_bytes: The same without pages of files, which the kernel may drop and read again.
    """

    exit_code: int
    seconds: float
    peak_rss_bytes: int
    peak_private_bytes: int


def run_script(command: Sequence[str]) -> Cost:
    """Run a script in a fresh process and watch its memory."""
    started, peak, private = time.perf_counter(), 0, 0
    child = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY)
    process = psutil.Process(child.pid)
    try:
        while True:
            # Not Popen.poll, which would throw the kernel's figures away.
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                break
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, tree_rss(process))
                memory = process.memory_info()
                private = max(private, memory.rss - getattr(memory, "shared", 0))
            time.sleep(INTERVAL)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
    kernel_peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(child.returncode, time.perf_counter() - started, max(peak, kernel_peak), private)


def make_records_in_turn(figures: str, script: str, *flags: str) -> None:
    """Run the training script in this process until records are there, each skipped block read when it runs.

    Nothing is read ahead, and every forward reads all blocks: forwards do not go in step.

    Args:
        figures: JSON file that the stages are written to.
        script: The training script.
        *flags: Its flags.
    """
    from blockskip_hooks.loading.streaming import Streamer
    from blockskip_hooks.utils.monitor import StageMonitor

    plain_init, plain_stage = Streamer.__init__, StageMonitor.stage

    def without_thread(self: Streamer, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **{**kwargs, "reads_ahead": False})

    def one_by_one(self: Streamer, tasks: Sequence[Callable[[], Any]], *_: Any) -> list[Any]:
        return [task() for task in tasks]

    def until_training(self: StageMonitor, name: str) -> contextlib.AbstractContextManager[None]:
        if name == "train":
            Path(figures).write_text(json.dumps(self.as_list()))
            raise SystemExit(0)
        return plain_stage(self, name)

    Streamer.__init__, Streamer.together = without_thread, one_by_one  # type: ignore[method-assign, assignment]
    StageMonitor.stage = until_training  # type: ignore[method-assign, assignment]
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def forget_files(folder: Path) -> None:
    """Let the kernel drop what it holds of a folder's files, so that every run reads them from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_lora(folder: Path, checkpoint: Checkpoint, leading: int, trailing: int) -> list[str]:
    """What is wrong with an exported LoRA: it must name kept blocks only, have learnt, and fit the whole model."""
    state = load_file(folder / WEIGHTS_NAME)
    model = checkpoint.transformer
    spans = split_blocks(list_blocks(model), BlockSkipConfig(leading=leading, trailing=trailing))
    kept = tuple(f"transformer.{block.name}." for block in spans.kept)
    faults = []
    if not state or not all(name.startswith(kept) for name in state):
        faults.append("the LoRA has keys outside the kept blocks, or none")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        faults.append("the LoRA is not finite")
    if not all(tensor.any() for tensor in state.values()):
        faults.append("some of the LoRA has not learnt anything")
    # The model has no storage, so neither has what the stock loader adds to it: names and shapes must be the file's.
    model.load_lora_adapter(
        str(folder), weight_name=WEIGHTS_NAME, prefix="transformer", adapter_name="check", low_cpu_mem_usage=True
    )
    loaded = {
        f"transformer.{name.replace('.check.', '.')}": parameter.shape
        for name, parameter in model.named_parameters()
        if ".check." in name
    }
    model.unload_lora()
    if loaded != {name: tensor.shape for name, tensor in state.items()}:
        faults.append("the stock loader gave the model another LoRA than the file's")
    return faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all runs of full size have."""
    parser.add_argument("--scratch", type=Path, help="Where to make the scratch folder; default: the system's.")
    parser.add_argument("--keep", action="store_true", help="Do not remove the scratch folder.")
    parser.add_argument("--reuse", type=Path, help="Scratch folder that an earlier run kept; it is kept again.")
    parser.add_argument("--smoke", action="store_true", help="A tiny model: does the benchmark run?")
    parser.add_argument(
        "--in_turn", action="store_true", help="Make the records once more with blocks read in turn, and compare."
    )


@contextlib.contextmanager
def scratch_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder for checkpoints and photos, removed at the end unless it is to be kept."""
    if args.reuse:
        yield args.reuse.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="full-size-", dir=args.scratch))
    try:
        yield folder
    finally:
        if args.keep:
            print(f"kept for --reuse: {folder}")
        else:
            shutil.rmtree(folder)


def measure(checkpoint: Checkpoint, folder: Path, *, in_turn: bool = False) -> dict[str, Any]:
    """Write the checkpoint where it is not there yet, train on it for four steps and return the figures.

    With ``in_turn`` the records are made again as :func:`make_records_in_turn` does.

    Raises:
        OSError: if the disk is too full.
    """
    model, photos = folder / checkpoint.name / "model", folder / checkpoint.name / "photos"
    started = time.perf_counter()
    if not checkpoint.is_at(model):
        if model.exists():
            raise OSError(f"{model} holds another model; name another folder.")
        free, needed = shutil.disk_usage(folder).free, checkpoint.num_bytes + DISK_MARGIN
        if free < needed:
            raise OSError(
                f"{folder} has {format_bytes(free)} free and {checkpoint.name} needs {format_bytes(needed)}."
            )
        save_photos(photos, NUM_PHOTOS, checkpoint.resolution)
        checkpoint.save(model)
    write_seconds = time.perf_counter() - started

    flags = {
        "--pretrained_model_name_or_path": "MODEL",
        "--instance_data_dir": "PHOTOS",
        "--instance_prompt": PROMPT,
        "--output_dir": "OUTPUT",
        "--resolution": str(checkpoint.resolution),
        "--skip_blocks": checkpoint.skip_blocks,
        "--mixed_precision": "bf16",
        "--train_batch_size": "1",
        "--max_train_steps": "4",
        # A run of 500 steps makes the records of 50 steps together; one of four would make each by itself.
        "--stretch_steps": "4",
        "--rank": "16",
        "--lr_warmup_steps": "0",
        "--seed": "0",
        "--report_to": "none",
    }
    parts = [part for pair in flags.items() for part in pair] + ["--skip_final_inference"]
    with tempfile.TemporaryDirectory(prefix="output-", dir=folder) as output:
        places = {"MODEL": str(model), "PHOTOS": str(photos), "OUTPUT": output}
        forget_files(model)
        cost = run_script([SCRIPT, *(places.get(part, part) for part in parts)])
        report_file = Path(output) / "run_report.json"
        report = json.loads(report_file.read_text()) if report_file.is_file() else {}
        faults = [] if cost.exit_code == 0 else [f"the script ended with {cost.exit_code}"]
        if not faults:
            faults = check_lora(Path(output), checkpoint, report["skip"]["leading"], report["skip"]["trailing"])
    slow = None
    if in_turn and not faults:
        with tempfile.TemporaryDirectory(prefix="in-turn-", dir=folder) as scratch:
            places["OUTPUT"], figures = f"{scratch}/output", Path(scratch) / "stages.json"
            forget_files(model)
            run_script([str(Path(__file__).resolve()), str(figures), SCRIPT, *(places.get(p, p) for p in parts)])
            if figures.is_file():
                slow = next(s["seconds"] for s in json.loads(figures.read_text()) if s["name"] == "precompute")
            else:
                faults.append("the run with blocks read in turn made no records")
    shown = [f'"{part}"' if " " in part else part for part in parts]
    return {
        "name": checkpoint.name,
        "measured_command": " ".join(["python", SCRIPT, *shown]),
        "dtype": str(DTYPE).removeprefix("torch."),
        "components": {
            name: {"class": type(part).__name__, "bytes": num_bytes(part)} for name, part in checkpoint.models.items()
        },
        "write_seconds": write_seconds,
        "exit_code": cost.exit_code,
        "faults": faults,
        "seconds": cost.seconds,
        "peak_rss_bytes": cost.peak_rss_bytes,
        "peak_private_bytes": cost.peak_private_bytes,
        "skip": report.get("skip"),
        "patch": report.get("patch"),
        "stages": report.get("stages"),
        "residuals": report.get("residuals"),
        "steps": report.get("train", {}).get("steps"),
        "step_seconds_median": report.get("train", {}).get("step_seconds_median"),
        "loss": report.get("train", {}).get("loss"),
        "precompute_seconds_in_turn": slow,
    }


def print_result(result: Mapping[str, Any]) -> None:
    """A table of the run's stages, and what is wrong with it."""
    print(f"\n{result['name']:14}{'time':>14}{'peak RSS':>12}")
    for stage in result["stages"] or ():
        print(f"{stage['name']:14}{format_seconds(stage['seconds']):>14}{format_bytes(stage['peak_rss_bytes']):>12}")
    print(f"{'whole process':14}{format_seconds(result['seconds']):>14}{format_bytes(result['peak_rss_bytes']):>12}")
    print(f"without pages of files: {format_bytes(result['peak_private_bytes'])}")
    if result["precompute_seconds_in_turn"] is not None:
        print(f"precompute with blocks read in turn: {format_seconds(result['precompute_seconds_in_turn'])}")
    for fault in result["faults"]:
        print(f"FAULT: {fault}")


def run_benchmark(
    name: str, args: argparse.Namespace, checkpoints: Sequence[Checkpoint], settings: Mapping[str, Any]
) -> int:
    """Measure every checkpoint and print; the exit code is 1 if a run fails or a target is missed, 2 without room."""
    results = []
    try:
        with scratch_folder(args) as folder:
            for checkpoint in checkpoints:
                results.append(measure(checkpoint, folder, in_turn=args.in_turn))
                print_result(results[-1])
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    targets = [
        target(f"{checkpoint.name}: peak resident bytes", result["peak_rss_bytes"], checkpoint.limit)
        for checkpoint, result in zip(checkpoints, results)
        if checkpoint.limit
    ]
    targets += [
        target(f"{checkpoint.name}: precompute of that with blocks read in turn", _of_in_turn(result), limit)
        for checkpoint, result in zip(checkpoints, results)
        if (limit := checkpoint.in_turn_limit) and result["precompute_seconds_in_turn"] is not None
    ]
    print_targets(targets)
    write_figures(args.json, name, settings={**settings, "smoke": args.smoke}, results=results, targets=targets)
    return 0 if all(item["met"] for item in targets) and not any(result["faults"] for result in results) else 1


def _of_in_turn(result: Mapping[str, Any]) -> float:
    seconds = next(stage["seconds"] for stage in result["stages"] if stage["name"] == "precompute")
    return seconds / result["precompute_seconds_in_turn"]


def end_on_termination() -> None:
    """Let a terminated benchmark clean up as an interrupted one does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


if __name__ == "__main__":
    make_records_in_turn(*sys.argv[1:])
