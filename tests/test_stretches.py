"""Stretches: the grid of steps, and which records each step trains on."""

from __future__ import annotations

import pytest

from blockskip_hooks.residuals.stretches import Stretches, segments


def test_a_resumed_run_has_the_same_stretches():
    stretches = Stretches(num_steps=10, length=4)
    whole = [range(4), range(4, 8), range(8, 10)]
    assert [stretch for stretch, _ in stretches.following(0)] == whole and len(stretches) == 3
    assert list(stretches.following(5)) == [(whole[1], 5), (whole[2], 8)]
    assert list(stretches.following(10)) == []


def test_without_repeats_every_step_has_records_of_its_own():
    stretches = Stretches(num_steps=10, length=4)
    assert [stretches.source(step) for step in range(10)] == list(range(10))
    assert stretches.num_recorded_steps == 10


@pytest.mark.parametrize(
    ("repeats", "sources", "recorded"),
    [
        (2, [0, 1, 0, 1, 4, 5, 4, 5, 8, 8], 5),
        (3, [0, 1, 0, 1, 4, 5, 4, 5, 8, 8], 5),
        (4, [0] * 4 + [4] * 4 + [8] * 2, 3),
    ],
)
def test_records_are_trained_on_again_in_order(repeats: int, sources: list[int], recorded: int):
    stretches = Stretches(num_steps=10, length=4, repeats=repeats)
    assert [stretches.source(step) for step in range(10)] == sources
    assert stretches.num_recorded_steps == recorded == len(set(sources))


def test_segments_end_at_the_multiples():
    assert list(segments(range(3, 11), 4)) == [range(3, 4), range(4, 8), range(8, 11)]
