"""The plan of a run, made before anything is loaded: memory of every stage, FLOPs, disk (``plan.json``).

Every figure is simulated (see :mod:`~blockskip_hooks.planning.simulation`): bytes of live tensors, which is what the
method bounds, and what CUDA's caching allocator reserves for them (see :mod:`~blockskip_hooks.planning.allocator`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..loading.text_encoders import large_encoders
from ..residuals.batches import SHARED_TEXT
from ..residuals.dtype import PACKED, packed_bytes
from ..residuals.stretches import Stretches
from ..selection import Selection
from ..state import SpanResiduals
from .allocator import CONTEXT_BYTES
from .components import simulate_text_encoder
from .devices import DeviceType, rounded
from .request import PlanRequest
from .simulation import FakeTransformer
from .usage import Usage
from .vae import Vae


SCHEMA = 1
LARGEST_PRECOMPUTE_BATCH = 64
# Samples whose forwards go in step, at most.
MOST_IN_STEP = 64
# A shard's header names each tensor of a record, the manifest each photo; beside real records this is nothing.
RECORD_OVERHEAD = 2048
# Text encoders that need less are loaded whole, whatever training needs.
SMALL_ENCODE_BYTES = 2**30
# bitsandbytes keeps the state of small tensors in float32 and one float32 scale per 256 values of the others.
MIN_8BIT_SIZE = 4096
BLOCK_8BIT_SIZE = 256


def plan_run(request: PlanRequest) -> dict[str, Any]:
    """Simulate every stage of a run once.

    Args:
        request: The settings.

    Returns:
        The contents of ``plan.json``. In each stage, ``peak_device_bytes`` is the sum of ``parameter_bytes`` (frozen
        weights, with one streamed block and, on a CPU, the next one), ``lora_optimizer_bytes`` and
        ``activation_bytes`` (with gradients alive at the peak). ``peak_reserved_bytes`` is what CUDA's caching
        allocator reserves for them, on other devices the same, and ``needed_bytes`` is that with the context: what has
        to be free on the device. ``tflops_per_step`` counts matrix products of one forward (and backward) of
        ``batch_size`` samples, ``attention_tflops_per_step`` the attention beside them, ``vae_tflops`` what of both is
        the VAE's: of the batch, or of one image that is decoded. ``seconds`` is always null: no time is predicted.
        ``streamed`` of the stage "encode" says whether the layers of large text encoders are read from the checkpoint
        one at a time, once per prompt.

    Raises:
        ValueError: if the spans leave no block, or the config names no model class.
    """
    fake = FakeTransformer(request)
    states = _optimizer_state_bytes(fake.lora_sizes(), request.use_8bit_adam, request.device)
    train, capture, residuals = _training_step(fake, states)
    vae = Vae(request, train)
    stages: list[dict[str, Any]] = []
    forwards: dict[str, Usage] = {}
    if request.class_batch_size is not None:
        side, wanted = request.class_resolution, min(request.class_batch_size, request.class_images)
        of_all = -(-request.class_images // wanted)
        maker = (fake, vae.before_lora())
        stage, forwards["class_images"] = _make_images("class_images", *maker, wanted, of_all, side, 0)
        stages.append(stage)
    if request.text_encoders:
        usage, streamed = _encode_text(request, train.peak_bytes)
        if request.validation and request.validation.text_encoders != request.text_encoders:
            second, second_streamed = _encode_text(request.validation, train.peak_bytes)
            usage, streamed = usage.then(second), streamed or second_streamed
        stages.append({**_stage("encode", usage, 1), "streamed": streamed})
    made, forward = _records_and_training(fake, vae, train, capture, states)
    stages += made
    if forward is not None:
        forwards["precompute"] = forward
    if request.validation_resolution is not None:
        side, wanted = request.validation_resolution, request.validation_batch_size
        of_all = request.validation_prompts
        maker = (fake, vae) if request.validation is None else _in_place(request.validation, fake, vae)
        stage, forwards["validate"] = _make_images("validate", *maker, wanted, of_all, side, states)
        stages.append(stage)

    _send_ahead(request, stages, forwards, fake.ahead_bytes, train)
    context_bytes = CONTEXT_BYTES if request.device == "cuda" else 0
    for stage in stages:
        stage["needed_bytes"] = stage["peak_reserved_bytes"] + context_bytes
    largest = max(stage["needed_bytes"] for stage in stages)
    budget, config = request.memory_budget_bytes, request.config
    selection = request.selection or Selection(fake.num_blocks, config.leading, config.trailing, "flag")
    return {
        "schema": SCHEMA,
        "device": request.device,
        "context_bytes": context_bytes,
        "skip": selection.as_dict(),
        "quantization": request.quantization.name if request.quantization else None,
        "patch": {
            "mode": request.patch.mode,
            "min": request.patch.min_size,
            "max": request.patch.max_size,
            "training_resolution": request.patch.training_resolution,
            "positions": request.patch.positions,
        },
        "stages": stages,
        "residuals": _records(request, residuals, fake.model.spans.shares_text and not request.trained_encoders),
        "fits": {"budget_bytes": budget, "ok": None if budget is None else largest <= budget, "reason": None},
    }


def _in_place(validation: PlanRequest, fake: FakeTransformer, vae: Vae) -> tuple[FakeTransformer, Vae]:
    """The model that makes validation images in place of the trained one, and what of the latter stays beside it.

    That is its LoRA and, where every step encodes, its VAE. Its frozen weights make room in host memory, which is no
    other memory on a CPU.
    """
    request = fake.request
    left = sum(rounded(4 * count, request.device) for count in fake.lora_sizes())
    left += 0 if request.stores_residuals or request.cache_latents else vae.parameter_bytes
    left += vae.base.parameter_bytes if request.device == "cpu" else 0
    other = replace(validation, resident_bytes=request.resident_bytes + left)
    return FakeTransformer(other), Vae(other, vae.training, vae.base.beside(parameter_bytes=left))


def _training_step(fake: FakeTransformer, states: int) -> tuple[Usage, Usage | None, SpanResiduals]:
    """A training step, the forward that its residuals come from if there is one, and the residuals.

    Args:
        fake: The transformer.
        states: Bytes of the optimizer's state.
    """
    request, residuals, capture = fake.request, SpanResiduals(), None
    if request.config.num_skipped and request.config.residuals != "none":
        online = request.config.residuals == "online"
        first_batch = request.batch_size if online else request.precompute_batch_size or 1
        capture, residuals = fake.capture(first_batch, with_adapters=online)
        # LoRA and its optimizer are there from the start of training; a later stretch finds them in the way.
        capture = capture.beside(parameter_bytes=request.beside_bytes, lora_bytes=states)
    train = fake.train(residuals)
    return train.beside(parameter_bytes=request.beside_bytes, lora_bytes=states), capture, residuals


def _records_and_training(
    fake: FakeTransformer, vae: Vae, train: Usage, capture: Usage | None, states: int
) -> tuple[list[dict[str, Any]], Usage | None]:
    """The stages that make records, if there are any, and train; and what forwards of the first need."""
    request = fake.request
    if request.stores_residuals:
        assert capture is not None
        batch_size, together, capture = _precompute_batch(fake, capture, train, vae, states)
        capture = capture.beside(parameter_bytes=_read_ahead_bytes(fake))
        # All photos of a stretch are encoded first; the VAE is gone when the transformer runs.
        encode, alone = vae.encode(batch_size)
        precompute = {**_stage("precompute", encode.then(capture), batch_size, encode), "vae_alone": alone}
        precompute["together"] = together
        return [precompute, _stage("train", train, request.batch_size)], capture
    if request.cache_latents:
        encode, alone = vae.encode(1)
        precompute = {**_stage("precompute", encode, 1, encode), "vae_alone": alone}
        return [precompute, _stage("train", train, request.batch_size)], None
    # Without records every step encodes its crops, so the VAE stays.
    if capture is not None:
        train = capture.beside(parameter_bytes=_read_ahead_bytes(fake)).then(train)
    in_step = vae.beside_transformer(request.batch_size)
    train = in_step.then(train.beside(parameter_bytes=vae.parameter_bytes))
    return [_stage("train", train, request.batch_size, in_step)], None


def _make_images(
    name: str, fake: FakeTransformer, vae: Vae, wanted: int, groups: int, side: int, states: int
) -> tuple[dict[str, Any], Usage]:
    """The stage in which the pipeline makes images, LoRA and optimizer state resident; and what its forwards need.

    As many of a group at a time as need no more than training, and as many calls in step as fit; the VAE decodes the
    images one by one.
    """
    request, images = fake.request, max(wanted, 1)
    while True:
        # A guided pipeline runs the prompt and the negative prompt in one batch, if not one after the other.
        batch_size = images if request.family.negative_prompt is None else 2 * images
        infer = fake.infer(batch_size, (side, side))
        # Class images are made apart from each other, by processes that have all of the weights.
        alone = request.resident_bytes - fake.text_bytes
        others = alone if name == "class_images" else request.beside_bytes
        infer = infer.beside(parameter_bytes=others + _read_ahead_bytes(fake), lora_bytes=states)
        phases, placement = vae.decode_after(infer, (side, side))
        usage = phases.beside(parameter_bytes=request.validation_extra_bytes)
        if images == 1 or usage.peak_bytes <= vae.limit:
            limit = request.limit(vae.training, usage)
            usage = replace(usage, halted_bytes=infer.halted_bytes)
            calls = min(groups * -(-max(wanted, 1) // images), MOST_IN_STEP)
            together, usage = usage.in_step(calls if infer.halted_bytes else 1, limit)
            stage = _stage(name, usage, images, vae.decode((side, side)))
            beside = request.validation_extra_bytes + (0 if placement["vae_alone"] else vae.parameter_bytes)
            _, forward = infer.beside(parameter_bytes=beside).in_step(together, limit)
            return {**stage, **placement, "together": together}, forward
        images //= 2


def _precompute_batch(
    fake: FakeTransformer, first: Usage, train: Usage, vae: Vae, states: int
) -> tuple[int, int, Usage]:
    """The batch of precompute forwards, how many of them go in step, and what they need.

    Weights are read once for all samples that go in step. Activations grow with the batch, hidden states with all of
    those samples; precompute should hardly need more than training does.
    """
    request = fake.request
    limit = request.limit(train, first) - (_read_ahead_bytes(fake) if request.memory_budget_bytes else 0)
    samples = min(MOST_IN_STEP, max(request.num_samples, 1))
    at_once = min(samples, request.stretch_samples)
    if request.precompute_batch_size is not None:
        batch_size = request.precompute_batch_size
        return batch_size, *first.in_step(-(-at_once // batch_size), limit)
    batch_size = 1
    # Activations grow about in proportion to the batch, so one sample tells where to begin.
    phases = (first, vae.encode(1)[0])
    while (
        batch_size < at_once
        and 2 * batch_size <= min(LARGEST_PRECOMPUTE_BATCH, samples)
        and all(
            phase.parameter_bytes + phase.lora_bytes + 2 * batch_size * phase.activation_bytes <= train.peak_bytes
            for phase in phases
        )
    ):
        batch_size *= 2
    best = 1, *first.in_step(at_once, limit)
    # The allocator's gaps grow with the batch: without a budget, what training reserves is enough if a smaller one is.
    avoidable = first.traces and not request.memory_budget_bytes and best[2].reserved_bytes <= train.reserved_bytes
    while batch_size > 1:
        usage, _ = fake.capture(batch_size)
        usage = usage.beside(parameter_bytes=request.beside_bytes, lora_bytes=states)
        if usage.reserved_bytes <= train.reserved_bytes:
            chosen = batch_size, *usage.in_step(-(-at_once // batch_size), limit)
            # Fewer readings come before larger batches.
            reads_no_more = min(chosen[0] * chosen[1], at_once) >= min(best[0] * best[1], at_once)
            if reads_no_more and (not avoidable or chosen[2].reserved_bytes <= train.reserved_bytes):
                return chosen
        batch_size //= 2
    return best


def _read_ahead_bytes(fake: FakeTransformer) -> int:
    """Weights of the next block, which a thread reads while one runs, where that takes the device's memory."""
    return fake.ahead_bytes if fake.request.device == "cpu" else 0


