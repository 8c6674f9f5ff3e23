#!/usr/bin/env python
"""An entry for PEFT's board of methods on image generation: FLUX.2-klein-base-4B trained with block skipping.

Trains by the ordinary script on the board's settings, evaluates as the board does (DINOv2 similarity to the photo of
each prompt, drift from the base model), and writes an entry in the board's form. What cannot be measured is null.
Flags that are not listed here go to the training script and overrule the board's settings.

Example:
    python benchmarks/peft_image_gen.py --skip_blocks auto --skip_ratio 0.3 --output_dir klein-cat --output entry.json
    python benchmarks/peft_image_gen.py --from_run klein-cat --output entry.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers.training_utils import free_memory
from huggingface_hub import HfApi
from peft_board import (
    DRIFT_SEED,
    EVALUATION_SEED,
    PRECISIONS,
    TEST_REPEATS,
    adapter_config,
    check_report,
    make_entry,
    read_settings,
    split_rows,
    training_flags,
)
from PIL import Image

from blockskip_hooks.cli.errors import explain, first_line
from blockskip_hooks.data.photos import Photo, load_dataset_photos
from blockskip_hooks.inference.generate import generate_images
from blockskip_hooks.inference.image_encoders import load_image_encoder
from blockskip_hooks.inference.lora_files import lora_file, with_adapter
from blockskip_hooks.inference.streamed_model import encode_for_images, image_settings, load_image_transformer
from blockskip_hooks.lora import WEIGHTS_NAME
from blockskip_hooks.training.checkpoints import list_checkpoints
from blockskip_hooks.utils.digests import file_digest
from blockskip_hooks.utils.files import write_json, write_text


SCRIPT = Path(__file__).parents[1] / "examples" / "dreambooth_blockskip" / "train_dreambooth_blockskip.py"
FOLDER = "board"
"""Part of a run's folder, for the board's photos, images and results."""


def train(settings: Mapping[str, Any], photos: Path, output: Path, extra: Sequence[str]) -> int:
    """Run the training script in this process and return its exit code."""
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    flags = training_flags(settings) | {
        "--skip_blocks": "auto",
        "--instance_data_dir": photos,
        "--instance_prompt": settings["sample_image_prompts"][0],
        "--output_dir": output,
    }
    given = {word.partition("=")[0] for word in extra if word.startswith("--")}
    argv: list[str] = []
    for flag, value in flags.items():
        if flag not in given:
            argv += [flag, *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return script.main([*argv, *extra])


def save_photos(photos: Sequence[Photo], prompts: Sequence[str], folder: Path) -> Path:
    """Write the middle squares of photos, which is what the board trains on, with their prompts as captions."""
    folder.mkdir(parents=True, exist_ok=True)
    # Those of an earlier run with other settings must not be trained on.
    for old in folder.iterdir():
        old.unlink()
    for number, (photo, prompt) in enumerate(zip(photos, prompts, strict=True)):
        image = photo.decode()
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image.crop((left, top, left + side, top + side)).save(folder / f"{number:03d}.png")
        write_text(folder / f"{number:03d}.txt", prompt)
    return folder


def evaluate(run: Path, report: Mapping[str, Any], settings: Mapping[str, Any], photos: Sequence[Photo]) -> dict:
    """Evaluate a run as the board does: the contents of its ``results.json``.

    Args:
        run: The run's folder.
        report: Its ``run_report.json``.
        settings: The board's settings.
        photos: All photos of the dataset, in its order.
    """
    started = time.perf_counter()
    flags = report["settings"]
    model = image_settings(
        argparse.Namespace(
            **{name: flags[name] for name in ("pretrained_model_name_or_path", "revision", "variant", "cache_dir")},
            max_sequence_length=flags["max_sequence_length"],
            mixed_precision=PRECISIONS[report["train"]["dtype"]],
            **{name: settings[name] for name in ("resolution", "num_inference_steps", "guidance_scale")},
            hub_token=None,
        )
    )
    model.family.flags.update({own.name: flags[own.name] for own in model.family.own_flags})
    encoder = load_image_encoder(settings["dino_model_id"], model.device)
    rows = split_rows(len(photos), settings)
    prompts = {part: [settings["instance_prompts"][row] for row in rows[part]] for part in ("valid", "test")}
    references = {part: encoder.embed([photos[row].decode() for row in rows[part]]) for part in prompts}
    prompts |= {"drift": settings["drift_image_prompts"], "sample": settings["sample_image_prompts"]}
    texts = list(dict.fromkeys(text for part in prompts.values() for text in part))
    embeds, negative = encode_for_images(
        model.family, texts, model.pipeline_kwargs, dtype=model.dtype, device=model.device
    )
    transformer = load_image_transformer(model.family, dtype=model.dtype, device=model.device, takes_lora=True)
    vae = model.family.load_vae(model.dtype, model.device)

    def draw(part: str, name: str, lora: Path | None, seeds: Sequence[int]) -> list[Image.Image]:
        """Images of a part's prompts, those of a seed one after the other; they are kept as files."""
        with with_adapter(model.family, transformer, vae, lora):
            of_prompts = generate_images(
                [embeds[text] for text in prompts[part]],
                family=model.family,
                model=transformer,
                vae=vae,
                negative=negative,
                seeds=seeds,
                pipeline_kwargs=model.pipeline_kwargs,
                images_at_once=settings["batch_size_eval"],
            )
        images = [images[number] for number in range(len(seeds)) for images in of_prompts]
        folder = run / FOLDER / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(folder / f"{part}-{name}-{number:02d}.png")
        return images

    def similarity(images: Sequence[Image.Image], others: torch.Tensor) -> float:
        """Mean cosine of each image and the one that belongs to it."""
        vectors = encoder.embed(images, settings["batch_size_eval"])
        return (vectors * others.repeat(len(vectors) // len(others), 1)).sum(1).mean().item()

    seed, last = flags["seed"] + EVALUATION_SEED, run / WEIGHTS_NAME
    valid = []
    for checkpoint in list_checkpoints(run):
        begun = time.perf_counter()
        images = draw("valid", checkpoint.name, lora_file(checkpoint), [seed])
        value = similarity(images, references["valid"])
        step = int(checkpoint.name.rpartition("-")[2])
        valid.append({"step": step, "similarity": value, "seconds": time.perf_counter() - begun})
    begun = time.perf_counter()
    value = similarity(draw("test", "final", last, range(seed, seed + TEST_REPEATS)), references["test"])
    test = {"similarity": value, "seconds": time.perf_counter() - begun}
    begun, seeds = time.perf_counter(), [flags["seed"] + DRIFT_SEED]
    base = encoder.embed(draw("drift", "base", None, seeds), settings["batch_size_eval"])
    value = 1 - similarity(draw("drift", "final", last, seeds), base)
    drift = {"drift": value, "seconds": time.perf_counter() - begun}
    seconds = time.perf_counter() - started
    draw("sample", "final", last, [seed])
    return {
        "schema": 1,
        "lora_digest": file_digest(last),
        "encoder": encoder.name,
        "settings": dict(settings),
        "valid": valid,
        "test": test,
        "drift": drift,
        "seconds": seconds,
    }


def read_report(run: Path) -> dict[str, Any]:
    """A finished run's report.

    Raises:
        ValueError: if there is none, or it says too little.
    """
    file = run / "run_report.json"
    if not file.is_file() or not (run / WEIGHTS_NAME).is_file():
        raise ValueError(f"--from_run {run} holds no run_report.json with {WEIGHTS_NAME}; name a finished run.")
    report = json.loads(file.read_text(encoding="utf-8"))
    check_report(report, file)
    return report


def read_results(file: Path, run: Path) -> dict[str, Any] | None:
    """What an evaluation of this very LoRA left, or ``None``.

    Raises:
        ValueError: if the file is of another evaluation.
    """
    if not file.is_file():
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    if not {"valid", "test", "drift"} <= set(results):
        raise ValueError(
            f"--results {file} is none of this benchmark: the board compares each image with the photo of its own "
            "prompt; leave it out, and the run is evaluated."
        )
    return results if results["lora_digest"] == file_digest(run / WEIGHTS_NAME) else None


def hub_info(kind: str, name: str, revision: str | None = None) -> dict[str, str | None]:
    """Commit and date of a ``model`` or ``dataset`` on the hub; ``None`` where they cannot be had, with a warning."""
    try:
        if Path(name).exists():
            raise ValueError("it is a local folder")
        info = getattr(HfApi(), f"{kind}_info")(name, revision=revision)
    except Exception as error:  # the hub client and the network below it raise their own kinds
        print(f"warning: commit and date of {kind} {name} stay null: {first_line(error)}.", file=sys.stderr)
        return {"sha": None, "created_at": None}
    return {"sha": info.sha, "created_at": info.created_at and info.created_at.isoformat()}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and those of the training script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flag = parser.add_argument
    flag("--output", "--json", type=Path, default=Path("entry.json"), help="File of the entry.")
    flag("--output_dir", type=Path, default=Path("peft-image-gen"), help="Folder of the run.")
    flag("--from_run", type=Path, help="Train nothing: make the entry of this finished run.")
    flag("--results", type=Path, help="Evaluation of --from_run; default: its own, which is made where it is missing.")
    flag("--training_params", type=Path, help="File that overrules settings of the board, as its experiments have.")
    flag("--experiment_name", help="Name on the board, method/experiment; default: one that names the spans.")
    args, extra = parser.parse_known_args(argv)
    if args.from_run is not None and extra:
        parser.error(f"--from_run trains nothing, so {extra[0]} has no effect; leave it out.")
    if args.from_run is None and args.results is not None:
        parser.error("--results is the evaluation of a finished run; name it by --from_run.")
    return args, extra


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate and write the entry.

    Returns:
        The exit code: 0, 2 for settings that cannot work, else that of the training script or 1.
    """
    args, extra = parse(argv)
    run = args.from_run or args.output_dir
    file = args.results or run / FOLDER / "results.json"
    try:
        settings = read_settings(args.training_params)
        if args.output.is_dir():
            raise ValueError(f"--output {args.output} is a folder; name a file in it.")
        report = read_report(run) if args.from_run else None
        results = read_results(file, run) if args.from_run else None
        photos: list[Photo] = []
        if results is None:
            photos = load_dataset_photos(settings["dataset_id"], None, settings["image_column"])
            rows = split_rows(len(photos), settings)["train"]
            # Before training: a missing encoder must not show after an hour.
            load_image_encoder(settings["dino_model_id"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report is None:
        prompts = [settings["instance_prompts"][row] for row in rows]
        folder = save_photos([photos[row] for row in rows], prompts, run / FOLDER / "photos")
        code = train(settings, folder, run, extra)
        if code or "--plan_only" in extra:
            return code
        report = read_report(run)
        free_memory()
    try:
        if results is None:
            results = evaluate(run, report, settings, photos)
            write_json(file, results)
    except Exception as error:
        if (line := explain(error, "evaluate")) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    entry = make_entry(
        report,
        results,
        adapter_config(run),
        name=args.experiment_name,
        model_info=hub_info("model", report["model"], report["base_revision"]),
        dataset_info=hub_info("dataset", results["settings"]["dataset_id"]),
    )
    # The form is the board's, so it has no schema of ours.
    write_text(args.output, json.dumps(entry, indent=2) + "\n")
    found = entry["train_info"]["metrics"][-1]
    print(f"DINO similarity {found['test dino_similarity']:.4f}, drift {found['drift']:.4f}\nEntry: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
