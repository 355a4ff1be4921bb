"""What `baton bench transfer` moves, and how often: payloads of one model, cut off where memory ends. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from benchmarks.kv_models import KVModel
from benchmarks.kv_pool import PoolShape

GRAINS = ("end", "layer")
KV_BYTES_PER_S = 1.5e9
"""How fast a layer's KV is computed where each layer is written when it is there: 8 B parameters at 11,000 tokens/s."""

_REPEATS = ((8e6, 100), (64e6, 15), (400e6, 7))
_FEWEST_REPEATS = 5
_BURST_BYTES = 8e6
_BURST = 10


class Sweep(msgspec.Struct, frozen=True):
    """blocks: payloads; 0 is one block of one layer. pairs: how many at the same time. memory_bytes: of one cache.
    repeats: of every payload; 0: the fewer, the larger it is. seconds: for all of it; 0: as long as it takes."""

    blocks: tuple[int, ...]
    grains: tuple[str, ...]
    pairs: tuple[int, ...]
    block_size: int
    memory_bytes: int
    repeats: int = 0
    seconds: float = 0.0


class Cell(msgspec.Struct, frozen=True):
    """One payload of one model, moved in one way. num_blocks 0: one block of one layer."""

    model: str
    num_blocks: int
    num_layers: int
    num_bytes: int
    grain: str
    num_pairs: int
    repeats: int

    @property
    def layer_s(self) -> float:
        """How long each layer is computed."""
        return self.num_bytes / self.num_layers / KV_BYTES_PER_S if self.grain == "layer" else 0.0

    @property
    def burst(self) -> int:
        """How many are timed in one turn of a system."""
        return min(_BURST, self.repeats) if self.num_bytes <= _BURST_BYTES else 1

    @property
    def num_turns(self) -> int:
        """Of each system."""
        return -(-self.repeats // self.burst)

    @property
    def weight(self) -> float:
        """Of its samples in the progress bar: about seconds."""
        return (self.repeats + 1) * (0.01 + self.num_bytes * self.num_pairs / 1.5e9)


def pool_shape(model: KVModel, sweep: Sweep) -> PoolShape:
    """As many blocks as the memory holds."""
    num_blocks = max(sweep.memory_bytes // model.block_bytes(sweep.block_size), 1)
    return PoolShape(model.num_layers, model.piece_bytes(sweep.block_size), num_blocks)


def cells_of(model: KVModel, sweep: Sweep, num_pairs: int) -> list[Cell]:
    """Every payload that fits, first at the end of the prompt, then layer by layer."""
    return list(_cells(model, sweep, num_pairs))


def left_out(model: KVModel, sweep: Sweep) -> list[str]:
    """What does not fit, for people."""
    shape = pool_shape(model, sweep)
    missing = [count for count in sweep.blocks if count > shape.num_blocks]
    if not missing:
        return []
    need = max(missing) * model.block_bytes(sweep.block_size) / 2**30
    blocks = ", ".join(f"{count:,}" for count in missing)
    return [f"{model.name}: {blocks} blocks do not fit into the memory of a cache; --memory {need:.0f}GiB would do"]


def _cells(model: KVModel, sweep: Sweep, num_pairs: int) -> Iterator[Cell]:
    shape = pool_shape(model, sweep)
    for grain in sweep.grains:
        for count in sweep.blocks:
            num_layers = model.num_layers if count else 1
            if count > shape.num_blocks or (grain == "layer" and num_layers == 1):
                continue
            num_bytes = max(count, 1) * num_layers * shape.piece_bytes
            yield Cell(model.name, count, num_layers, num_bytes, grain, num_pairs, sweep.repeats or _repeats(num_bytes))


def _repeats(num_bytes: int) -> int:
    return next((count for limit, count in _REPEATS if num_bytes <= limit), _FEWEST_REPEATS)