def _send_ahead(
    request: PlanRequest,
    stages: list[dict[str, Any]],
    forwards: Mapping[str, Usage],
    block_bytes: int,
    training: Usage,
) -> None:
    """Let stages that stream send a second block to an accelerator, if that fits beside the forwards of all.

    It is there while the transformer runs, not beside the VAE.
    """
    if not forwards:
        return
    limit = request.limit(training, training)
    ahead = {name: forward.beside(parameter_bytes=block_bytes) for name, forward in forwards.items()}
    fits = request.device != "cpu" and block_bytes and all(usage.reserved_bytes <= limit for usage in ahead.values())
    for stage in stages:
        if (usage := ahead.get(stage["name"])) is None:
            continue
        stage["sends_ahead"] = bool(fits)
        if fits:
            reserved = max(stage["peak_reserved_bytes"], usage.reserved_bytes)
            stage |= _bytes(usage) if usage.peak_bytes > stage["peak_device_bytes"] else {}
            stage["peak_reserved_bytes"] = reserved


def _encode_text(request: PlanRequest, training_peak: int) -> tuple[Usage, bool]:
    """What encoding needs, and whether large encoders have to be streamed to need no more than training."""
    whole = _run_encoders(request, ())
    if whole.peak_bytes <= max(training_peak, SMALL_ENCODE_BYTES):
        return whole, False
    allowed, large = request.streamable_encoders, large_encoders(dict(enumerate(request.text_encoders)))
    positions = [position for position in large if allowed is None or position in allowed]
    streamed = _run_encoders(request, positions) if positions else whole
    return (streamed, True) if streamed.peak_bytes < whole.peak_bytes else (whole, False)


