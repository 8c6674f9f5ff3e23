"""Charts of the report page: matplotlib's SVG in the page's colours, and the numbers that stand beside them."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


SIZES = {"wide": (1040, 290), "narrow": (358, 220)}
"""Width and height of each drawing in CSS pixels, by the class of its SVG; the page shows the one that fits."""
RANGES = ("kept", "other", "third", "fourth")
"""Colours of the page for the ranges of timesteps."""


@dataclass(frozen=True)
class LossCurve:
    """The finite losses of a run.

    Attributes:
        points: Step and loss.
        average: Mean of the last ``window`` losses at each of these steps.
        window: Steps of the moving average; it grows with the length of the run.
        missing: Number of steps without a finite loss.
    """

    points: list[tuple[int, float]]
    average: list[float]
    window: int
    missing: int

    @property
    def first(self) -> float:
        """The first average over a whole window."""
        return self.average[self.window - 1]

    @property
    def final(self) -> float:
        """The last average."""
        return self.average[-1]


def loss_curve(losses: Sequence[float | None]) -> LossCurve | None:
    """The curve of the losses of steps 1, 2, ...; ``None`` with fewer than two finite ones."""
    points = _finite(enumerate(losses, 1))
    if len(points) < 2:
        return None
    window, average = _moving_average([loss for _, loss in points])
    return LossCurve(points, average, window, len(losses) - len(points))


def draw_losses(curve: LossCurve) -> str:
    """SVG of the loss of each step and its moving average, lines ``raw`` and ``average``."""
    steps, values = zip(*curve.points)
    # A few spikes would flatten everything else, so the scale leaves out the highest half percent of a long run.
    high = max(np.quantile(values, 0.995), *curve.average[curve.window :]) if len(values) >= 200 else max(values)
    lines = {"raw": (curve.points, "raw", 1.0), "average": (list(zip(steps, curve.average)), "kept", 2.5)}
    return _draw("loss", lines, "step", limits=_limits(min(values), float(high)))


def draw_losses_by_timestep(losses: Mapping[str, Sequence[tuple[int, float]]]) -> tuple[str, dict[str, str]]:
    """SVG of the moving averages of the loss in ranges of timesteps.

    Args:
        losses: Step and loss by range; not every step has samples of each.

    Returns:
        The SVG, and the colour of each range that has a line; both empty where no range has two finite losses.
    """
    lines = {}
    # From low to high, whichever a run saw first.
    for name, colour in zip(sorted(losses, key=lambda name: (name.find("-"), name)), RANGES):
        points = losses[name]
        finite = _finite(points)
        if len(finite) > 1:
            _, average = _moving_average([loss for _, loss in finite])
            lines[name] = ([(step, mean) for (step, _), mean in zip(finite, average)], colour, 2.0)
    if not lines:
        return "", {}
    means = [mean for points, _, _ in lines.values() for _, mean in points]
    svg = _draw("timesteps", lines, "step", limits=_limits(min(means), max(means)))
    return svg, {name: colour for name, (_, colour, _) in lines.items()}


def draw_harm(curves: Mapping[str, Sequence[float]], chosen: Mapping[str, int]) -> str:
    """SVG of the harm of masking 0, 1, ... blocks of either end, with a dot on the chosen numbers.

    Args:
        curves: Harm by the number of blocks, of the ends ``leading`` and ``trailing``.
        chosen: Number of skipped blocks of each end.

    Returns:
        The SVG; empty where nothing was measured.
    """
    colours = {"leading": "other", "trailing": "kept"}
    lines = {end: (list(enumerate(curve)), colours[end], 2.0) for end, curve in curves.items() if len(curve) > 1}
    dots = {end: points[chosen[end]] for end, (points, _, _) in lines.items() if 0 < chosen.get(end, 0) < len(points)}
    if not lines:
        return ""
    limits = _limits(0.0, max(harm for points, _, _ in lines.values() for _, harm in points))
    return _draw("harm", lines, "blocks masked from that end", limits=limits, dots=dots)


def _draw(
    name: str,
    lines: Mapping[str, tuple[Sequence[tuple[float, float]], str, float]],
    x_label: str,
    *,
    limits: tuple[float, float],
    dots: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """SVG of a line chart, once for each of `SIZES`.

    Args:
        name: Tells the identifiers in this chart from those in the page's other charts.
        lines: Points, colour and width in pixels of each line; its name becomes its class.
        x_label: What the horizontal axis counts.
        limits: Ends of the vertical axis; what is beyond them is cut off.
        dots: A marked point of some lines.
    """
    # Imported here, because only the page of a run needs it; the log of its font cache is no concern of a run.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawings = []
    for size, (width, height) in SIZES.items():
        with rc_context({**_STYLE, "svg.hashsalt": f"{name} {size}"}):
            figure = Figure(figsize=(width / 72, height / 72))
            axes = figure.add_axes((44 / width, 48 / height, 1 - 60 / width, 1 - 60 / height), frameon=False)
            axes.grid(axis="y", color=_stand_in("rule"), linewidth=1)
            axes.tick_params(length=0, pad=8, labelcolor=_stand_in("soft"))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_ROUND))
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_ROUND))
            axes.set_xlabel(x_label, loc="right", color=_stand_in("soft"))
            for line, (points, colour, thickness) in lines.items():
                axes.plot(*zip(*points), color=_stand_in(colour), linewidth=thickness, gid=line)
                if dots and line in dots:
                    fill, edge = _stand_in(colour), _stand_in("page")
                    axes.plot(*dots[line], "o", gid=f"{line}-dot", clip_on=False, ms=12, mew=2, mfc=fill, mec=edge)
            axes.margins(x=0)
            axes.set_ylim(*limits)
            drawings.append(_inline(figure, size))
    return "".join(drawings)


def _inline(figure: Any, size: str) -> str:
    """A figure as an SVG element for an HTML page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    # What is above the element, and a style sheet that would reach out of it, have no place in a page.
    svg = re.sub(
        r"^.*?(?=<svg)|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", file.getvalue(), flags=re.DOTALL
    )
    # A tenth of a pixel is enough for coordinates; the labels between the tags keep their digits.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]).replace("\n", ""), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    # Identifiers of groups are not unique in a page of several charts, and nothing refers to them.
    svg = re.sub(r'<g id="([^"]*)"', r'<g class="\1"', svg)
    svg = re.sub(r"#fe00(..)", lambda colour: f"var(--{_COLOURS[int(colour[1], 16)]})", svg)
    return svg.replace("<svg", f'<svg class="{size}" aria-hidden="true"', 1)


_COLOURS = ("page", "rule", "soft", "raw", *RANGES)
_ROUND = [1, 2, 2.5, 5, 10]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans"],
    # Of the points of a long run those that are less than a pixel apart.
    "path.simplify_threshold": 1.0,
}


def _stand_in(name: str) -> str:
    """A colour that stands for a variable of the page's style sheet, which has others in the dark."""
    return f"#fe00{_COLOURS.index(name):02x}"


def _finite(points: Any) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in points if loss is not None and math.isfinite(loss)]


def _moving_average(values: Sequence[float]) -> tuple[int, list[float]]:
    """The window, and the mean of the last values at each place."""
    window = min(len(values), max(5, len(values) // 20))
    sums = np.concatenate([np.zeros(window), np.cumsum(values)])
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return window, ((sums[window:] - sums[:-window]) / counts).tolist()


def _limits(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis that shows these values, begun with zero where that costs little of the height."""
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return 0.0 if 0 <= low < 0.4 * high else low - margin, high + margin
