#!/usr/bin/env python
"""DreamBooth-LoRA of a diffusion transformer with part of its blocks skipped (DiT-BlockSkip, CVPR 2026).

Takes the flags of diffusers' DreamBooth-LoRA scripts and adds ``--skip_blocks``, ``--patch_sampling`` and their
companions. Without a model named it runs on the small model and photos that ship with the package.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from blockskip_hooks.cli.startup import keep_memory_whole, quiet_libraries


quiet_libraries()  # Before the imports below: libraries say what they miss while they load.
keep_memory_whole()

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from blockskip_hooks import DiTBlockSkipTransformer
from blockskip_hooks.cli.arguments import build_parser, parse_args, printable_command
from blockskip_hooks.cli.config_files import dump_config
from blockskip_hooks.cli.errors import explain, in_full
from blockskip_hooks.cli.first_screen import TIME, training_lines
from blockskip_hooks.cli.preparation import known_defaults, prepare_run
from blockskip_hooks.cli.run_plan import describe_plan, make_plan, planned_device
from blockskip_hooks.families import PromptEmbeds
from blockskip_hooks.families.prompts import TrainedText
from blockskip_hooks.loading.quantization import check_device
from blockskip_hooks.lora import add_lora
from blockskip_hooks.losses import combine_losses, flow_matching_loss
from blockskip_hooks.planning.plan import planned_stage, sends_ahead, streams_text
from blockskip_hooks.reporting.closing import closing_words, open_page
from blockskip_hooks.reporting.hub import open_repository, push_to_hub
from blockskip_hooks.reporting.outputs import RunOutputs, lora_size
from blockskip_hooks.reporting.progress import Progress, set_log_level
from blockskip_hooks.reporting.trackers import Tracking, start_trackers
from blockskip_hooks.residuals.batches import SampleMaker
from blockskip_hooks.residuals.store import ResidualStore
from blockskip_hooks.residuals.stretches import Stretches, segments
from blockskip_hooks.training.adapters import Adapters
from blockskip_hooks.training.assistant import add_assistant
from blockskip_hooks.training.checkpointer import Checkpointer
from blockskip_hooks.training.class_images import make_class_images
from blockskip_hooks.training.compiling import check_compiler, compile_kept_blocks
from blockskip_hooks.training.context import Context, make_accelerator
from blockskip_hooks.training.export import export_lora
from blockskip_hooks.training.history import History
from blockskip_hooks.training.learning_rate import warn_of_warmup
from blockskip_hooks.training.lora_checks import check_finite, check_gradients, describe_trainable, warn_unless_learned
from blockskip_hooks.training.optimizers import make_optimizer
from blockskip_hooks.training.prompts import embed_prompts
from blockskip_hooks.training.record_plan import describe_records, plan_stretches, resolve_seed
from blockskip_hooks.training.records import RecordSource
from blockskip_hooks.training.resume_checks import check_checkpoint, choose_checkpoint, describe_output
from blockskip_hooks.training.run import Run
from blockskip_hooks.training.samples import expected_schedule, load_samples, schedule
from blockskip_hooks.training.settings import TrainSettings
from blockskip_hooks.training.sharding import prepare_model, shard
from blockskip_hooks.training.stop_signals import Interrupted, StopSignals
from blockskip_hooks.training.validation import Validation
from blockskip_hooks.utils.accelerator import weight_dtype
from blockskip_hooks.utils.files import write_error, write_json
from blockskip_hooks.utils.locks import FolderLock
from blockskip_hooks.utils.monitor import StageMonitor


logger = logging.getLogger("blockskip_hooks.train")

Plan = dict[str, Any]
Embeds = dict[str, PromptEmbeds]
Data = tuple[SampleMaker, TrainedText | None, ResidualStore | None, Embeds | None]


class Learner(NamedTuple):
    """What learns: the transformer with its kept blocks in place, the LoRA on it, and what updates that."""

    model: DiTBlockSkipTransformer
    wrapped: torch.nn.Module  # The same as accelerate prepared it.
    adapters: Adapters
    prepared: list[torch.nn.Module]  # All that accelerate prepared for training, text encoders included.
    optimizer: Any
    lr_scheduler: Any


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Returns:
        The exit code: 0, 2 for settings that cannot work, 1 for a run that cannot go on, 128 + n after signal n. All
        but the first say why in one line.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    flags = printable_command(sys.argv[1:] if argv is None else argv)
    settings = parse_args(argv)
    set_log_level(settings.log_level)
    with StopSignals() as stop, FolderLock() as lock:
        try:
            return run_script(settings, flags, stop, lock)
        except Interrupted as error:
            if os.environ.get("RANK", "0") == "0":
                print(error, file=sys.stderr)
            return 128 + error.number


def run_script(settings: TrainSettings, flags: str, stop: StopSignals, lock: FolderLock) -> int:
    """Check the settings, plan, and train; see :func:`main`."""
    monitor = StageMonitor()
    try:
        if settings.dump_config:
            print(dump_config(settings, build_parser(), known_defaults(settings)), end="")
            return 0
        with monitor.stage("plan"):
            run = prepare_run(settings)
            accelerator = make_accelerator(run.settings)
            if accelerator.is_main_process:
                lock.take(run.output_dir)
            dtype = weight_dtype(accelerator)
            if run.quantization:
                check_device(run.quantization, accelerator.device, dtype)
            if settings.compile and not settings.plan_only:
                check_compiler(accelerator.device)
            device = planned_device(accelerator.device, plan_only=settings.plan_only)
            run, plan = make_plan(run, dtype, accelerator.num_processes, device)
            checkpoint = choose_checkpoint(run)
            if checkpoint is not None:
                check_checkpoint(checkpoint, run, expected_schedule(run, accelerator.num_processes)[1])
            # A stretch is so many steps whose records are made together, just before they are trained on.
            stretches = plan_stretches(run, plan, accelerator.num_processes, checkpoint)
    except Exception as error:
        return fail(error, settings, monitor, code=2)
    try:
        if accelerator.is_main_process:
            lines = training_lines(run, stretches.num_steps, accelerator.num_processes)
            print(describe_plan(run, plan, lines), flush=True)
            # A plan replaces nothing but the plan.
            if not settings.plan_only:
                found = describe_output(run, checkpoint, stretches.num_steps)
                print(*filter(None, (TIME, found)), sep="\n", flush=True)
            if warning := warn_of_warmup(run.settings, stretches.num_steps):
                logger.warning(warning)
            write_json(run.output_dir / "plan.json", plan)
        if not settings.plan_only:
            progress = Progress(monitor, shown=accelerator.is_main_process and settings.log_level != "error")
            train(run, Context(accelerator, monitor, stop, progress), plan, checkpoint, stretches, flags)
    except Exception as error:
        if isinstance(error, OSError):
            error = write_error(error, Path(error.filename or run.output_dir))
        return fail(error, settings, monitor, code=1)
    finally:
        accelerator.end_training()
    return 0


def fail(error: Exception, settings: TrainSettings, monitor: StageMonitor, code: int) -> int:
    """Say in one line why the run ends, and return the exit code; a bug is raised again, with its traceback."""
    if (line := explain(error, monitor.latest, settings.hub_token)) is None:
        raise error
    logger.debug("The error in full:\n%s", in_full(settings.hub_token))
    print(f"error: {line}", file=sys.stderr)
    return code


def train(run: Run, context: Context, plan: Plan, checkpoint: Path | None, stretches: Stretches, flags: str) -> None:
    """Prepare data and model, train stretch by stretch, save."""
    accelerator, monitor = context.accelerator, context.monitor
    if run.settings.push_to_hub and accelerator.is_main_process:
        name = run.settings.hub_model_id or run.output_dir.resolve().name
        run = run.with_flag("hub_model_id", open_repository(name, run.settings.hub_token))
    has_seed = run.settings.seed is not None
    run = run.with_flag("seed", resolve_seed(run, checkpoint))
    settings, num_steps = run.settings, stretches.num_steps
    if accelerator.is_main_process:
        start_trackers(run, accelerator)

    # Class images for prior preservation that are not there yet, the sample plan, the prompts' embeddings.
    if settings.with_prior_preservation:
        with monitor.stage("class_images"):
            make_class_images(run, context, plan)
    maker, text, store, image_embeds = load_data(run, context, streams_text(plan))

    # The kept blocks of the transformer, LoRA on them, optimiser and schedule.
    with monitor.stage("load"):
        learner = make_learner(run, accelerator, text, num_steps, sends_ahead(plan))
        model, adapters = learner.model, learner.adapters
        records = RecordSource(run, context, maker, model, adapters, store, stretches)
    accelerator.print(f"Training {describe_trainable(model, run.targets)}.")

    # What watches the steps and keeps them.
    history, tracking = History(accelerator, maker), Tracking(accelerator, monitor, model)
    planned = planned_stage(plan, "validate")
    validation = Validation(run, context, model, adapters, records, tracking, planned, image_embeds)
    # A run that drew its seed is repeated with that seed.
    seed = f" --seed {settings.seed}" * (not has_seed)
    start = "blockskip train" if accelerator.num_processes == 1 else f"accelerate launch {Path(__file__).name}"
    command = f"{start} {flags}{seed}"
    outputs = RunOutputs(run, maker, monitor, plan, command, stretches)
    checkpointer = Checkpointer(run, context, adapters, learner.optimizer, learner.lr_scheduler, history, records)
    checkpointer.after_save = lambda: outputs.write_so_far(history, validation.shown)
    if checkpoint is not None:
        checkpointer.resume(checkpoint)
        accelerator.print(f"Resuming from {checkpoint.name}, {history.step} of {num_steps} steps done.")

    # The records of a stretch, then its steps, and images after every few epochs.
    steps_per_epoch, _ = schedule(run, maker.plan, accelerator.num_processes)
    validation_steps = settings.validation_epochs * steps_per_epoch if settings.validation_prompt else num_steps
    with checkpointer.saving_when_stopped():
        for stretch, first in stretches.following(history.step):
            records.precompute(stretch, first, planned_stage(plan, "precompute"))
            for steps in segments(range(first, stretch.stop), validation_steps):
                train_steps(steps, run, context, learner, records, history, tracking, checkpointer)
                if steps.stop % validation_steps == 0 and steps.stop < num_steps:
                    validation.during(history.step)
            validation.log_trailing_error(history.step, is_last=stretch.stop == num_steps)
            tracking.log_stages(history.step)
            if stretch.stop < num_steps:
                records.drop()
        finish(outputs, context, learner, records, history, validation, tracking)


def load_data(run: Run, context: Context, streamed: bool) -> Data:
    """What builds batches, the text encoders that train along, the store if training reads records, and prompts'
    embeddings by another model that makes the images if there is one."""
    accelerator, dtype = context.accelerator, weight_dtype(context.accelerator)

    # Everything else random is seeded from the same seed. Records of this sample plan may be there already.
    sources, sample_plan = load_samples(run)
    store = None
    if run.uses_store:
        with accelerator.main_process_first():
            described = describe_records(run, sample_plan, sources, dtype)
            store = ResidualStore(run.residual_dir, described, overwrite=run.may_overwrite)

    recorded = (bool(run.recorded_layers), run.settings.residual_dtype, run.shares_text)
    maker = SampleMaker(sample_plan, sources, run.family, {}, accelerator.device, dtype, *recorded)
    # Every prompt once; the text encoders are gone afterwards.
    text, image_embeds = embed_prompts(run, context, maker, streamed)
    return maker, text, store, image_embeds


def make_learner(
    run: Run, accelerator: Accelerator, text: TrainedText | None, num_steps: int, sends_ahead: bool = False
) -> Learner:
    """Load the transformer, add LoRA, and prepare what trains it."""
    settings, family = run.settings, run.family

    # The weights of skipped blocks stay in the checkpoint.
    options = run.model_options(weight_dtype(accelerator), accelerator.device, shard)
    model = DiTBlockSkipTransformer.from_pretrained(family.model_path, run.config, **options, sends_ahead=sends_ahead)
    if settings.enable_npu_flash_attention:
        model.transformer.set_attention_backend("_native_npu")

    # LoRA in the kept blocks, and in the text encoders if they train along.
    lora: dict[str, Any] = {"rank": settings.rank, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    parameters = add_lora(model.transformer, run.targets, **lora, seed=run.seed)
    if run.assistant is not None:
        add_assistant(model, family, run.assistant, weight_dtype(accelerator))
    encoders = list(text.encoders.values()) if text else []
    text_layers = family.text_lora_layers
    text_parameters = [p for encoder in encoders for p in add_lora(encoder, text_layers, **lora, seed=run.seed)]
    adapters = Adapters(family, model.transformer, text, [*parameters, *text_parameters], accelerator.device)
    if settings.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
        for encoder in encoders:
            encoder.gradient_checkpointing_enable()

    if settings.compile:
        number = compile_kept_blocks(model)
        device = accelerator.device.type
        accelerator.print(f"Compiling {number} kept blocks for {device}; the first steps of each size take longer.")

    # Optimiser and schedule; accelerate counts the schedule in steps of all processes.
    scale = run.samples_per_step(accelerator.num_processes) if settings.scale_lr else 1
    optimizer = make_optimizer(settings, parameters, text_parameters, settings.learning_rate * scale)
    lr_scheduler = get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=settings.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=num_steps * accelerator.num_processes,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )
    wrapped = prepare_model(accelerator, model)
    optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    prepared = [wrapped]
    if text is not None:
        text.encoders = {name: accelerator.prepare(encoder) for name, encoder in text.encoders.items()}
        prepared += text.encoders.values()
    return Learner(model, wrapped, adapters, prepared, optimizer, lr_scheduler)


def train_steps(
    steps: range,
    run: Run,
    context: Context,
    learner: Learner,
    records: RecordSource,
    history: History,
    tracking: Tracking,
    checkpointer: Checkpointer,
) -> None:
    """The loop: train these optimiser steps, whose records have been made."""
    settings, family, accelerator = run.settings, run.family, context.accelerator
    model, wrapped, adapters, prepared, optimizer, lr_scheduler = learner
    for module in prepared:
        module.train()
    with (
        context.stop.held(),
        context.monitor.stage("train"),
        context.progress.stage("train", history.step, steps=records.stretches.num_steps) as progress,
    ):
        history.start_clock()
        for batch in records.loader(steps):
            with accelerator.accumulate(*prepared):
                # No record holds the embeddings of encoders that train, nor residuals that are made in each step.
                records.complete(batch)

                # Predict the velocity by the kept blocks; residuals stand in for the skipped ones.
                inputs = batch.arguments(family, model.config)
                output = wrapped(**inputs, residuals=batch.residuals, return_dict=False)[0]
                prediction, target = batch.loss_terms(family, family.prediction_to_latents(output, batch.latents))
                losses = flow_matching_loss(prediction, target, batch.sigmas, settings.weighting_scheme)
                loss = combine_losses(losses, settings.with_prior_preservation, settings.prior_loss_weight)

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if history.step == 0:
                        check_gradients(*adapters.modules)
                    norm = accelerator.clip_grad_norm_(adapters.parameters, settings.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            # A signal may reach processes in different steps: gathered with the losses, it ends all after the same.
            history.add_batch(batch.samples, losses, loss, context.stop.received)
            # Its tensors make room for those of the next batch.
            del batch, inputs, output, prediction, target, losses
            if accelerator.sync_gradients:
                step = history.end_step()
                figures = {"loss": step.loss, "lr": lr_scheduler.get_last_lr()[0], "grad_norm": float(norm)}
                tracking.log_step(step.number, step.samples, figures, step.quarters)
                progress.update(loss=step.loss)
                if step.number % settings.checkpointing_steps == 0:
                    checkpointer.save()
                context.stop.check(step.received)
                history.stop_clock()


def finish(
    outputs: RunOutputs,
    context: Context,
    learner: Learner,
    records: RecordSource,
    history: History,
    validation: Validation,
    tracking: Tracking,
) -> None:
    """Export the LoRA, make the final images, write the report and the model card, upload."""
    run, accelerator, settings = outputs.run, context.accelerator, outputs.run.settings
    # Every process must call this: it adds up what all of them made.
    made = records.count.together(accelerator)
    check_finite(*learner.adapters.modules)
    # A warmup's first step has rate zero.
    if history.step > 1 and accelerator.is_main_process:
        warn_unless_learned(*learner.adapters.modules)
    if accelerator.is_main_process:
        export_lora(run, learner.adapters, context.monitor, records.maker.dtype)
    before, after = validation.final(history.step)
    if accelerator.is_main_process:
        tracking.log_stages(history.step)
        report = outputs.report(history, made, lora_size(run, learner.model.transformer))
        outputs.write(report, before, after)
        if settings.push_to_hub and settings.hub_model_id:
            push_to_hub(settings.hub_model_id, run.output_dir, settings.hub_token)
            print(f"Uploaded to {settings.hub_model_id}.")
        print(closing_words(outputs, report, before, after))
        if settings.open and (line := open_page(run.output_dir)):
            print(line)
    accelerator.wait_for_everyone()
    if not settings.residual_dir and accelerator.is_main_process:
        records.drop(store_too=True)


if __name__ == "__main__":
    sys.exit(main())
