"""The model of CUDA's caching allocator."""

from __future__ import annotations

import pytest

from blockskip_hooks.planning.allocator import MIB, CachingAllocator, Trace, reserved_bytes


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_have_the_sizes_of_their_pool(size: int, segment: int):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == segment


def test_the_smallest_free_piece_that_is_large_enough_is_used():
    allocator = CachingAllocator()
    large, small, wall = (allocator.allocate(size * MIB) for size in (30, 12, 14))
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(12 * MIB)[1] is small[1]
    # Of the large piece 18 MiB are left, which serve further requests; a piece that has no room does not.
    assert allocator.allocate(12 * MIB)[1] is large[1]
    assert allocator.reserved == 56 * MIB
    allocator.allocate(17 * MIB)
    assert allocator.reserved == 56 * MIB
    allocator.allocate(2 * MIB)
    assert allocator.reserved == 76 * MIB and not wall[1].free


def test_little_that_is_left_of_a_large_piece_is_not_split_off():
    allocator = CachingAllocator()
    allocator.allocate(20 * MIB - 512)
    allocator.allocate(MIB // 2)
    # The rest would have been in the pool of large pieces in any case.
    assert allocator.reserved == 22 * MIB
    _, piece = CachingAllocator().allocate(11 * MIB + 512)
    assert piece.size == 12 * MIB


def test_free_neighbours_are_joined():
    allocator = CachingAllocator()
    pieces = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for number in (0, 2, 1, 3):
        allocator.release(pieces[number])
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 20 * MIB


def test_expandable_segments_grow_where_others_are_added():
    """Three tensors that grow, each in the place of the one before."""
    events = [(1, 12 * MIB), (1, 0), (2, 24 * MIB), (2, 0), (3, 36 * MIB), (3, 0)]
    assert reserved_bytes(Trace((), events), expandable=False) == 72 * MIB
    assert reserved_bytes(Trace((), events), expandable=True) == 40 * MIB


def test_a_trace_begins_beside_what_is_resident(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.8, expandable_segments:True")
    trace = Trace((30 * MIB,), [(1, 10 * MIB)]).beside([10 * MIB, -20 * MIB])
    # Some of what is resident is on other devices. What is not freed is so before the work is done again.
    assert reserved_bytes(trace) == reserved_bytes(trace, expandable=True) == 40 * MIB
    assert reserved_bytes(trace, expandable=False) == 30 * MIB
