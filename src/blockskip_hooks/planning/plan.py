"""What a finished plan says to the stages of a run."""

from __future__ import annotations

from typing import Any

from ..inference.generate import VaePlacement


def largest_stage(plan: dict[str, Any]) -> dict[str, Any]:
    """The stage of a plan that needs the most memory of a device, in its ``needed_bytes``."""
    return max(plan["stages"], key=lambda stage: stage["needed_bytes"])


def _stage(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """A stage of the plan; empty where there is none."""
    return next((stage for stage in plan["stages"] if stage["name"] == name), {})


def planned_batch_size(plan: dict[str, Any], stage: str) -> int | None:
    """Samples or images per forward of a stage, which need no more memory than a training step, by the plan."""
    return _stage(plan, stage).get("batch_size")


def planned_together(plan: dict[str, Any], stage: str) -> int:
    """Forwards of a stage in step, for which a skipped block is read once, by the plan."""
    return _stage(plan, stage).get("together", 1)


def sends_ahead(plan: dict[str, Any]) -> bool:
    """Whether the plan has room on the device for a second skipped block, which is sent while one runs."""
    return any(stage.get("sends_ahead", False) for stage in plan["stages"])


def planned_vae(plan: dict[str, Any], stage: str) -> VaePlacement:
    """How the VAE works in a stage, by the plan."""
    planned = _stage(plan, stage)
    return VaePlacement(alone=planned.get("vae_alone", False), tiled=planned.get("vae_tiled", False))


def streams_text(plan: dict[str, Any]) -> bool:
    """Whether the plan has large text encoders read from the checkpoint layer by layer."""
    return any(stage.get("streamed", False) for stage in plan["stages"])
