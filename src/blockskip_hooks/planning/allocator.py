"""What CUDA's caching allocator reserves for a sequence of allocations, and what of a device is the context's.

The rules are those of torch's ``CUDACachingAllocator`` with default settings: sizes are rounded up to 512 bytes; up to
1 MiB comes out of segments of 2 MiB, less than 10 MiB out of segments of 20 MiB, more out of segments of whole 2 MiB;
the smallest free piece that is large enough is taken and its rest stays free if that is worth keeping; free neighbours
are joined. With expandable segments each of the two pools is one segment that grows by pages.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .devices import CUDA_GRAIN


MIB = 2**20
SMALL, SMALL_SEGMENT, LARGE_SEGMENT, LARGE = MIB, 2 * MIB, 20 * MIB, 10 * MIB

CONTEXT_BYTES = 300 * 10**6 + 8_519_680
"""Bytes that a process takes of a CUDA device beside what torch reserves: about 300 MB for the context with modules
loaded lazily (pytorch/pytorch#86509 measured 287 MB, #107667 says 300), and cuBLAS' workspace (32 MiB on Hopper, 8 on
others). Kernels that are loaded while they run come on top."""


@dataclass(frozen=True)
class Trace:
    """The allocations of a piece of work.

    Attributes:
        resident: Bytes of each tensor that is there before.
        events: Number and bytes of each allocation, in order; the number and 0 where it is freed. What is not freed is
            so after the work.
        elsewhere: Bytes of ``resident`` that are on other devices.
    """

    resident: tuple[int, ...] = ()
    events: Sequence[tuple[int, int]] = ()
    elsewhere: int = 0

    def beside(self, num_bytes: Iterable[int]) -> Trace:
        """The same work while more is resident; negative numbers are taken off."""
        sizes = list(num_bytes)
        more = tuple(size for size in sizes if size > 0)
        return Trace(self.resident + more, self.events, self.elsewhere - sum(size for size in sizes if size < 0))


class _Piece:
    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size, self.free = address, size, False
        self.before: _Piece | None = None
        self.after: _Piece | None = None


class CachingAllocator:
    """The book-keeping of the allocator for one stream.

    Args:
        expandable: Whether segments grow (``expandable_segments:True``).

    Attributes:
        reserved: Bytes of all segments; none is ever given back.
    """

    def __init__(self, expandable: bool = False) -> None:
        self.reserved = 0
        self._expandable = expandable
        # Free pieces of the small and of the large pool, by size and then by address.
        self._free: dict[bool, list[tuple[int, int, _Piece]]] = {True: [], False: []}
        self._last: dict[bool, _Piece] = {}
        self._next_address = 0

    def allocate(self, num_bytes: int) -> tuple[bool, _Piece]:
        """Take a piece; what it returns is for :meth:`release`."""
        size = max(CUDA_GRAIN, -(-num_bytes // CUDA_GRAIN) * CUDA_GRAIN)
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size, 0))
        piece = free.pop(place)[2] if place < len(free) else self._grown(size, small)
        piece.free = False
        rest = piece.size - size
        if rest >= CUDA_GRAIN if small or self._expandable else rest > SMALL:
            other = _Piece(piece.address + size, rest)
            piece.size, other.before, other.after = size, piece, piece.after
            if piece.after is not None:
                piece.after.before = other
            piece.after = other
            if self._last.get(small) is piece:
                self._last[small] = other
            self._put(other, small)
        return small, piece

    def release(self, taken: tuple[bool, _Piece]) -> None:
        """Give a piece back to its pool."""
        small, piece = taken
        before, after = piece.before, piece.after
        if after is not None and after.free:
            self._take(after, small)
            self._join(piece, after, small)
        if before is not None and before.free:
            self._take(before, small)
            self._join(before, piece, small)
            piece = before
        self._put(piece, small)

    def _grown(self, size: int, small: bool) -> _Piece:
        """A piece that is large enough, in a new segment or at the end of the one that grows."""
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        last = self._last.get(small) if self._expandable else None
        if last is not None:
            held = last.size if last.free else 0
            added = -(-(size - held) // page) * page
            self.reserved += added
            if last.free:
                self._take(last, small)
                last.size += added
                return last
            piece = _Piece(last.address + last.size, added)
            piece.before, last.after = last, piece
        else:
            segment = -(-size // page) * page if self._expandable or size < LARGE else -(-size // (2 * MIB)) * 2 * MIB
            self.reserved += segment
            piece = _Piece(self._next_address, segment)
            # Segments are no neighbours of each other.
            self._next_address += 2**50
        if self._expandable:
            self._last[small] = piece
        return piece

    def _join(self, first: _Piece, second: _Piece, small: bool) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._last.get(small) is second:
            self._last[small] = first

    def _put(self, piece: _Piece, small: bool) -> None:
        piece.free = True
        insort(self._free[small], (piece.size, piece.address, piece))

    def _take(self, piece: _Piece, small: bool) -> None:
        free = self._free[small]
        del free[bisect_left(free, (piece.size, piece.address))]
        piece.free = False


def reserved_bytes(trace: Trace, *, expandable: bool | None = None) -> int:
    """Bytes that are reserved after a piece of work was done twice: the second finds pieces that the first one left.

    Args:
        trace: Its allocations.
        expandable: Whether segments grow; by default as the environment says.
    """
    allocator = CachingAllocator(expandable_segments() if expandable is None else expandable)
    for size in trace.resident:
        allocator.allocate(size)
    for _ in range(2):
        taken = {}
        for number, size in trace.events:
            if size:
                taken[number] = allocator.allocate(size)
            else:
                allocator.release(taken.pop(number))
        for piece in taken.values():
            allocator.release(piece)
    return allocator.reserved - trace.elsewhere


def expandable_segments() -> bool:
    """Whether the environment asks torch for expandable segments."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return "expandable_segments:true" in settings.replace(" ", "").lower()
