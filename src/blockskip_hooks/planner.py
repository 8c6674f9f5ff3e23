"""The plan of a run, made before anything is loaded: memory of every stage, FLOPs, disk (``plan.json``).

Every figure is simulated (see :mod:`~blockskip_hooks.simulation`): bytes of live tensors, without the allocator's
fragmentation and the device context. It is what the method bounds, not what a monitor of the whole process shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .config import BlockSkipConfig, PatchSamplingConfig
from .families import Family
from .hooks import SpanResiduals
from .monitor import format_bytes
from .simulation import FakeTransformer, Usage, simulate_text_encoder, simulate_vae


SCHEMA = 1
LARGEST_PRECOMPUTE_BATCH = 64
# bitsandbytes keeps the state of small tensors in float32 and one float32 scale per 256 values of the others.
MIN_8BIT_SIZE = 4096
BLOCK_8BIT_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan depends on; nothing of it needs weights.

    Attributes:
        family: The model's family.
        transformer_config: Config of the transformer, with its ``_class_name``.
        config: The spans to skip.
        patch: Patch sampling.
        batch_size: Samples per forward in training, class samples included.
        rank: Rank of the LoRA matrices.
        lora_targets: Full names of the layers that get LoRA.
        recorded_layers: Full names of the layers whose outputs are recorded with the residuals.
        text_tokens: Tokens of a prompt.
        weight_dtype: Dtype of the frozen weights; in half precision training runs under autocast.
        gradient_checkpointing: As the flag.
        gradient_accumulation_steps: As the flag; above 1 gradients stay between batches.
        use_8bit_adam: As the flag.
        cache_latents: Whether latents are computed before training even if nothing is skipped.
        precompute_batch_size: Samples per precompute forward; by default the largest power of two that needs no
            more memory than a training step.
        num_samples: Samples of the whole run, class samples included.
        residual_budget_bytes: Disk that the records may take at a time; ``None`` for no limit.
        text_encoders: Configs of the text encoders.
        text_encoder_parameter_bytes: Their weights, where their configs are not at hand.
        resident_bytes: Parameters of other models that stay during training, such as a text encoder that trains.
        validation_resolution: Side of validation images in pixels; ``None`` if there are none.
        validation_batch_size: Validation images made at a time.
        validation_extra_bytes: Parameters of other models that validation images need.
        class_batch_size: Class images made at a time, at most; ``None`` if there are none to make.
        class_resolution: Their side in pixels.
        memory_budget_bytes: What every stage must fit in; ``None`` for no limit.
        skip_source: Where the spans come from, for the plan's ``skip`` part.
        skip_table: Name of the selection table, for the same.
    """

    family: Family
    transformer_config: Mapping[str, Any]
    config: BlockSkipConfig
    patch: PatchSamplingConfig
    rank: int
    lora_targets: Sequence[str]
    recorded_layers: Sequence[str] = ()
    batch_size: int = 1
    text_tokens: int = 512
    weight_dtype: torch.dtype = torch.bfloat16
    gradient_checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    use_8bit_adam: bool = False
    cache_latents: bool = False
    precompute_batch_size: int | None = None
    num_samples: int = 0
    residual_budget_bytes: int | None = None
    text_encoders: Sequence[Mapping[str, Any]] = ()
    text_encoder_parameter_bytes: int = 0
    resident_bytes: int = 0
    validation_resolution: int | None = None
    validation_batch_size: int = 1
    validation_extra_bytes: int = 0
    class_batch_size: int | None = None
    class_resolution: int = 0
    memory_budget_bytes: int | None = None
    skip_source: str = "flag"
    skip_table: str | None = None

    @property
    def training_size(self) -> tuple[int, int]:
        """Height and width in pixels of the largest images in training."""
        shapes = (self.patch.training_shape(bucket) for bucket in range(len(self.patch.shapes)))
        return max(shapes, key=lambda shape: shape[0] * shape[1])

    @property
    def stores_residuals(self) -> bool:
        """Whether precompute runs the transformer."""
        return self.config.num_skipped > 0 and self.config.residuals == "precomputed"


