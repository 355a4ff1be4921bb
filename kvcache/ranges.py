"""Which bytes of an arena are free: best fit over ranges, joined when they are given back.

Memory model: offsets only; no memory is touched. One size of block leaves no gaps; several sizes may.
Threading: none of its own.
"""

from __future__ import annotations

import bisect

ALIGNMENT = 4096


def aligned(num_bytes: int) -> int:
    """The size of the range that holds so many bytes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Ranges:
    """The free ranges of [0, num_bytes), sorted, never touching each other."""

    def __init__(self, num_bytes: int) -> None:
        self._offsets = [0] if num_bytes else []
        self._sizes = [num_bytes] if num_bytes else []
        self.free_bytes = num_bytes

    def take(self, num_bytes: int) -> int | None:
        """The offset of a range that is now used, out of the smallest free one that fits; None if none does."""
        fitting = [(size, index) for index, size in enumerate(self._sizes) if size >= num_bytes]
        if not fitting:
            return None
        _, index = min(fitting)
        offset = self._offsets[index]
        self._cut(index, offset, num_bytes)
        return offset

    def claim(self, offset: int, num_bytes: int) -> bool:
        """Makes one given range used; False if any of it is used already."""
        index = bisect.bisect_right(self._offsets, offset) - 1
        if num_bytes < 1 or index < 0 or offset + num_bytes > self._offsets[index] + self._sizes[index]:
            return False
        self._cut(index, offset, num_bytes)
        return True

    def give(self, offset: int, num_bytes: int) -> None:
        """Gives back a range that was taken or claimed."""
        index = bisect.bisect_right(self._offsets, offset)
        self._offsets.insert(index, offset)
        self._sizes.insert(index, num_bytes)
        self.free_bytes += num_bytes
        for left in (index, index - 1):
            if (
                0 <= left < len(self._offsets) - 1
                and self._offsets[left] + self._sizes[left] == self._offsets[left + 1]
            ):
                self._sizes[left] += self._sizes.pop(left + 1)
                del self._offsets[left + 1]

    def _cut(self, index: int, offset: int, num_bytes: int) -> None:
        before = offset - self._offsets[index]
        after = self._sizes[index] - before - num_bytes
        pieces = [(at, size) for at, size in ((self._offsets[index], before), (offset + num_bytes, after)) if size]
        self._offsets[index : index + 1] = [at for at, _ in pieces]
        self._sizes[index : index + 1] = [size for _, size in pieces]
        self.free_bytes -= num_bytes
