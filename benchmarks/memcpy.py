"""The yardstick: a plain memcpy of the same bytes in the same pieces, between two prefaulted shared mappings."""

from __future__ import annotations

import ctypes
import mmap
import random
import statistics
import time


class Yardstick:
    """Two buffers of `num_bytes`, touched once, and copies between them block by block in random order."""

    def __init__(self, num_bytes: int) -> None:
        self._maps = [mmap.mmap(-1, num_bytes) for _ in range(2)]
        self._arrays = [ctypes.c_char.from_buffer(each) for each in self._maps]
        self._addresses = [ctypes.addressof(array) for array in self._arrays]
        self._num_bytes = num_bytes
        for address in self._addresses:
            ctypes.memset(address, 1, num_bytes)

    def seconds(self, num_blocks: int, block_bytes: int, repeats: int = 5, seed: int = 0) -> float:
        """Median time to copy `num_blocks` blocks, each to another place. Blocks beyond the buffer wrap around."""
        room = self._num_bytes // block_bytes
        dice = random.Random(seed)
        order = list(range(room))
        dice.shuffle(order)
        source, target = self._addresses
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            for index in range(num_blocks):
                place = index % room
                ctypes.memmove(target + order[place] * block_bytes, source + place * block_bytes, block_bytes)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)