def plan_run(request: PlanRequest) -> dict[str, Any]:
    """Simulate every stage of a run once.

    Args:
        request: The settings.

    Returns:
        The contents of ``plan.json``. In each stage, ``peak_device_bytes`` is the sum of ``parameter_bytes`` (frozen
        weights, with one streamed block), ``lora_optimizer_bytes`` and ``activation_bytes`` (with gradients alive at
        the peak). ``tflops_per_step`` counts matrix products of one forward (and backward) of ``batch_size``
        samples, ``attention_tflops_per_step`` the attention beside them.

    Raises:
        ValueError: if the spans leave no block, or the config names no model class.
    """
    family, size = request.family, request.training_size
    fake = FakeTransformer(
        family,
        request.transformer_config,
        request.config,
        rank=request.rank,
        lora_targets=request.lora_targets,
        dtype=request.weight_dtype,
        recorded_layers=request.recorded_layers,
    )
    num_blocks = len(fake.model.spans.kept) + request.config.num_skipped
    states = _optimizer_state_bytes(fake.lora_parameters, request.use_8bit_adam)
    residuals = SpanResiduals()
    capture = None
    if request.config.num_skipped and request.config.residuals != "none":
        online = request.config.residuals == "online"
        first_batch = request.batch_size if online else request.precompute_batch_size or 1
        capture, residuals = fake.capture(first_batch, size, request.text_tokens, with_adapters=online)
    train = fake.train(
        request.batch_size,
        size,
        request.text_tokens,
        residuals,
        gradient_checkpointing=request.gradient_checkpointing,
        accumulated_gradients=request.gradient_accumulation_steps > 1,
    ).beside(parameter_bytes=request.resident_bytes, lora_bytes=states)
    if capture is not None:
        # LoRA and its optimizer are there from the start of training; a later stretch finds them in the way.
        capture = capture.beside(parameter_bytes=request.resident_bytes, lora_bytes=states)

    vae = _Vae(request, base=replace(train, peak_bytes=train.parameter_bytes + train.lora_bytes))
    stages = []
    if request.text_encoders or request.text_encoder_parameter_bytes:
        stages.append(_stage("encode", _encode_text(request), 1))
    if request.stores_residuals:
        assert capture is not None
        batch_size, capture = _precompute_batch(request, fake, capture, train, vae, states)
        encode = vae.encode(batch_size)
        stages.append(
            _stage("precompute", encode.then(capture.beside(parameter_bytes=vae.parameter_bytes)), batch_size)
        )
    elif request.cache_latents:
        stages.append(_stage("precompute", vae.encode(1), 1))
    else:
        # Without records every step encodes its crops, so the VAE stays.
        if capture is not None:
            train = capture.then(train)
        train = vae.encode(request.batch_size).then(train.beside(parameter_bytes=vae.parameter_bytes))
    stages.append(_stage("train", train, request.batch_size))
    if request.class_batch_size is not None:
        images = request.class_batch_size
        usage = _make_images(request, fake, vae, images, request.class_resolution, states)
        while images > 1 and usage.peak_bytes > stages[-1]["peak_device_bytes"]:
            images //= 2
            usage = _make_images(request, fake, vae, images, request.class_resolution, states)
        stages.insert(0, _stage("class_images", usage, images))
    if request.validation_resolution is not None:
        images = request.validation_batch_size
        usage = _make_images(request, fake, vae, images, request.validation_resolution, states)
        stages.append(_stage("validate", usage, images))

    largest = max(stage["peak_device_bytes"] for stage in stages)
    budget = request.memory_budget_bytes
    return {
        "schema": SCHEMA,
        "skip": {
            "blocks": num_blocks,
            "leading": request.config.leading,
            "trailing": request.config.trailing,
            "ratio": round(request.config.num_skipped / num_blocks, 4),
            "source": request.skip_source,
            "table": request.skip_table,
        },
        "patch": {
            "mode": request.patch.mode,
            "min": request.patch.min_size,
            "max": request.patch.max_size,
            "training_resolution": request.patch.training_resolution,
        },
        "stages": stages,
        "residuals": _records(request, residuals),
        "fits": {"budget_bytes": budget, "ok": None if budget is None else largest <= budget, "reason": None},
    }


