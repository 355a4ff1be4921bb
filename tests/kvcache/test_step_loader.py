"""A load that is part of a step: each layer has come before it is computed with, what differs is said at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from core.clock import SystemClock
from core.errors import TransferError
from kvcache import step_loader
from kvcache.arena import Arena, MappedArena, Share, slot_bytes
from kvcache.copiers import Copiers
from kvcache.orders import Load, Loaded, Piece
from kvcache.step_loader import StepLoader
from tests.kvcache.places import BLOCK_BYTES, LAYER_BYTES, LAYERS, Engine, key, stored
from transport.faultpoint import FaultPoint
from transport.mapping import Mapping, make_memfd

NUM_BLOCKS = 16
COUNT = 7
"""Blocks 0 to 6 lie in the arena; they are loaded into blocks 8 to 14."""


class Kept:
    """An engine, an arena with its first blocks, and a loader; with `num_threads` 1 nobody helps."""

    def __init__(self, num_threads: int) -> None:
        self.engine = Engine(NUM_BLOCKS)
        num_bytes = NUM_BLOCKS * BLOCK_BYTES
        fd = make_memfd(num_bytes)
        self.memory = Mapping(fd, num_bytes)
        self.arena = Arena(self.engine.regions, lambda: (os.dup(fd), num_bytes, "arena"))
        mapped = self.arena.map()
        os.close(fd)
        self.pieces = stored(self.engine, mapped, COUNT)
        self.copiers = Copiers(num_threads)
        self.loader = StepLoader(self.arena, LAYERS, self.copiers, SystemClock(), FaultPoint())

    def step(self, layers: range = range(LAYERS), load: Load | None = None) -> Loaded:
        """A forward pass that computes these layers and looks at each when it is told that it has come."""
        self.loader.order([load or Load("r", "arena", self.pieces, in_step=True)])
        self.loader.begin()
        for layer in layers:
            self.loader.wait_for(layer)
            if load is None:
                self.check(layer)
        (loaded,) = self.loader.end()
        assert loaded.in_step
        return loaded

    def check(self, layer: int) -> None:
        part = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
        for number in range(COUNT):
            assert self.engine.block(8 + number)[part] == self.engine.block(number)[part], (layer, number)

    def close(self) -> None:
        self.copiers.close()
        self.memory.close()


@pytest.fixture(params=[1, 2, 4])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Two blocks of a layer are one task."""
    monkeypatch.setattr(step_loader, "TASK_BYTES", 2 * LAYER_BYTES)
    kept = Kept(request.param)
    yield kept
    kept.close()


def test_each_layer_is_in_place_when_it_is_computed_with(kept: Kept) -> None:
    for _ in range(20):
        loaded = kept.step()
        assert (loaded.why, loaded.num_blocks, loaded.num_bytes) == ("", COUNT, COUNT * BLOCK_BYTES)
        assert loaded.tokens == {"host": COUNT * 128}
        for number in range(COUNT):
            kept.engine.fill(8 + number, 99)


