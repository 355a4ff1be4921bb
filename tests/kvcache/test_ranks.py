"""Tensor-parallel ranks keep their parts of a block in one slot: each writes its own, and takes none that is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from core.clock import ManualClock
from core.errors import TransferError
from core.layout import KVLayout
from engine.cache_side import part_bytes
from engine.ranks import OfAllRanks
from kvcache.arena import Arena, Share, block_digest, key_summand, slot_bytes
from kvcache.device_copies import DeviceWrites
from kvcache.orders import CacheResults, Loaded, Piece, Store, Stored
from kvcache.ranges import aligned
from kvcache.storer import Storer
from kvcache.wire import Written
from tests.kvcache.places import BLOCK_BYTES, LAYERS, Engine, key
from transport.faultpoint import FaultPoint
from transport.host_device import HostDevice
from transport.mapping import Mapping, make_memfd

RANKS = 2
SLOT = aligned(slot_bytes(BLOCK_BYTES, RANKS))
LAYOUT = KVLayout("model", "float32", LAYERS, 4, 64, 16, 65536, "LBHNC", "vec")


class Host:
    """Two ranks of an engine, and an arena of four slots that both map; device: in whose memory the engine's blocks
    lie."""

    def __init__(self, device: HostDevice | None = None) -> None:
        self.device = device
        self.clock = ManualClock()
        self.engines = [Engine() for _ in range(RANKS)]
        self.fd = make_memfd(4 * SLOT)
        self.memory = Mapping(self.fd, 4 * SLOT)
        self.arenas = [
            Arena(engine.regions, lambda: (os.dup(self.fd), 4 * SLOT, "arena"), Share(rank, RANKS), device)
            for rank, engine in enumerate(self.engines)
        ]
        self.mapped = [arena.map() for arena in self.arenas]

    def store(self, seconds: float = 0.0) -> CacheResults:
        """One step of both ranks, which takes so long for each, and what they answer together: block 1 into slot 1,
        which is ours for 100 seconds."""
        answers = []
        store = Store("r", "arena", 1, self.clock.monotonic_s() + 100.0, [Piece(1, SLOT, key(7))])
        for rank, arena in enumerate(self.arenas):
            writes = DeviceWrites(self.device, self.engines[rank].regions) if self.device is not None else None
            storer = Storer(arena, LAYERS, self.clock, FaultPoint(), writes)
            storer.begin_step([store])
            for layer in range(LAYERS):
                storer.save_layer(layer)
            self.clock.advance(seconds)
            answers.append(CacheResults())
            storer.end_step(answers[-1])
            storer.close()
        return answers[0].with_those_of(answers[1])

    def digest(self) -> int:
        """Stores block 1 of either engine, filled with 10 and 11, under key 7 in slot 1; returns the digest."""
        for rank, engine in enumerate(self.engines):
            engine.fill(1, 10 + rank)
        (stored,) = self.store().stored
        (written,) = stored.blocks
        return written.digest

    def reads(self, digest: int, number: int = 7) -> list[bool]:
        """Whether each rank finds its part to be of this block; it is read into block 5."""
        return [mapped.read_block(5, SLOT, key(number), digest) for mapped in self.mapped]

    def flip(self, at: int) -> None:
        """One bit of slot 1."""
        self.memory._mmap[SLOT + at] ^= 1

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@pytest.fixture(params=[None, HostDevice], ids=["processor", "device"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Whoever copies what is stored."""
    host = Host(request.param() if request.param else None)
    yield host
    host.close()


def test_each_rank_gets_its_own_part_back(host: Host) -> None:
    digest = host.digest()
    assert host.reads(digest) == [True, True]
    for rank, engine in enumerate(host.engines):
        assert engine.block(5) == engine.block(1) == engine.fill(2, 10 + rank)


def test_the_digest_is_that_of_a_block_of_all_ranks_layers(host: Host) -> None:
    """So whoever keeps blocks needs to know nothing of ranks."""
    digest = host.digest()
    parts = memoryview(bytes(host.memory._mmap[SLOT : SLOT + RANKS * BLOCK_BYTES]))
    assert digest == block_digest(key(7), parts, RANKS * LAYERS)


@pytest.mark.parametrize(
    ("at", "found"),
    [
        (0, [False, True]),
        (BLOCK_BYTES - 1, [False, True]),
        (BLOCK_BYTES, [True, False]),
        (RANKS * BLOCK_BYTES, [False, False]),
        (RANKS * BLOCK_BYTES + 8, [False, False]),
    ],
)
def test_a_flipped_bit_is_seen_by_the_rank_whose_part_it_is_in_and_of_the_table_by_all(
    host: Host, at: int, found: list[bool]
) -> None:
    digest = host.digest()
    host.flip(at)
    assert host.reads(digest) == found