class _Vae:
    """The VAE's phases beside the resident transformer, each simulated at most once per batch size."""

    def __init__(self, request: PlanRequest, base: Usage) -> None:
        self._request = request
        self._base = base
        self._encodes = {1: self._simulate(1, request.training_size, decode=False)}
        self.parameter_bytes = self._encodes[1].parameter_bytes

    def encode(self, batch_size: int) -> Usage:
        """Crops at the training resolution to latents."""
        if batch_size not in self._encodes:
            self._encodes[batch_size] = self._simulate(batch_size, self._request.training_size, decode=False)
        return self._beside_transformer(self._encodes[batch_size])

    def decode(self, batch_size: int, size: tuple[int, int]) -> Usage:
        """Latents to images."""
        return self._beside_transformer(self._simulate(batch_size, size, decode=True))

    def _simulate(self, batch_size: int, size: tuple[int, int], *, decode: bool) -> Usage:
        return simulate_vae(self._request.family, batch_size, size, self._request.weight_dtype, decode=decode)

    def _beside_transformer(self, usage: Usage) -> Usage:
        return usage.beside(parameter_bytes=self._base.parameter_bytes, lora_bytes=self._base.lora_bytes)


def _make_images(request: PlanRequest, fake: FakeTransformer, vae: _Vae, images: int, side: int, states: int) -> Usage:
    """What the pipeline needs to make images, LoRA and optimizer state resident."""
    # A guided pipeline runs the prompt and the negative prompt in one batch, if not one after the other.
    batch_size = images if request.family.negative_prompt is None else 2 * images
    infer = fake.infer(batch_size, (side, side), request.text_tokens)
    infer = infer.beside(parameter_bytes=vae.parameter_bytes + request.resident_bytes, lora_bytes=states)
    usage = infer.then(vae.decode(images, (side, side)))
    return usage.beside(parameter_bytes=request.validation_extra_bytes)


def _precompute_batch(
    request: PlanRequest, fake: FakeTransformer, first: Usage, train: Usage, vae: _Vae, states: int
) -> tuple[int, Usage]:
    """The batch of precompute forwards, and what they need without the VAE.

    Weights are read once per batch, so more samples are faster; activations grow with them, and precompute should
    not need more than training does.
    """
    if request.precompute_batch_size is not None:
        return request.precompute_batch_size, first
    batch_size = 1
    limit = min(LARGEST_PRECOMPUTE_BATCH, max(request.num_samples, 1))
    # Activations grow in proportion to the batch, so one sample tells the largest batch.
    phases = (first.beside(parameter_bytes=vae.parameter_bytes), vae.encode(1))
    while 2 * batch_size <= limit and all(
        phase.parameter_bytes + phase.lora_bytes + 2 * batch_size * phase.activation_bytes <= train.peak_bytes
        for phase in phases
    ):
        batch_size *= 2
    if batch_size == 1:
        return 1, first
    usage, _ = fake.capture(batch_size, request.training_size, request.text_tokens)
    return batch_size, usage.beside(parameter_bytes=request.resident_bytes, lora_bytes=states)


def _encode_text(request: PlanRequest) -> Usage:
    """All text encoders are loaded together and run in turn, one prompt at a time."""
    usages = [simulate_text_encoder(c, 1, request.text_tokens, request.weight_dtype) for c in request.text_encoders]
    total = Usage(0, 0)
    parameter_bytes = request.text_encoder_parameter_bytes + sum(usage.parameter_bytes for usage in usages)
    for usage in usages:
        total = total.then(usage.beside(parameter_bytes=parameter_bytes - usage.parameter_bytes))
    return total if usages else Usage(parameter_bytes, parameter_bytes)


