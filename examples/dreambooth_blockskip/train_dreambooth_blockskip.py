#!/usr/bin/env python
"""DreamBooth-LoRA of a diffusion transformer with part of its blocks skipped (DiT-BlockSkip, CVPR 2026).

Takes the flags of diffusers' DreamBooth-LoRA scripts and adds ``--skip_blocks``, ``--patch_sampling`` and their
companions. Without a model named it runs on the small model and photos that ship with the package.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import os
import sys
from pathlib import Path

from blockskip_hooks.cli.startup import quiet_libraries


quiet_libraries()

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from blockskip_hooks import DiTBlockSkipTransformer
from blockskip_hooks.cli.arguments import build_parser, parse_args, parse_trackers, printable_command
from blockskip_hooks.cli.config_files import dump_config
from blockskip_hooks.cli.errors import explain, in_full
from blockskip_hooks.cli.preparation import known_defaults, prepare_run
from blockskip_hooks.cli.run_plan import describe_plan, make_plan
from blockskip_hooks.families.prompts import check_embeds, encode_prompts
from blockskip_hooks.loading.quantization import check_device
from blockskip_hooks.lora import describe_trainable
from blockskip_hooks.planning.plan import planned_batch_size, planned_vae, streams_text
from blockskip_hooks.reporting.outputs import open_repository, push_to_hub, run_report, write_outputs, write_progress
from blockskip_hooks.reporting.prediction import expect_work, predict_seconds
from blockskip_hooks.reporting.progress import Progress, set_log_level
from blockskip_hooks.reporting.trackers import start_trackers
from blockskip_hooks.residuals.batches import SampleMaker
from blockskip_hooks.residuals.store import ResidualStore
from blockskip_hooks.residuals.stretches import Stretches, segments
from blockskip_hooks.search.auto import is_trained, probe_args, with_measured_table
from blockskip_hooks.training.checkpoints import find_checkpoint
from blockskip_hooks.training.class_images import make_class_images
from blockskip_hooks.training.resume_checks import check_checkpoint
from blockskip_hooks.training.settings import Run, start_accelerator, weight_dtype
from blockskip_hooks.training.stop_signals import Interrupted, StopSignals, is_lost_process
from blockskip_hooks.training.trainer import Trainer
from blockskip_hooks.training.validation import Validation
from blockskip_hooks.utils.files import write_error, write_json
from blockskip_hooks.utils.monitor import StageMonitor


logger = logging.getLogger("blockskip_hooks.train")


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Returns:
        The exit code: 0, 2 for settings that cannot work, 1 for a run that cannot go on, 128 + n after signal n. All
        but the first say why in one line.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    command = printable_command(sys.argv if argv is None else [__file__, *argv])
    args = parse_args(argv)
    set_log_level(args.log_level)
    if args.dump_config:
        return print_settings(args)
    with StopSignals() as stop:
        try:
            return run_script(args, command, stop)
        except Interrupted as error:
            if os.environ.get("RANK", "0") == "0":
                print(error, file=sys.stderr)
            return 128 + error.number


def print_settings(args: argparse.Namespace) -> int:
    """Print all settings as a file for ``--config``."""
    try:
        print(dump_config(args, build_parser(), known_defaults(args)), end="")
    except Exception as error:
        if (line := explain(error, secret=args.hub_token)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def run_script(args: argparse.Namespace, command: str, stop: StopSignals, *, is_probe: bool = False) -> int:
    """Prepare, choose the blocks, plan and train, with parsed flags; see :func:`main`."""
    typed, monitor = copy.copy(args), StageMonitor()
    try:
        with monitor.stage("plan"):
            run = prepare_run(args)
            accelerator = make_accelerator(run)
            if run.quantization:
                check_device(run.quantization, accelerator.device, weight_dtype(accelerator))
            checkpoint = find_checkpoint(run.output_dir, args.resume_from_checkpoint)
        if run.needs_search:
            with monitor.stage("select"):
                probe = probe_args(typed, run) if args.select_on == "subject" else None
                if probe is not None and not is_trained(probe):
                    accelerator.print(f"Training a probe LoRA of {args.probe_steps} steps to measure the blocks on.")
                    if code := run_script(probe, command, stop, is_probe=True):
                        return code
                accelerator.print("Measuring which blocks to skip: the text is masked in the first and last blocks.")
                run = with_measured_table(run, accelerator, probe, command)
        with monitor.stage("plan"):
            run, plan = make_plan(run, weight_dtype(accelerator), accelerator.num_processes)
            if checkpoint is not None:
                check_checkpoint(checkpoint, run)
            stretches = run.stretches(plan, accelerator.num_processes, checkpoint)
            if accelerator.is_main_process:
                predict_seconds(
                    run, plan, weight_dtype(accelerator), accelerator.device, stretches, accelerator.num_processes
                )
    except Exception as error:
        if (line := explain(error, monitor.latest, args.hub_token)) is None:
            raise
        logger.debug("The error in full:\n%s", in_full(args.hub_token))
        print(f"error: {line}", file=sys.stderr)
        return 2
    try:
        if accelerator.is_main_process:
            print(describe_plan(run, plan), flush=True)
            write_json(run.output_dir / "plan.json", plan)
        if args.plan_only:
            return 0
        train(run, accelerator, monitor, plan, checkpoint, stretches, command, stop)
    except Exception as error:
        if isinstance(error, RuntimeError) and is_lost_process(error):
            line: str | None = (
                f"Another process of this run ended or cannot be reached, so process {accelerator.process_index} ends "
                "too; the same command with --resume_from_checkpoint latest goes on from the last checkpoint."
            )
        else:
            if isinstance(error, OSError):
                error = write_error(error, Path(error.filename or run.output_dir))
            line = explain(error, monitor.latest, args.hub_token)
        if line is None:
            raise
        logger.debug("The error in full:\n%s", in_full(args.hub_token))
        print(f"error: {line}", file=sys.stderr)
        return 1
    finally:
        # It would end the processes' group, which a probe shares with the run that it is for.
        if not is_probe:
            accelerator.end_training()
    return 0


def make_accelerator(run: Run) -> Accelerator:
    """Devices, processes, precision and trackers as the flags and the accelerate config ask for."""
    args = run.args
    if args.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    return start_accelerator(
        args,
        # Steps are counted, whatever the loader is at: it reads ahead.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # Without being told, accelerate would let each process of a machine without accelerators train on its own.
        cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available(),
        log_with=parse_trackers(args.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(run.output_dir / args.logging_dir)
        ),
    )


def train(
    run: Run,
    accelerator: Accelerator,
    monitor: StageMonitor,
    plan: dict,
    checkpoint: Path | None,
    stretches: Stretches,
    command: str,
    stop: StopSignals,
) -> None:
    """Encode, load, train stretch by stretch, save."""
    args, family = run.args, run.family
    if args.push_to_hub and accelerator.is_main_process:
        open_repository(run)
    dtype, device = weight_dtype(accelerator), accelerator.device
    seed = run.resolve_seed(checkpoint)
    progress = Progress(monitor, shown=accelerator.is_main_process and args.log_level != "error")
    expect_work(progress, run, plan, stretches, accelerator.num_processes)
    if accelerator.is_main_process:
        start_trackers(run, accelerator)

    # Prior preservation: class images that are not there yet.
    if args.with_prior_preservation:
        with monitor.stage("class_images"):
            make_class_images(
                run,
                accelerator,
                dtype,
                seed,
                planned_batch_size(plan, "class_images") or 1,
                streams_text=streams_text(plan),
                placement=planned_vae(plan, "class_images"),
                progress=progress,
            )

    # The sample plan: from here on nothing is random. Records of it may be there already.
    sources = run.photo_sources()
    sample_plan = run.sample_plan(seed, {kind: len(source.photos) for kind, source in sources.items()})
    steps_per_epoch, _ = run.schedule(sample_plan, accelerator.num_processes)
    max_train_steps = stretches.num_steps
    store = None
    if run.uses_store:
        with accelerator.main_process_first():
            store = ResidualStore(
                run.residual_dir, run.describe_records(sample_plan, sources, dtype), overwrite=run.may_overwrite
            )

    # Encode every prompt once; the text encoders are gone afterwards.
    prompts = run.all_prompts(sources)
    with monitor.stage("encode"), progress.stage("encode", prompts=len(prompts)) as display:
        embeds, text = encode_prompts(
            family,
            prompts,
            dtype=dtype,
            device=device,
            keep_trainable=args.train_text_encoder,
            streamed=streams_text(plan),
            progress=display,
        )
    check_embeds(family, run.transformer_config, embeds, dtype)
    maker = SampleMaker(
        sample_plan, sources, family, embeds, device, dtype, bool(run.recorded_layers), args.residual_dtype
    )

    # Load the kept blocks only; LoRA, optimiser and learning-rate schedule.
    with monitor.stage("load"):
        model = DiTBlockSkipTransformer.from_pretrained(
            family.model_path,
            run.config,
            torch_dtype=dtype,
            device=device,
            variant=args.variant,
            stacks=family.block_stacks,
            transformer_class=family.transformer_class(run.transformer_config),
            recorded_layers=run.recorded_layers,
            quantization=run.quantization,
            shares_weights=run.shares_weights,
        )
        if args.enable_npu_flash_attention:
            model.transformer.set_attention_backend("_native_npu")
        trainer = Trainer(
            run,
            accelerator,
            monitor,
            maker,
            model,
            text,
            store,
            stretches,
            images_at_once=planned_batch_size(plan, "validate"),
            vae_placement={stage: planned_vae(plan, stage) for stage in ("precompute", "validate")},
            stop=stop,
            progress=progress,
        )
    accelerator.print(f"Training {describe_trainable(model, run.targets)}.")
    if checkpoint is not None:
        trainer.resume(checkpoint)
        accelerator.print(f"Resuming from {checkpoint.name}, {trainer.step} of {max_train_steps} steps done.")
    with trainer.saving_when_stopped():
        train_and_save(trainer, plan, steps_per_epoch, command)


def train_and_save(trainer: Trainer, plan: dict, steps_per_epoch: int, command: str) -> None:
    """The loop, and what comes after it."""
    run, accelerator, monitor, store = trainer.run, trainer.accelerator, trainer.monitor, trainer.store
    args, stretches, max_train_steps = run.args, trainer.stretches, trainer.max_train_steps
    validation = Validation(trainer)
    expect_work(trainer.progress, run, plan, stretches, accelerator.num_processes, trainer.step)

    command = f"accelerate launch {command}"
    trainer.after_checkpoint = functools.partial(write_progress, run, trainer, plan, command)

    # The loop: records of a stretch, then its steps.
    validation_steps = args.validation_epochs * steps_per_epoch if args.validation_prompt else max_train_steps
    for stretch, first in stretches.following(trainer.step):
        trainer.precompute(stretch, args.precompute_batch_size or planned_batch_size(plan, "precompute"))
        for part in segments(range(first, stretch.stop), validation_steps):
            trainer.train(part)
            if part.stop % validation_steps == 0 and part.stop < max_train_steps:
                validation.during()
        validation.check_records()
        trainer.tracking.log_stages(trainer.step)
        if store is not None and stretch.stop < max_train_steps:
            store.drop()

    # Save.
    trainer.add_up_records()
    trainer.export()
    # Processes that share weights run the model together or not at all.
    if accelerator.is_main_process or trainer.model.is_sharded:
        before, after = validation.final()
    if accelerator.is_main_process:
        trainer.tracking.log_stages(trainer.step)
        report = run_report(run, trainer, monitor.as_list())
        write_outputs(run, trainer, report, plan, command, before, after)
        if args.push_to_hub:
            print(f"Uploaded to {push_to_hub(run)}.")
        print(run.closing_words(report))
    accelerator.wait_for_everyone()
    if store is not None and not args.residual_dir and accelerator.is_main_process:
        store.remove()


if __name__ == "__main__":
    sys.exit(main())
