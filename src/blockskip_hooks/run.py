"""A run before any weight is read: every setting resolved and checked, so that mistakes cost seconds."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import logging
import math
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .argument_checks import check_family_flags, validate_args
from .arguments import QUANTIZING_OPTIONS, apply_defaults, looks_up_blocks, parse_bytes
from .blocks import modulation_layers
from .checkpoints import read_state
from .chosen_blocks import choose_blocks
from .comfyui import COMFYUI_NAME
from .config import BlockSkipConfig, PatchSamplingConfig
from .data import Photo, PhotoSet, image_paths, load_dataset_photos, nearest_bucket, scan_photos
from .embedded import DEFAULT_SUBJECT, embedded_model, embedded_photos, embedded_subjects, model_defaults
from .families import Family, detect_family
from .lora import WEIGHTS_NAME
from .merged import MERGED_NAME
from .model_checks import check_model
from .model_config import load_config
from .model_files import check_weights, resolve_model
from .monitor import format_seconds, versions
from .quantization import QuantizationConfig, read_quantization
from .residual_store import folder_digest, recorded_seed
from .sample_plan import SampleKind, SamplePlan
from .selection import Selection
from .selection_tables import SelectionTable
from .sharding import asks_for_sharding, hidden_from_accelerate
from .stretches import Stretches
from .training_data import PhotoSource
from .transformer import DiTBlockSkipTransformer
from .version import __version__


logger = logging.getLogger(__name__)

DEFAULT_RESIDUAL_BUDGET = 16 * 10**9
REFRESHES = 10
"""Stretches of a run whose residuals follow the LoRA, unless ``--stretch_steps`` says otherwise."""
EMBEDDED_PROMPTS = 4


@dataclass
class Run:
    """Settings of one run, resolved.

    Attributes:
        args: The flags, after family and model defaults.
        family: The model's family, on the model's folder.
        model_name: What the user called the model, for reports.
        embedded: Whether the embedded model is used.
        skeleton: The transformer without weights, placeholders on.
        selection: The skipped blocks.
        config: The same as a config.
        patch: Patch sampling.
        targets: Full names of the layers that get LoRA.
        photos: The instance photos, not decoded yet.
        prompts: Validation prompts.
        pipeline_kwargs: Arguments of the pipeline call that the model asks for.
        quantization: How kept blocks are held; ``None`` for plain weights.
        table: What is known of the harm of skipping this model's blocks.
        shares_weights: Whether processes divide the frozen weights of kept blocks.
    """

    args: argparse.Namespace
    family: Family
    model_name: str
    embedded: bool
    skeleton: DiTBlockSkipTransformer
    selection: Selection
    config: BlockSkipConfig
    patch: PatchSamplingConfig
    targets: list[str]
    photos: list[Photo]
    prompts: list[str]
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    quantization: QuantizationConfig | None = None
    table: SelectionTable | None = None
    shares_weights: bool = False

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def needs_search(self) -> bool:
        """Whether ``--select_on`` asks for curves that no table has."""
        wanted = self.args.select_on
        if not looks_up_blocks(self.args) or wanted == "table":
            return False
        return wanted == "subject" or self.table is None or self.table.source == "inferred"

    @property
    def skips(self) -> bool:
        return self.config.num_skipped > 0

    @property
    def recorded_layers(self) -> tuple[str, ...]:
        """Names of the modulation layers whose outputs are recorded, so that training does without their weights."""
        args = self.args
        # A trained text encoder would change their input.
        if not self.stores_residuals or args.keep_modulation or args.train_text_encoder:
            return ()
        names = modulation_layers(self.skeleton.spans, self.family.modulation_layers)
        return tuple(name for name in names if name not in set(self.targets))

    @property
    def stores_residuals(self) -> bool:
        """Whether training reads residuals from records."""
        return self.skips and self.config.residuals == "precomputed"

    @property
    def uses_store(self) -> bool:
        """Whether training reads records: precomputed residuals, or latents cached ahead of training."""
        return self.stores_residuals or self.args.cache_latents

    @property
    def refreshes(self) -> bool:
        """Whether each stretch's residuals are computed with the LoRA learnt so far."""
        wanted = self.args.refresh_residuals
        if wanted is None:
            # No LoRA changes what comes out of a leading span.
            wanted = self.config.trailing > 0 and not self.args.residual_dir
        return self.stores_residuals and wanted

    @property
    def record_repeats(self) -> int:
        """How many times a record is trained on."""
        return self.args.record_repeats if self.stores_residuals else 1

    @property
    def kinds(self) -> tuple[SampleKind, ...]:
        return ("instance", "class") if self.args.with_prior_preservation else ("instance",)

    @property
    def makes_images(self) -> bool:
        """Whether validation images are made at some time."""
        return bool(self.args.num_validation_images and (self.prompts or self.final_prompts))

    @property
    def final_prompts(self) -> list[str]:
        """Prompts of the images after training."""
        if self.args.skip_final_inference:
            return []
        return [self.args.final_validation_prompt] if self.args.final_validation_prompt else self.prompts

    def all_prompts(self, sources: dict[SampleKind, PhotoSource]) -> list[str]:
        """Every prompt that the run will need embeddings of."""
        prompts = [prompt for source in sources.values() for prompt in source.prompts()]
        prompts += [""] * (self.args.caption_dropout > 0)
        if self.makes_images:
            prompts += [*self.prompts, *self.final_prompts]
            prompts += [] if self.negative_prompt is None else [self.negative_prompt]
        return list(dict.fromkeys(prompts))

    @property
    def image_size(self) -> int:
        """Height in pixels of validation images."""
        return self.pipeline_kwargs.get("height", self.family.image_size)

    @property
    def negative_prompt(self) -> str | None:
        """Negative prompt of validation images, for pipelines that are guided."""
        return self.pipeline_kwargs.get("negative_prompt", self.family.negative_prompt)

    @property
    def transformer_config(self) -> dict[str, Any]:
        """Config of the transformer, with its class name."""
        return load_config(self.family.model_path / "transformer")

    def photo_sources(self) -> dict[SampleKind, PhotoSource]:
        """Decode the photos; class images must exist by now."""
        args = self.args
        sources: dict[SampleKind, PhotoSource] = {
            "instance": PhotoSource(self._photo_set(self.photos), args.instance_prompt or "")
        }
        if args.with_prior_preservation:
            photos = scan_photos(Path(args.class_data_dir), flag="--class_data_dir")[: args.num_class_images]
            sources["class"] = PhotoSource(self._photo_set(photos), args.class_prompt, use_captions=False)
        return sources

    def _photo_set(self, photos: list[Photo]) -> PhotoSet:
        return PhotoSet(
            photos,
            self.patch.max_size,
            buckets=self.patch.buckets,
            interpolation=self.args.image_interpolation_mode,
        )

    def sample_plan(self, seed: int, num_images: dict[SampleKind, int]) -> SamplePlan:
        """The run's sample plan for this many photos of each kind."""
        args = self.args
        return SamplePlan(
            seed=seed,
            num_images=num_images,
            repeats=args.repeats,
            timesteps=self.family.scheduler.timesteps,
            patch=self.patch,
            weighting_scheme=args.weighting_scheme,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
            random_flip=args.random_flip,
            center_crop=args.center_crop,
            fixed_crops=args.cache_latents and self.patch.mode == "none",
            buckets=self._buckets() if self.patch.buckets else None,
            batch_size=args.train_batch_size,
            caption_dropout=args.caption_dropout,
        )

    def _buckets(self) -> tuple[int, ...]:
        """Bucket of each instance photo."""
        return tuple(nearest_bucket(photo.size, self.patch.shapes) for photo in self.photos if photo.size)

    def schedule(self, plan: SamplePlan, num_processes: int) -> tuple[int, int]:
        """Optimiser steps of an epoch and of the run, as the upstream flags define them."""
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        steps_per_epoch = math.ceil(plan.epoch_length / per_step)
        return steps_per_epoch, args.max_train_steps or args.num_train_epochs * steps_per_epoch

    def residual_budget(self) -> int:
        """Bytes that the residual store may take."""
        if self.args.residual_budget is not None:
            return parse_bytes(self.args.residual_budget)
        folder = self.residual_dir
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return min(DEFAULT_RESIDUAL_BUDGET, shutil.disk_usage(existing).free // 2)

    def describe_records(self, plan: SamplePlan, sources: dict[SampleKind, PhotoSource], dtype: torch.dtype) -> dict:
        """Everything that records depend on; its digest is the residual store's fingerprint."""
        path, args = self.family.model_path, self.args
        components = ("transformer", "vae", *self.family.text_components)
        return {
            "version": __version__,
            "weights": {name: folder_digest(path / name) for name in components if (path / name).is_dir()},
            "variant": args.variant,
            "libraries": {name: versions()[name] for name in ("torch", "diffusers", "transformers")},
            "modulation": list(self.recorded_layers),
            "spans": [self.config.leading, self.config.trailing] if self.config.residuals == "precomputed" else None,
            **({"refreshed": True} if self.refreshes else {}),
            "residual_dtype": args.residual_dtype,
            # Kept blocks lie between the spans, so the trailing residual depends on how they are held.
            **({"quantization": self.quantization.describe()} if self.quantization and self.skips else {}),
            "photos": {
                kind: [[source.photos.digest(i), source.prompt_for(i)] for i in range(len(source.photos))]
                for kind, source in sources.items()
            },
            "samples": {
                field.name: str(getattr(plan, field.name)) for field in fields(plan) if field.name != "timesteps"
            },
            "timesteps": hashlib.sha256(plan.timesteps.numpy().tobytes()).hexdigest(),
            **{flag.name: str(getattr(args, flag.name)) for flag in self.family.own_flags},
            "max_sequence_length": args.max_sequence_length,
            "interpolation": args.image_interpolation_mode,
            "dtype": str(dtype),
        }

    def num_steps(self, num_processes: int) -> int:
        """Optimiser steps of the run."""
        args = self.args
        num_images = {kind: args.num_class_images if kind == "class" else len(self.photos) for kind in self.kinds}
        return self.schedule(self.sample_plan(args.seed or 0, num_images), num_processes)[1]

    def stretches(self, plan: dict[str, Any], num_processes: int, checkpoint: Path | None) -> Stretches:
        """The run's stretches: the longest whose records fit the residual budget, unless flags ask for shorter ones.

        A resumed run keeps the stretches it began with, whatever the disk has room for now: records then come out
        of the same batches. With other samples per step they would be other batches anyway.

        Raises:
            ValueError: if not even one step's records fit.
        """
        args, num_steps = self.args, self.num_steps(num_processes)
        if not self.uses_store:
            return Stretches(num_steps=num_steps, length=num_steps)
        samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        state = {} if checkpoint is None else read_state(checkpoint)
        if state and state.get("samples_per_step", samples_per_step) == samples_per_step:
            return Stretches(num_steps=num_steps, length=state["stretch_steps"], repeats=self.record_repeats)
        planned = plan["residuals"]
        record_bytes = -(-planned["bytes"] // planned["records"])
        step_bytes = record_bytes * samples_per_step * len(self.kinds)
        budget = self.residual_budget()
        if step_bytes > budget:
            raise ValueError(
                f"--residual_budget is {budget} bytes, less than the records of one step need ({step_bytes}: "
                f"{samples_per_step * len(self.kinds)} of {record_bytes}); raise it or lower --train_batch_size."
            )
        return Stretches(
            num_steps=num_steps,
            length=min(self.longest_stretch(num_steps), budget // step_bytes * self.record_repeats),
            repeats=self.record_repeats,
        )

    def longest_stretch(self, num_steps: int) -> int:
        """Steps of a stretch as far as flags decide, whatever there is room for."""
        refreshed = -(-num_steps // REFRESHES) if self.refreshes else num_steps
        return min(self.args.stretch_steps or refreshed, num_steps)

    @property
    def may_overwrite(self) -> bool:
        """Whether records of another run may be dropped: always in the run's own folder, else when told to."""
        return self.args.overwrite_residuals or not self.args.residual_dir

    def trackable_settings(self) -> dict[str, Any]:
        """The flags as trackers take them: plain values, and no token."""
        hidden = {"hub_token", "given"}
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in vars(self.args).items()
            if name not in hidden
        }

    def closing_words(self, report: dict[str, Any]) -> str:
        """The last lines a user sees: what came out, and how to use it."""
        losses = report["train"]["loss"]
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        seconds = sum(stage["seconds"] for stage in report["stages"])
        files = {"LoRA": WEIGHTS_NAME}
        if self.args.save_format == "comfyui":
            files["ComfyUI"] = COMFYUI_NAME
        if self.args.export_merged:
            files["Merged"] = MERGED_NAME
        files["Report"] = "report.html"
        width = max(map(len, files)) + 2
        return "\n".join(
            [
                f"Trained {report['train']['steps']} steps in {format_seconds(seconds)}{loss}.",
                *(f"{f'{name}:':<{width}}{self.output_dir / file}" for name, file in files.items()),
            ]
        )

    def resolve_seed(self, checkpoint: Path | None) -> int:
        """The seed: the flag's, the checkpoint's, or a new one that is kept in the report.

        Raises:
            ValueError: if the flag contradicts the checkpoint.
        """
        seed = self.args.seed
        if checkpoint is not None:
            resumed = read_state(checkpoint)["seed"]
            if seed not in (None, resumed):
                raise ValueError(f"--seed {seed} is not the seed of {checkpoint}, {resumed}; leave the flag out.")
            seed = resumed
        elif seed is None and self.args.resume_from_checkpoint:
            # The run ended before its first checkpoint; what it left are records, which are of one seed.
            seed = recorded_seed(self.residual_dir)
        if seed is None:
            # Every process must draw the same samples.
            (seed,) = broadcast_object_list([int.from_bytes(os.urandom(4), "big")])
        self.args.seed = seed
        return seed

    @property
    def residual_dir(self) -> Path:
        return Path(self.args.residual_dir) if self.args.residual_dir else self.output_dir / "residuals"


def prepare_run(args: argparse.Namespace) -> Run:
    """Resolve and check everything that needs no weights.

    Args:
        args: From :func:`~blockskip_hooks.arguments.parse_args`; changed in place.

    Raises:
        ValueError: one line that names the flag and the fix.
        OSError: if a folder cannot be read or written.
    """
    embedded = args.pretrained_model_name_or_path is None
    model_name = args.pretrained_model_name_or_path or "embedded micro-FLUX"
    if not embedded:
        # What the user typed is checked before a download starts.
        validate_args(args, warn=False)
    model_path = embedded_model() if embedded else resolve_model(args)
    family_class = detect_family(model_path)
    check_family_flags(args, family_class)
    defaults, pipeline_kwargs = model_defaults(model_path)
    prompts: list[str] = []
    if embedded:
        defaults |= _embedded_defaults(args)
        if "instance_data_dir" in defaults:
            prompts = embedded_subjects()[DEFAULT_SUBJECT]["validation_prompts"][:EMBEDDED_PROMPTS]
    apply_defaults(args, {**family_class.flag_defaults, **defaults})
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    validate_args(args)
    if embedded:
        pipeline_kwargs = {"height": args.resolution, "width": args.resolution, **pipeline_kwargs}
    if args.validation_prompt is not None:
        prompts = [args.validation_prompt]

    check_weights(model_path, family_class, args.variant)
    check_model(model_path, family_class, args.variant)
    try:
        family = family_class(model_path, args.variant, vars(args))
        blocks = choose_blocks(args, family, model_name)
    except OSError as error:
        raise ValueError(f"--pretrained_model_name_or_path {model_path} cannot be used: {error}") from error
    skeleton, quantization = blocks["skeleton"], read_quantization(args)
    if quantization and not quantization.layers(skeleton.transformer, [block.name for block in skeleton.spans.kept]):
        raise ValueError(
            f"No kept block has a layer that can be held in {quantization.name}; leave --quantization out."
        )
    shares_weights = asks_for_sharding()
    if shares_weights and (quantization or not QUANTIZING_OPTIONS.isdisjoint(args.memory_options)):
        raise ValueError(
            "--quantization, also as one of --memory_options, and accelerate's FSDP do not go together: quantised "
            "weights cannot be divided; leave one of them out."
        )
    accepted = inspect.signature(family.pipeline_class.__call__).parameters
    unknown = sorted(pipeline_kwargs.keys() - accepted.keys())
    if unknown:
        raise ValueError(f"{model_path}/blockskip_defaults.json: the model's pipeline takes no {', '.join(unknown)}.")
    photos = _find_photos(args)
    if args.with_prior_preservation and Path(args.class_data_dir).is_dir() and image_paths(Path(args.class_data_dir)):
        scan_photos(Path(args.class_data_dir), flag="--class_data_dir")
    if not args.instance_prompt and any(photo.caption is None for photo in photos):
        logger.warning("--instance_prompt is empty: photos without a caption train on an empty prompt.")
    if args.train_text_encoder and not family.text_lora_layers:
        raise ValueError(f"--train_text_encoder is not available for {family.name}; leave it out.")
    family.check()
    if args.enable_npu_flash_attention and importlib.util.find_spec("torch_npu") is None:
        raise ValueError("--enable_npu_flash_attention needs a package that is not installed: torch_npu.")
    _check_writable(Path(args.output_dir))
    return Run(
        args=args,
        family=family,
        model_name=model_name,
        embedded=embedded,
        **blocks,
        photos=photos,
        prompts=prompts,
        pipeline_kwargs=pipeline_kwargs,
        quantization=quantization,
        shares_weights=shares_weights,
    )


def known_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """What a run would put in place of flags' own defaults, as far as that is known without asking the hub.

    Raises:
        ValueError: if the model's folder is not one of a supported pipeline.
    """
    embedded = args.pretrained_model_name_or_path is None
    folder = embedded_model() if embedded else Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        return {}
    own = model_defaults(folder)[0] | (_embedded_defaults(args) if embedded else {})
    return {**detect_family(folder).flag_defaults, **own}


def _embedded_defaults(args: argparse.Namespace) -> dict[str, Any]:
    if {"instance_data_dir", "dataset_name"} & args.given:
        return {"instance_prompt": "a photo of sks object"}
    subject = embedded_subjects()[DEFAULT_SUBJECT]
    return {
        "instance_data_dir": str(embedded_photos(DEFAULT_SUBJECT)),
        "instance_prompt": subject["instance_prompt"],
        "class_prompt": subject["class_prompt"],
        "num_validation_images": 2,
        "checkpointing_steps": 100,
        "seed": 0,
    }


def _find_photos(args: argparse.Namespace) -> list[Photo]:
    if args.dataset_name:
        return load_dataset_photos(
            args.dataset_name, args.dataset_config_name, args.image_column, args.caption_column, args.cache_dir
        )
    return scan_photos(Path(args.instance_data_dir))


def _check_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written; choose another folder.")


def start_accelerator(args: argparse.Namespace, **settings: Any) -> Accelerator:
    """accelerate with the flags' precision.

    Raises:
        ValueError: if this machine cannot compute in it.
    """
    try:
        with hidden_from_accelerate():
            return Accelerator(mixed_precision=args.mixed_precision, **settings)
    except ValueError as error:
        raise ValueError(f"--mixed_precision {args.mixed_precision} cannot be used here: {error}") from error


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """Dtype of frozen weights under the accelerator's mixed precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