def _records(request: PlanRequest, residuals: SpanResiduals) -> dict[str, int]:
    """Disk of the residual store."""
    if not request.stores_residuals and not request.cache_latents:
        return {"records": 0, "bytes": 0, "stretches": 0, "record_bytes": 0, "modulation_bytes": 0}
    stored = residuals.tensors() if request.stores_residuals else {}
    sizes = {name: tensor[0].numel() * tensor.element_size() for name, tensor in stored.items()}
    modulation = sizes.pop("modulation", 0)
    record = math.prod(request.family.latent_shape(*request.training_size)) * request.weight_dtype.itemsize
    record += sum(sizes.values())
    # Samples of the same prompt and timestep share their modulation; at most, each has its own.
    per_record = record + modulation
    stretches = 1
    if request.residual_budget_bytes is not None:
        # A stretch holds whole steps.
        per_step = request.batch_size * request.gradient_accumulation_steps
        steps = max(1, request.residual_budget_bytes // (per_record * per_step))
        stretches = -(-request.num_samples // (steps * per_step))
    return {
        "records": request.num_samples,
        "bytes": request.num_samples * per_record,
        "stretches": stretches,
        "record_bytes": record,
        "modulation_bytes": modulation,
    }


def _optimizer_state_bytes(parameters: Sequence[torch.nn.Parameter], use_8bit_adam: bool) -> int:
    """Two moments per LoRA weight, in float32 or, for tensors that bitsandbytes quantises, in 8 bits."""
    total = 0
    for count in (parameter.numel() for parameter in parameters):
        if use_8bit_adam and count >= MIN_8BIT_SIZE:
            total += 2 * (count + 4 * -(-count // BLOCK_8BIT_SIZE))
        else:
            total += 2 * 4 * count
    return total


def _stage(name: str, usage: Usage, batch_size: int) -> dict[str, Any]:
    return {
        "name": name,
        "peak_device_bytes": usage.peak_bytes,
        "parameter_bytes": usage.parameter_bytes,
        "activation_bytes": usage.activation_bytes,
        "lora_optimizer_bytes": usage.lora_bytes,
        "tflops_per_step": usage.product_flops / 1e12,
        "attention_tflops_per_step": usage.attention_flops / 1e12,
        "batch_size": batch_size,
        "seconds": None,
        "simulated": True,
    }


def format_plan(plan: Mapping[str, Any], *, model: str | None = None, outputs: Mapping[str, str] | None = None) -> str:
    """The plan as the text a run starts with.

    Args:
        plan: From :func:`plan_run`.
        model: What the user calls the model.
        outputs: What will be written, by description, with the place where.
    """
    skip, patch, records, fits = plan["skip"], plan["patch"], plan["residuals"], plan["fits"]
    kept = skip["blocks"] - skip["leading"] - skip["trailing"]
    bar = "□" * skip["leading"] + "■" * kept + "□" * skip["trailing"]
    lines = [] if model is None else [f"Model    {model}"]
    lines.append(f"Blocks   {bar}")
    if kept == skip["blocks"]:
        lines.append(f"         all {kept} blocks train")
    else:
        source = skip["table"] or skip["source"]
        lines.append(
            f"         {kept} of {skip['blocks']} train (■); skipped (□): first {skip['leading']}, last "
            f"{skip['trailing']}, {skip['ratio']:.0%} ({source})"
        )
    if patch["mode"] == "none":
        lines.append(f"Patches  {patch['max']} px crops")
    else:
        sizes = f"{patch['max']} px" if patch["mode"] == "resize" else f"{patch['min']} to {patch['max']} px"
        lines.append(f"Patches  {patch['mode']}: {sizes}, trained at {patch['training_resolution']} px")
    header = ("Stage", "peak", "parameters", "LoRA+optim.", "activations", "TFLOP/step", "+attention", "batch")
    rows = [header] + [
        (
            stage["name"],
            *(
                format_bytes(stage[f"{part}_bytes"])
                for part in ("peak_device", "parameter", "lora_optimizer", "activation")
            ),
            f"{stage['tflops_per_step']:.3g}",
            f"{stage['attention_tflops_per_step']:.2g}",
            str(stage["batch_size"]),
        )
        for stage in plan["stages"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines.append("Memory and compute, simulated (bytes of live tensors; no time is predicted):")
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append(f"  {'  '.join(cells)}")
    if records["records"]:
        stretches = f"{records['stretches']} stretch" + ("es" if records["stretches"] != 1 else "")
        most = -(-records["bytes"] // max(records["stretches"], 1))
        at_once = "" if records["stretches"] <= 1 else f", about {format_bytes(most)} at a time"
        size = format_bytes(records["bytes"])
        lines.append(f"Disk     {records['records']} records, {size} in {stretches}{at_once} (simulated)")
    if fits["ok"] is not None:
        verdict = "fits" if fits["ok"] else "does not fit"
        lines.append(f"Budget   {verdict} in {format_bytes(fits['budget_bytes'])} (simulated)")
        if fits["reason"]:
            lines.append(f"         {fits['reason']}")
    for description, place in (outputs or {}).items():
        lines.append(f"Writes   {description}: {place}")
    return "\n".join(lines)
