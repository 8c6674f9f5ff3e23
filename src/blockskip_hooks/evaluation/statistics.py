"""How sure a mean is: bootstrap intervals of values in groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..utils.errors import UserError


ROUNDS = 2000
"""Samples drawn; the same ones in every call."""


def bootstrap(values: Mapping[tuple[str, int], float]) -> list[float]:
    """Mean and the bounds of its bootstrap 95 % interval, groups drawn first and then members of each.

    Values of one group (images of one prompt, seeds of one subject) are more alike than others, so drawing all of them
    on their own would make the interval too narrow.

    Args:
        values: By group and member, equally many of every group.

    Raises:
        UserError: if there are no values, or not equally many of every group.
    """
    groups: dict[str, list[float]] = {}
    for (group, _), value in sorted(values.items()):
        groups.setdefault(group, []).append(value)
    if len({len(members) for members in groups.values()}) != 1:
        raise UserError("bootstrap needs values, and equally many in every group.")
    # A table (groups, members).
    sample = np.array(list(groups.values()))
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(sample), (ROUNDS, len(sample), 1))
    members = generator.integers(0, sample.shape[1], (ROUNDS, len(sample), sample.shape[1]))
    means = sample[drawn, members].mean((1, 2))
    return [round(float(v), 4) for v in (sample.mean(), *np.quantile(means, (0.025, 0.975)))]