def _run_encoders(request: PlanRequest, streamed: Sequence[int]) -> Usage:
    """All text encoders are loaded together and run in turn, one prompt at a time."""
    tokens = request.text_tokens + request.family.template_tokens
    if request.has_condition and request.family.reads_condition:
        # Their vision towers are not simulated: they are small beside the layers that read what they make.
        tokens += math.prod(request.training_size) // request.family.latent_token_size**2
    usages = [
        simulate_text_encoder(
            config,
            1,
            tokens,
            request.weight_dtype,
            streamed=position in streamed,
            device=request.device,
            call=request.family.text_call(config),
        )
        for position, config in enumerate(request.text_encoders)
    ]
    total = Usage(0, 0)
    parameter_bytes = sum(usage.parameter_bytes for usage in usages)
    for usage in usages:
        total = total.then(usage.beside(parameter_bytes=parameter_bytes - usage.parameter_bytes))
    return total


def _records(request: PlanRequest, residuals: SpanResiduals, shares_text: bool) -> dict[str, int]:
    """Disk of the residual store; ``shares_text``: whether samples of a prompt have the text in one record."""
    if not request.stores_residuals and not request.cache_latents:
        return {"records": 0, "bytes": 0, "stretches": 0, "record_bytes": 0, "modulation_bytes": 0}
    stored = residuals.tensors() if request.stores_residuals else {}
    packed = PACKED if request.residual_dtype == "float8" else ()
    sizes = {
        name: packed_bytes(tensor[0]) if name in packed else tensor[0].numel() * tensor.element_size()
        for name, tensor in stored.items()
    }
    modulation = sizes.pop("modulation", 0)
    prompts = min(request.photo_prompts, max(request.num_samples, 1))
    text = prompts * (sizes.pop(SHARED_TEXT) + RECORD_OVERHEAD) if shares_text and stored else 0
    record = math.prod(request.family.latent_shape(*request.training_size)) * request.weight_dtype.itemsize
    record *= 1 + request.has_condition
    record += sum(sizes.values())
    # Samples of the same prompt and timestep share their modulation; at most, each has its own.
    per_record = record + modulation + RECORD_OVERHEAD
    per_step = request.step_samples
    num_steps = max(-(-request.num_samples // per_step), 1)
    length = request.stretch_steps or num_steps
    if request.residual_budget_bytes is not None:
        # A stretch holds whole steps.
        fitting = max(1, (request.residual_budget_bytes - text) // (per_record * per_step))
        length = min(length, fitting * request.record_repeats)
    stretches = Stretches(num_steps=num_steps, length=length, repeats=request.record_repeats)
    records = min(stretches.num_recorded_steps * per_step, request.num_samples)
    return {
        "records": records,
        "bytes": records * per_record + text,
        "stretches": len(stretches),
        "record_bytes": record,
        "modulation_bytes": modulation,
        **({"text_bytes": text} if text else {}),
    }


def _optimizer_state_bytes(sizes: Sequence[int], use_8bit_adam: bool, device: DeviceType) -> int:
    """Two moments per LoRA weight, in float32 or, for tensors that bitsandbytes quantises, in 8 bits."""
    total = 0
    for count in sizes:
        if use_8bit_adam and count >= MIN_8BIT_SIZE:
            total += 2 * (rounded(count, device) + rounded(4 * -(-count // BLOCK_8BIT_SIZE), device))
        else:
            total += 2 * rounded(4 * count, device)
    return total


def _bytes(usage: Usage) -> dict[str, int]:
    return {
        "peak_device_bytes": usage.peak_bytes,
        "peak_reserved_bytes": usage.reserved_bytes,
        "parameter_bytes": usage.parameter_bytes,
        "activation_bytes": usage.activation_bytes,
        "lora_optimizer_bytes": usage.lora_bytes,
    }


def _stage(name: str, usage: Usage, batch_size: int, vae: Usage | None = None) -> dict[str, Any]:
    """A stage of the plan.

    Args:
        name: The stage.
        usage: What a step of it needs.
        batch_size: Samples of a step.
        vae: The part of it that is the VAE's.
    """
    return {
        "name": name,
        **_bytes(usage),
        "tflops_per_step": usage.product_flops / 1e12,
        "attention_tflops_per_step": usage.attention_flops / 1e12,
        "vae_tflops": (vae.product_flops + vae.attention_flops) / 1e12 if vae else 0.0,
        "batch_size": batch_size,
        "seconds": None,
        "simulated": True,
    }
