"""What a finished plan says to the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..inference.generate import VaePlacement


def largest_stage(plan: dict[str, Any]) -> dict[str, Any]:
    """The stage of a plan that needs the most memory of a device, in its ``needed_bytes``."""
    return max(plan["stages"], key=lambda stage: stage["needed_bytes"])


class PlannedStage(NamedTuple):
    """How a stage works, by the plan.

    Attributes:
        batch_size: Samples or images per forward, which need no more memory than a training step; ``None`` where the
            plan has no such stage.
        together: Forwards in step, for which a skipped block is read once.
        vae: How the VAE works.
    """

    batch_size: int | None = None
    together: int = 1
    vae: VaePlacement = VaePlacement()


def planned_stage(plan: Mapping[str, Any], name: str) -> PlannedStage:
    """What a plan says to the stage of this name."""
    stage: dict[str, Any] = next((stage for stage in plan["stages"] if stage["name"] == name), {})
    vae = VaePlacement(alone=stage.get("vae_alone", False), tiled=stage.get("vae_tiled", False))
    return PlannedStage(stage.get("batch_size"), stage.get("together", 1), vae)


def sends_ahead(plan: dict[str, Any]) -> bool:
    """Whether the plan has room on the device for a second skipped block, which is sent while one runs."""
    return any(stage.get("sends_ahead", False) for stage in plan["stages"])


def streams_text(plan: dict[str, Any]) -> bool:
    """Whether the plan has large text encoders read from the checkpoint layer by layer."""
    return any(stage.get("streamed", False) for stage in plan["stages"])
