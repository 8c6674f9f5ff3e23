"""A plan as the text that a run starts with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..utils.formatting import format_bytes


DEVICES = {"cuda": "CUDA", "cpu": "CPUs", "mps": "MPS"}


def format_plan(
    plan: Mapping[str, Any],
    *,
    model: str | None = None,
    folder: str | None = None,
    outputs: Mapping[str, str] | None = None,
    besides: str = "context and allocator's gaps come on top",
) -> str:
    """The plan as the text a run starts with.

    Args:
        plan: From :func:`plan_run`.
        model: What the user calls the model.
        folder: Where a run writes.
        outputs: What will be written elsewhere, by description, with the place where.
        besides: What comes on top of the simulated memory, which is that of tensors.
    """
    skip, patch, records, fits = plan["skip"], plan["patch"], plan["residuals"], plan["fits"]
    kept = skip["blocks"] - skip["leading"] - skip["trailing"]
    bar = "□" * skip["leading"] + "■" * kept + "□" * skip["trailing"]
    lines = [] if model is None else [f"Model    {model}"]
    lines.append(f"Blocks   {bar}")
    if kept == skip["blocks"]:
        lines.append(f"         all {kept} blocks train")
    else:
        # All that a table says of itself is a long line, and in plan.json: here whose it is and what it rests on.
        origin = re.search(r" \((shipped, )?(\w+): (?:.*?(\d+ [\w -]+ x \d+ seeds))?", skip["table"] or "")
        source = skip["source"]
        if origin:
            basis = f": {origin[3].replace('class ', '')}" if origin[3] else f", {origin[2]}"
            source = ("shipped" if origin[1] else "own") + basis
        lines.append(
            f"         skipped (□): first {skip['leading']}, last {skip['trailing']} of {skip['blocks']}, "
            f"{skip['ratio']:.0%} ({source})"
        )
    if plan["quantization"]:
        lines.append(f"Weights  kept blocks' linear layers in {plan['quantization']}")
    if patch["mode"] == "none":
        lines.append(f"Patches  {patch['max']} px crops")
    else:
        placed = ", half placed as in the photo" if patch["positions"] == "photo" else ""
        sizes = f"{patch['max']} px" if patch["mode"] == "resize" else f"{patch['min']} to {patch['max']} px"
        lines.append(f"Patches  {patch['mode']}: {sizes}, trained at {patch['training_resolution']} px{placed}")
    columns = {
        "peak_device": "live",
        "peak_reserved": "reserved",
        "parameter": "weights",
        "lora_optimizer": "LoRA+opt.",
        "activation": "activ.",
    }
    if not plan["context_bytes"]:
        del columns["peak_reserved"]
    header = ("Simulated", *columns.values(), "TFLOP", "batch")
    rows = [header] + [
        (
            stage["name"],
            *(format_bytes(stage[f"{part}_bytes"]) for part in columns),
            f"{stage['tflops_per_step'] + stage['attention_tflops_per_step']:.3g}",
            f"{stage['batch_size']}" + (f" x {together}" if (together := stage.get("together", 1)) > 1 else ""),
        )
        for stage in plan["stages"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells))
    lines.append(f"         on {DEVICES[plan['device']]}; {_on_top(plan) or besides}")
    if any(stage.get("streamed") for stage in plan["stages"]):
        lines.append("         Large text encoders are read layer by layer, once per prompt.")
    if any(stage.get("vae_tiled") for stage in plan["stages"]):
        lines.append("         The VAE decodes images in tiles, blended where they meet.")
    lines += _disk(records, folder)
    if fits["ok"] is not None:
        verdict = "fits" if fits["ok"] else "does not fit"
        lines.append(f"Budget   {verdict} in {format_bytes(fits['budget_bytes'])}")
        if fits["reason"]:
            lines.append(f"         {fits['reason']}")
    for description, place in (outputs or {}).items():
        lines.append(f"Writes   {description}: {place}")
    return "\n".join(lines)


def _on_top(plan: Mapping[str, Any]) -> str | None:
    """What a device needs besides its tensors, where that is known."""
    if not plan["context_bytes"]:
        return None
    most = max(stage["needed_bytes"] for stage in plan["stages"])
    return f"{format_bytes(most)} must be free, {format_bytes(plan['context_bytes'])} of them for the context"


def _disk(records: Mapping[str, Any], folder: str | None) -> list[str]:
    """What the records take, and where a run writes."""
    if not records["records"]:
        return [] if folder is None else [f"Writes   into {folder}"]
    size, stretches = format_bytes(records["bytes"]), records["stretches"]
    most = format_bytes(-(-records["bytes"] // max(stretches, 1)))
    if folder is not None:
        return [f"Writes   into {folder}; {size} of records" + (f", {most} at a time" if stretches > 1 else "")]
    parts = f"{stretches} stretches of {most}" if stretches > 1 else "1 stretch"
    return [f"Disk     {records['records']} records, {size} in {parts}"]