def test_a_slow_helper_is_waited_for(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    read, me = MappedArena.read_layer, threading.get_ident()

    def slowly(self: MappedArena, layer: int, block_id: int, offset: int) -> int:
        if threading.get_ident() != me:
            time.sleep(0.02)
        return read(self, layer, block_id, offset)

    monkeypatch.setattr(MappedArena, "read_layer", slowly)
    loaded = kept.step()
    assert loaded.why == ""
    assert loaded.waited_s > 0


def test_the_block_in_which_the_step_goes_on_writing_is_whole_before_the_first_layer(kept: Kept) -> None:
    """vLLM writes a layer's new keys and values before it asks for the layer: nothing may come over them then."""
    kept.loader.order([Load("r", "arena", kept.pieces, in_step=True)])
    kept.loader.begin()
    last = 8 + COUNT - 1
    assert kept.engine.block(last) == kept.engine.block(COUNT - 1)
    written = kept.engine.fill(last, 77)
    for layer in range(LAYERS):
        kept.loader.wait_for(layer)
    (loaded,) = kept.loader.end()
    assert (loaded.why, kept.engine.block(last)) == ("", written)


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_flipped_bit_anywhere_is_found_by_the_steps_end(kept: Kept, number: int, layer: int) -> None:
    kept.memory._mmap[number * BLOCK_BYTES + layer * LAYER_BYTES + 5] ^= 1
    loaded = kept.step(load=Load("r", "arena", kept.pieces, in_step=True))
    assert "differs" in loaded.why
    assert [bad.key for bad in loaded.bad] == [key(number)]


def test_a_layer_that_was_computed_without_asking_spoils_the_load(kept: Kept) -> None:
    assert "without asking" in kept.step(layers=range(LAYERS - 1)).why
    assert kept.step().why == "", "the next one is whole again"


def test_no_load_of_an_arena_that_is_not_mapped_is_waited_for(kept: Kept) -> None:
    loaded = kept.step(load=Load("r", "another arena", kept.pieces, in_step=True))
    assert "not mapped" in loaded.why


def test_a_step_that_never_began_its_loads_says_so(kept: Kept) -> None:
    kept.loader.order([Load("r", "arena", kept.pieces, in_step=True)])
    (loaded,) = kept.loader.end()
    assert loaded.why
    assert kept.loader.end() == []


@pytest.mark.parametrize("broken", range(8, 8 + COUNT))
def test_nobody_copies_any_more_when_the_step_is_over_also_where_a_copy_failed(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    read, num_copies = MappedArena.read_layer, [0]

    def slowly(self: MappedArena, layer: int, block_id: int, offset: int) -> int:
        if block_id == broken:
            raise TransferError("lies outside the arena")
        time.sleep(0.002)
        num_copies[0] += 1
        return read(self, layer, block_id, offset)

    monkeypatch.setattr(MappedArena, "read_layer", slowly)
    loaded = kept.step(load=Load("r", "arena", kept.pieces, in_step=True))
    if broken < 8 + COUNT - 1:  # the last block is read whole
        assert loaded.why == "lies outside the arena"
    num_ended = num_copies[0]
    time.sleep(0.03)
    assert num_copies[0] == num_ended


def test_a_single_block_is_a_load_too(kept: Kept) -> None:
    loaded = kept.step(load=Load("r", "arena", kept.pieces[:1], in_step=True))
    assert (loaded.why, loaded.num_blocks) == ("", 1)
    assert kept.engine.block(8) == kept.engine.block(0)


def test_each_rank_compares_its_own_part() -> None:
    """Both copy from one slot; the second rank's part is flipped, and only that rank says so."""
    engines = [Engine(4), Engine(4)]
    num_bytes = slot_bytes(BLOCK_BYTES, 2)
    fd = make_memfd(num_bytes)
    memory = Mapping(fd, num_bytes)
    arenas = []
    parts = []
    for rank, engine in enumerate(engines):
        arena = Arena(engine.regions, lambda: (os.dup(fd), num_bytes, "arena"), Share(rank, 2))
        mapped = arena.map()
        engine.fill(0, rank)
        part = mapped.first_summand(key(0)) + sum(mapped.write_layer(layer, 0, 0) for layer in range(LAYERS))
        mapped.seal(0, part % (1 << 64))
        arenas.append(arena)
        parts.append(part)
    os.close(fd)
    load = Load("r", "arena", [Piece(1, 0, key(0), sum(parts) % (1 << 64), "host", 1)] * 2, in_step=True)
    for flips, expected in ((False, ["", ""]), (True, ["", "differs"])):
        if flips:
            memory._mmap[BLOCK_BYTES + 9] ^= 1
        for arena, what in zip(arenas, expected, strict=True):
            copiers = Copiers(2)
            loader = StepLoader(arena, LAYERS, copiers, SystemClock(), FaultPoint())
            loader.order([load])
            loader.begin()
            for layer in range(LAYERS):
                loader.wait_for(layer)
            (loaded,) = loader.end()
            copiers.close()
            assert bool(loaded.why) == bool(what)
            assert what in loaded.why
    memory.close()
