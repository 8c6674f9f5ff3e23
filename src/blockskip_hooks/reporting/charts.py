"""Line charts for the report page: SVG paths in a frame of fixed units, ticks and marks by percent of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles


# Size of a chart in its own units; the page stretches it.
WIDTH, HEIGHT = 1000, 300
POINTS = 1200

Points = Sequence[tuple[float, float]]
Tick = tuple[str, float]
"""A label and its place in percent of the frame, from the left or from the top."""


@dataclass(frozen=True)
class Chart:
    """What the page draws.

    Attributes:
        paths: Each line by its name, as the ``d`` of an SVG path within `WIDTH` x `HEIGHT`.
        x_ticks: Along the bottom.
        y_ticks: Along the left.
        marks: Points that stand out, each with the name of its line and its place in percent.
    """

    paths: dict[str, str]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[tuple[str, float, float]] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class LossChart:
    """The loss of each step, and its moving average.

    Attributes:
        chart: Lines ``raw`` and ``average``.
        window: Steps of the average.
        first: The first average over a whole window.
        final: The last one.
        missing: Steps that are left out, because their loss is not finite.
    """

    chart: Chart
    window: int
    first: float
    final: float
    missing: int


def loss_chart(losses: Sequence[float | None]) -> LossChart | None:
    """The losses of steps 1, 2, ...; ``None`` with fewer than two finite ones."""
    points = [(float(step), loss) for step, loss in enumerate(losses, 1) if loss is not None and math.isfinite(loss)]
    if len(points) < 2:
        return None
    values = [loss for _, loss in points]
    window, average = _moving_average(values)
    # A few spikes would flatten everything else, so the scale leaves out the highest half percent.
    low, high = min(values), max(quantiles(values, n=200)[-1], max(average)) if len(values) >= 200 else max(values)
    chart = line_chart(
        {"raw": points, "average": [(step, mean) for (step, _), mean in zip(points, average)]},
        x_range=(1, len(losses)),
        y_range=_from_zero(low, high),
    )
    return LossChart(chart, window, average[window - 1], average[-1], len(losses) - len(points))


def timestep_chart(losses: Mapping[str, Sequence[tuple[int, float]]]) -> Chart | None:
    """Moving averages of the loss in ranges of timesteps, lines ``range-0``, ``range-1``, ... in the given order.

    Args:
        losses: Step and loss by range; not every step has samples of each.

    Returns:
        The chart, or ``None`` where no range has two losses at different steps.
    """
    lines = {}
    for number, points in enumerate(losses.values()):
        finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
        if len(finite) > 1:
            _, average = _moving_average([loss for _, loss in finite])
            lines[f"range-{number}"] = [(float(step), mean) for (step, _), mean in zip(finite, average)]
    steps = [step for line in lines.values() for step, _ in line]
    if not steps or min(steps) == max(steps):
        return None
    means = [mean for line in lines.values() for _, mean in line]
    return line_chart(lines, x_range=(min(steps), max(steps)), y_range=_from_zero(min(means), max(means)))


def harm_chart(curves: Mapping[str, Sequence[float]], chosen: Mapping[str, int]) -> Chart | None:
    """The harm of masking 0, 1, ... blocks of either end, with the chosen numbers marked.

    Args:
        curves: Harm by the number of blocks, of each end.
        chosen: How many blocks of each end are skipped.

    Returns:
        The chart, or ``None`` where nothing was measured.
    """
    lines = {end: list(enumerate(curve)) for end, curve in curves.items() if len(curve) > 1}
    if not lines:
        return None
    marks = {end: line[chosen[end]] for end, line in lines.items() if 0 < chosen.get(end, 0) < len(line)}
    return line_chart(
        lines,
        x_range=(0, max(len(line) for line in lines.values()) - 1),
        y_range=(0, max(value for line in lines.values() for _, value in line)),
        marks=marks,
    )


def line_chart(
    lines: Mapping[str, Points],
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    marks: Mapping[str, tuple[float, float]] | None = None,
) -> Chart:
    """Place lines in a frame. What is above or below the vertical range is drawn on its edge.

    Args:
        lines: Points of each line, by its name.
        x_range: First and last whole number of the horizontal axis, which differ.
        y_range: What the vertical axis shows at least.
        marks: A point of each line that is marked.
    """
    first, last = x_range
    y_ticks = _ticks(*y_range, 4)
    bottom, top = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - first) / (last - first), (top - min(max(y, bottom), top)) / (top - bottom)

    def path(points: Points) -> str:
        places = [place(x, y) for x, y in _thin(points)]
        return "M" + "L".join(f"{x * WIDTH:.1f} {y * HEIGHT:.1f}" for x, y in places)

    # The axis starts with its first number, and a label close to it would lie on top of its own.
    gap = 0.04 * (last - first)
    numbers = [first, *(tick for tick in _ticks(first, last, 5) if first + gap < tick <= last and tick.is_integer())]
    placed = {name: place(*point) for name, point in (marks or {}).items()}
    return Chart(
        paths={name: path(points) for name, points in lines.items()},
        x_ticks=[(f"{tick:,.0f}", 100 * (tick - first) / (last - first)) for tick in numbers],
        y_ticks=[(f"{tick:g}", 100 * (top - tick) / (top - bottom)) for tick in y_ticks],
        marks=[(name, 100 * x, 100 * y) for name, (x, y) in placed.items()],
    )


def _moving_average(values: Sequence[float]) -> tuple[int, list[float]]:
    """The window, which grows with the length of the run, and the mean of the last values at each place."""
    window = min(len(values), max(5, len(values) // 20))
    return window, [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _from_zero(low: float, high: float) -> tuple[float, float]:
    """The range, begun with zero where that costs little of the height."""
    return (0.0 if 0 <= low < 0.4 * high else low), high


def _thin(points: Points) -> Points:
    """At most `POINTS` points: the lowest and the highest of each bucket, so that spikes stay visible."""
    size = math.ceil(2 * len(points) / POINTS)
    if size <= 2:
        return points
    thinned: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        thinned += sorted(extremes)
    return thinned


def _ticks(low: float, high: float, intervals: int) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / intervals))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= span / intervals * 0.999)
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(final, first + 1) + 1)]


__all__ = ["Chart", "LossChart", "harm_chart", "line_chart", "loss_chart", "timestep_chart"]
