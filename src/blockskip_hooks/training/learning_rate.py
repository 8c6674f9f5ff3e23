"""What the learning rate of a run will do, told before its first step."""

from __future__ import annotations

from .settings import TrainSettings


MOST_WARMUP = 1 / 3
"""Part of a run that may pass in warm-up without a warning."""
# What each schedule of diffusers does once the rate is up.
_THEREAFTER = {
    "constant_with_warmup": "constant",
    "linear": "falls in a line to 0",
    "cosine": "falls as a cosine to 0",
    "cosine_with_restarts": "falls as a cosine to 0, {cycles} times",
    "polynomial": "falls to 1e-7 by the power {power:g}",
}


def warms_up(settings: TrainSettings) -> bool:
    """Whether the schedule has a warm-up: the one that is called constant has none."""
    return settings.lr_scheduler != "constant" and settings.lr_warmup_steps > 0


def describe_rate(settings: TrainSettings, num_steps: int, scale: int = 1) -> str:
    """The learning rate of a run in words: ``warms up for 100 of 500 steps to 1e-4, then constant``.

    Args:
        settings: The flags.
        num_steps: Optimiser steps of the run.
        scale: What ``--scale_lr`` multiplies the rate by.
    """
    warmup, peak = settings.lr_warmup_steps, settings.learning_rate * scale
    if settings.lr_scheduler == "constant":
        words = f"constant at {format_rate(peak)}"
        if warmup and "lr_warmup_steps" in settings.given:
            words += "; --lr_warmup_steps has no effect with constant"
    else:
        after = _THEREAFTER[settings.lr_scheduler].format(cycles=settings.lr_num_cycles, power=settings.lr_power)
        if not warms_up(settings):
            words = f"{format_rate(peak)}, {after}" if after != "constant" else f"constant at {format_rate(peak)}"
        elif warmup < num_steps:
            words = f"warms up for {warmup} of {num_steps} steps to {format_rate(peak)}, then {after}"
        else:
            reached = peak * (num_steps - 1) / warmup
            words = f"warms up for all {num_steps} steps, to {format_rate(reached)} of {format_rate(peak)}"
    if settings.optimizer.lower() == "prodigy":
        words += ", times what prodigy finds"
    if settings.train_text_encoder:
        words += f"; text encoder {format_rate(settings.text_encoder_lr)}"
    return words


def warn_of_warmup(settings: TrainSettings, num_steps: int) -> str | None:
    """A warning where the warm-up takes more than a third of the run."""
    warmup = settings.lr_warmup_steps
    if not warms_up(settings) or warmup <= MOST_WARMUP * num_steps:
        return None
    default = "" if "lr_warmup_steps" in settings.given else " (the default)"
    return (
        f"--lr_warmup_steps {warmup}{default} is more than a third of the run's {num_steps} steps, which train at a "
        f"lower rate than --learning_rate; give {num_steps // 10}, say."
    )


def format_rate(rate: float) -> str:
    """A rate as people write it: ``1e-4``, ``0.01``, ``1``."""
    if rate == 0 or rate >= 0.01:
        return f"{rate:.3g}"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