def test_a_block_under_anothers_key_or_digest_is_nobodys(host: Host) -> None:
    digest = host.digest()
    assert host.reads(digest, number=8) == [False, True], "one rank that refuses is enough"
    wrong = digest - key_summand(key(7)) + key_summand(key(8))
    assert host.reads(wrong % (1 << 64), number=8) == [False, False]


def test_parts_that_changed_places_are_not_taken_for_each_other(host: Host) -> None:
    digest = host.digest()
    first = bytes(host.memory._mmap[SLOT : SLOT + BLOCK_BYTES])
    second = bytes(host.memory._mmap[SLOT + BLOCK_BYTES : SLOT + 2 * BLOCK_BYTES])
    host.memory._mmap[SLOT : SLOT + 2 * BLOCK_BYTES] = second + first
    assert host.reads(digest) == [False, False]


def test_a_slot_that_does_not_fit_whole_is_refused(host: Host) -> None:
    for mapped in host.mapped:
        with pytest.raises(TransferError, match="outside the arena"):
            mapped.read_block(1, 4 * SLOT - slot_bytes(BLOCK_BYTES, RANKS) + 1, key(7), 0)
        with pytest.raises(TransferError, match="outside the arena"):
            mapped.seal(4 * SLOT - slot_bytes(BLOCK_BYTES, RANKS) + 1, 0)


def test_nothing_is_written_once_the_place_may_be_anothers(host: Host) -> None:
    results = host.store(seconds=101.0)
    assert results.stored == [Stored("r", 1, [], [key(7)])]
    assert bytes(host.memory._mmap[SLOT + RANKS * BLOCK_BYTES : 2 * SLOT]) == bytes(SLOT - RANKS * BLOCK_BYTES), (
        "also not in the table"
    )


def test_a_block_is_complete_where_every_rank_has_stored_it() -> None:
    ours = CacheResults(stored=[Stored("r", 1, [Written(key(1), 0, 5), Written(key(2), 64, 6)])], store_bytes=1)
    theirs = CacheResults(stored=[Stored("r", 1, [Written(key(2), 64, (1 << 64) - 1)], [key(1)])], store_bytes=2)
    joined = ours.with_those_of(theirs)
    assert joined.stored == [Stored("r", 1, [Written(key(2), 64, 5)], [key(1)])]
    assert joined.store_bytes == 3
    lost = CacheResults(stored=[Stored("r", 1, [], [key(1), key(2)])])
    for pair in ((ours, lost), (lost, ours)):
        (stored,) = pair[0].with_those_of(pair[1]).stored
        assert (stored.blocks, set(stored.given_up)) == ([], {key(1), key(2)})


def test_a_load_has_ended_when_it_has_on_every_rank_and_is_lost_if_it_is_on_any() -> None:
    loads = OfAllRanks(3, Loaded.with_that_of)
    good = Loaded("r", 2, 100, 0.5, tiers={"host": 2}, tokens={"host": 32})
    bad = Loaded("r", 2, 100, 0.7, "differs", [Written(key(1), 0, 5)], {"host": 2}, {"host": 32})
    assert loads.take([good, Loaded("s", 1, 50, 0.1), good]) == []
    (ended,) = loads.take([bad])
    assert (ended.num_bytes, ended.seconds, ended.why, ended.bad) == (300, 0.7, "differs", bad.bad)
    assert (ended.num_blocks, ended.num_tokens) == (2, 32)
    assert loads.take([bad, bad]) == [], "a later load of the same request counts anew"
    (again,) = loads.take([good])
    assert again.bad == bad.bad, "one bad block is named once"


@pytest.mark.parametrize(("num_ranks", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_a_part_is_what_one_rank_keeps(num_ranks: int, heads: int) -> None:
    """Of more ranks than heads, several keep the same one."""
    assert part_bytes(LAYOUT, num_ranks) == heads * LAYOUT.head_bytes * LAYERS


def test_blocks_of_other_sizes_have_other_names_and_the_protocol_has_no_part_in_them() -> None:
    later = msgspec.structs.replace(LAYOUT, protocol=LAYOUT.protocol + 1)
    assert later.identity_of_blocks(2) == LAYOUT.identity_of_blocks(2) != LAYOUT.identity_of_blocks(1)
    other = msgspec.structs.replace(LAYOUT, isa="amx")
    assert other.identity_of_blocks(2) != LAYOUT.identity_of_blocks(2)


def test_one_rank_has_no_table() -> None:
    assert slot_bytes(BLOCK_BYTES, 1) == BLOCK_BYTES
