"""Bootstrap intervals: what they are of, and that groups are drawn as wholes."""

from __future__ import annotations

import numpy as np
import pytest

from blockskip_hooks.evaluation.statistics import bootstrap


def test_the_interval_is_that_of_means_of_drawn_groups_and_members():
    values = {("dog", 0): 0.2, ("dog", 1): 0.4, ("cat", 0): 0.9, ("cat", 1): 0.7}
    generator = np.random.default_rng(7)
    table = np.array([[0.9, 0.7], [0.2, 0.4]])
    means = [
        np.mean([[row[generator.integers(2)] for _ in range(2)] for row in table[generator.integers(2, size=2)]])
        for _ in range(20000)
    ]
    mean, low, high = bootstrap(values)
    assert mean == 0.55
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)


def test_equal_values_have_no_interval_and_the_order_does_not_matter():
    assert bootstrap({(group, member): 0.5 for group in "ab" for member in range(3)}) == [0.5, 0.5, 0.5]
    values = {(group, member): member + 10 * (group == "b") for group in "ab" for member in range(3)}
    assert bootstrap(values) == bootstrap(dict(reversed(values.items())))


def test_alike_members_do_not_narrow_the_interval_of_their_groups():
    few = bootstrap({(str(group), 0): float(group) for group in range(4)})
    many = bootstrap({(str(group), member): float(group) for group in range(4) for member in range(50)})
    assert many[0] == few[0] == 1.5
    assert many[2] - many[1] == pytest.approx(few[2] - few[1], abs=0.3)


@pytest.mark.parametrize("values", [{}, {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 3.0}], ids=["none", "unequal"])
def test_groups_without_equally_many_values_are_refused(values: dict):
    with pytest.raises(ValueError, match="equally many"):
        bootstrap(values)
