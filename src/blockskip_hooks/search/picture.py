"""Pictures of a selection table: its curves, where in the model text matters, what a byte costs, and the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..selection import number_of_skipped
from ..utils.files import replacing
from ..utils.pictures import SheetRow, contact_sheet
from .masking_search import NOTHING, RATIOS, BlockRun, leading_run, trailing_run
from .tables import SelectionTable


GIB = 2**30
BYTES_PER_PARAMETER = 2


def draw_table(contents: Mapping[str, Any], table: SelectionTable, file: Path) -> None:
    """Write ``selection.png``: both curves with their spread, the heat map of windows, and the trade-off.

    Args:
        contents: Of ``selection.json``.
        table: The same, read.
        file: Where to.
    """
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    curves, heat, costs = figure.subplots(1, 3)
    _draw_curves(curves, contents)
    _draw_windows(heat, contents, figure)
    _draw_trade_off(costs, table, contents["block_parameters"])
    figure.suptitle(table.describe(), fontsize=10)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_curves(axes: Axes, contents: Mapping[str, Any]) -> None:
    for end, colour in (("leading", "tab:blue"), ("trailing", "tab:orange")):
        curve = contents["curves"][end]
        mean, spread = np.array(curve["mean"]), np.array(curve["subject_spread"])
        axes.fill_between(np.arange(len(mean)), mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot(mean, color=colour, label=f"{'first' if end == 'leading' else 'last'} blocks masked")
        measured = [0, *curve["measured"]]
        axes.plot(measured, mean[measured], ".", color=colour)
    axes.set(xlabel="blocks masked from that end", ylabel="D = 1 - cosine", title="Harm of masking either end")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Below: no place inside is free of every model's curves.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, title="mean ± deviation over subjects")


def _draw_windows(axes: Axes, contents: Mapping[str, Any], figure: Figure) -> None:
    axes.set(title="Harm of masking inner runs of blocks", xlabel="block", ylabel="blocks masked")
    windows = contents["windows"]
    lengths = sorted({window["length"] for window in windows})
    if not lengths:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    heat = np.full((len(lengths), contents["num_blocks"]), np.nan)
    for window in windows:
        # A run stands at its middle; with an even length that is the later of the two blocks.
        heat[lengths.index(window["length"]), window["first"] + window["length"] // 2] = window["mean"]
    # Each row has its own scale of harm, which the numbers say: longer runs always do more.
    largest = np.nanmax(heat, axis=1, keepdims=True)
    image = axes.imshow(heat / np.maximum(largest, 1e-12), aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(lengths)), [f"{n} (max {m:.2f})" for n, m in zip(lengths, largest[:, 0])])
    figure.colorbar(image, ax=axes, label="D / largest D of the row")


def _draw_trade_off(axes: Axes, table: SelectionTable, block_parameters: Sequence[int]) -> None:
    block_bytes = [BYTES_PER_PARAMETER * count for count in block_parameters]
    points = table.trade_off(block_bytes)
    freed = np.array([point.freed_bytes for point in points]) / GIB
    unit, factor = ("GiB", 1) if freed[-1] >= 0.1 else ("MiB", 1024)
    axes.plot(freed * factor, [point.harm for point in points], ".-", color="tab:green")
    for number, ratio in enumerate(RATIOS):
        # The pair that auto skips; of blocks of several sizes another one may free more.
        pair = table.point(table.pairs[number_of_skipped(ratio, table.num_blocks)], block_bytes)
        place = (pair.freed_bytes / GIB * factor, pair.harm)
        axes.plot(*place, "x", color="black")
        axes.annotate(
            f"{ratio:.0%}: {pair.leading}, {pair.trailing}",
            place,
            # Where a curve that rises is not, each above the one before: neighbours may lie close.
            (-4, 6 + 11 * number),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set(
        xlabel=f"{unit} of parameters freed, in 16 bits",
        ylabel="predicted harm, D[n] + D[m]",
        title="What skipping costs",
    )
    axes.set_ylim(bottom=0)


def masked_variants(num_blocks: int, pairs: Mapping[str, Sequence[int]]) -> dict[str, BlockRun]:
    """Columns of the grid of masked images: label and run of masked blocks."""
    third = max(num_blocks // 3, 1)
    leading, trailing = pairs[str(number_of_skipped(0.5, num_blocks))]
    half = {
        f"50 %: first {leading}": leading_run(leading),
        f"50 %: last {trailing}": trailing_run(trailing, num_blocks),
    }
    middle = (num_blocks - third) // 2
    return {
        "nothing masked": NOTHING,
        f"first {third}": leading_run(third),
        f"middle {third}": (middle, middle + third),
        f"last {third}": trailing_run(third, num_blocks),
        **{label: run for label, run in half.items() if run != NOTHING},
    }


def draw_images(rows: Mapping[str, Sequence[Image.Image]], labels: Sequence[str], file: Path) -> None:
    """Write the grid of masked images: one row for each subject, one column for each run of masked blocks.

    Args:
        rows: Images by subject, as many as labels.
        labels: What is masked in each column.
        file: The PNG.
    """
    contact_sheet([SheetRow(subject, images, labels) for subject, images in rows.items()], file, side=160)
