"""A tier with a codec gives back the block that was put, or says that it is another; damage costs a block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from core.clock import ManualClock
from core.errors import ConfigError
from kvcache.arena import block_digest
from kvcache.codec import HEADER_BYTES
from kvcache.codecs import CODECS, LOSSY, make_codec
from kvcache.conformance import BLOCK_BYTES, check_tier, key_of, read
from kvcache.disk import DiskTier
from kvcache.elements import Floats, read_floats
from kvcache.encoded import EncodedTier
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.redis_tier import RedisTier
from kvcache.shape import BlockShape, KnownShapes
from kvcache.spec import DiskSpec
from kvcache.tier import Tier, seal
from kvcache.tiers import make_tier
from tests.kvcache.memory_tier import Kept, MemoryTier
from tests.kvcache.test_redis import RedisServer, needs_server

SHAPE = BlockShape("bfloat16", 2, 256)
NUM_BYTES = 2 * 4 * SHAPE.head_bytes
LOSSLESS = tuple(name for name in CODECS if name not in LOSSY)


def encoded(inner: Tier, name: str, *shapes: tuple[int, BlockShape | None]) -> EncodedTier:
    known = KnownShapes()
    for num_bytes, shape in shapes:
        known.add(num_bytes, shape)
    return EncodedTier(inner, make_codec(name), known)


def shaped(inner: Tier, name: str) -> EncodedTier:
    return encoded(inner, name, (NUM_BYTES, SHAPE))


def numbers(number: int = 1, num_bytes: int = NUM_BYTES) -> bytes:
    """Of bfloat16, as keys and values are spread."""
    values = np.random.default_rng(number).standard_normal(num_bytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def put(tier: Tier, number: int, block: bytes) -> int:
    """The digest that an engine would take."""
    digest = block_digest(key_of(number), memoryview(block), SHAPE.num_layers)
    assert tier.put(key_of(number), digest, memoryview(block))
    return digest


def floats(block: bytes) -> Floats:
    return read_floats(memoryview(block), "bfloat16")


def flip(tier: MemoryTier, number: int, at: int) -> None:
    """What is stored is altered, and the tier inside does not notice."""
    kept = tier.kept[key_of(number)]
    altered = bytearray(kept.block)
    altered[at] ^= 1
    block = bytes(altered)
    tier.kept[key_of(number)] = Kept(kept.digest, seal(key_of(number), kept.digest, block), block)


@pytest.mark.parametrize("name", CODECS)
def test_it_keeps_the_contract_of_every_tier(name: str, tmp_path: Path) -> None:
    check_tier(lambda: encoded(MemoryTier(), name))
    check_tier(lambda: encoded(DiskTier(tmp_path / "disk", 40 * BLOCK_BYTES, ManualClock()), name))


@pytest.mark.parametrize("name", LOSSLESS)
def test_it_still_does_around_and_inside_faults(name: str) -> None:
    late = TierFaults(delay_s=0.002)
    check_tier(lambda: encoded(FaultyTier(MemoryTier(), late), name))
    check_tier(lambda: FaultyTier(encoded(MemoryTier(), name), late))


@needs_server
@pytest.mark.parametrize("name", ["zstd", "int4"])
def test_redis_with_a_codec_is_still_a_tier(name: str, tmp_path: Path) -> None:
    with closing(RedisServer(tmp_path)) as server:
        server.start()
        check_tier(lambda: encoded(RedisTier([server.url]), name))


@pytest.mark.parametrize("name", ["zstd", "lz4"])
def test_blocks_come_back_exactly_from_fewer_bytes(name: str) -> None:
    inner = MemoryTier()
    tier = encoded(inner, name, (BLOCK_BYTES, None))
    block = numbers(1, BLOCK_BYTES)
    assert tier.put(key_of(1), 5, memoryview(block))
    assert read(tier, 1) == (5, block)
    assert inner.figures().num_bytes == tier.figures().encoded_bytes < 0.9 * len(block)
    assert tier.name == "memory"


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_tier_gives_another_block_with_its_own_digest_and_says_so(name: str) -> None:
    inner = MemoryTier()
    tier, block = shaped(inner, name), numbers()
    given = put(tier, 1, block)
    digest, found = read(tier, 1, NUM_BYTES)
    assert found != block
    assert digest == block_digest(key_of(1), memoryview(found), SHAPE.num_layers) != given
    before, after = (floats(part).reshape(-1, SHAPE.head_elements) for part in (block, found))
    allowed = np.abs(before).max(axis=1, keepdims=True) * (make_codec(name).error_share + 2**-8)
    assert (np.abs(after - before) <= allowed).all()
    assert inner.figures().num_bytes < 0.6 * NUM_BYTES
    assert tier.name == f"memory-{name}"


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shapes", [(), ((NUM_BYTES, SHAPE), (NUM_BYTES, BlockShape("float16", 2, 256)))])
def test_without_one_certain_shape_a_lossy_tier_keeps_the_exact_block(
    name: str, shapes: tuple[tuple[int, BlockShape], ...]
) -> None:
    tier, block = encoded(MemoryTier(), name, *shapes), numbers()
    digest = put(tier, 1, block)
    assert read(tier, 1, NUM_BYTES) == (digest, block)


@pytest.mark.parametrize("name", LOSSY)
def test_what_has_no_bounded_error_is_kept_exactly(name: str) -> None:
    tier = shaped(MemoryTier(), name)
    block = numbers()[:-2] + b"\x80\x7f"  # infinity
    digest = put(tier, 1, block)
    assert read(tier, 1, NUM_BYTES) == (digest, block)


@pytest.mark.parametrize("name", CODECS)
def test_after_a_restart_it_is_read_before_any_client_has_come(name: str, tmp_path: Path) -> None:
    with closing(shaped(DiskTier(tmp_path / "disk", 1 << 20, ManualClock()), name)) as tier:
        put(tier, 1, numbers())
        before = read(tier, 1, NUM_BYTES)
    with closing(encoded(DiskTier(tmp_path / "disk", 1 << 20, ManualClock()), name)) as tier:
        assert read(tier, 1, NUM_BYTES) == before
        assert before[0] is not None


@pytest.mark.parametrize("name", CODECS)
def test_noise_takes_a_header_more_and_not_a_byte_beyond(name: str) -> None:
    inner = MemoryTier()
    tier, block = encoded(inner, name), np.random.default_rng(3).bytes(BLOCK_BYTES)
    assert tier.put(key_of(1), 1, memoryview(block))
    assert read(tier, 1) == (1, block)
    assert inner.figures().num_bytes <= BLOCK_BYTES + HEADER_BYTES


@pytest.mark.parametrize("name", CODECS)
def test_what_was_altered_below_is_a_miss_gone_and_can_be_put_anew(name: str) -> None:
    inner = MemoryTier()
    tier, block = shaped(inner, name), numbers()
    for count, at in enumerate((0, 9, HEADER_BYTES - 1, HEADER_BYTES, -1)):
        put(tier, 1, block)
        flip(inner, 1, at)
        assert read(tier, 1, NUM_BYTES)[0] is None, f"byte {at}"
        assert not inner.kept
        assert tier.figures().corrupt == count + 1
    put(tier, 1, block)
    assert read(tier, 1, NUM_BYTES)[0] is not None


@pytest.mark.parametrize("name", CODECS)
def test_a_bit_that_flips_on_the_way_is_never_given(name: str) -> None:
    tier = shaped(FaultyTier(MemoryTier(), TierFaults(flip_every=2)), name)
    for number in range(1, 9):
        put(tier, number, numbers(number))
    found = [read(tier, number, NUM_BYTES)[0] is not None for number in range(1, 9)]
    assert found == [True, False] * 4


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_block_that_is_not_the_one_of_its_digest_is_a_miss(name: str) -> None:
    tier = shaped(MemoryTier(), name)
    tier.put(key_of(1), 12345, memoryview(numbers()))
    assert read(tier, 1, NUM_BYTES)[0] is None
    assert tier.figures().corrupt == 1


@pytest.mark.parametrize("name", [name for name in CODECS if name != "int8"])
def test_a_block_of_another_lossy_codec_is_never_given(name: str) -> None:
    inner = MemoryTier()
    put(shaped(inner, "int8"), 1, numbers())
    tier = shaped(inner, name)
    assert read(tier, 1, NUM_BYTES)[0] is None
    digest = put(tier, 1, numbers())
    found = read(tier, 1, NUM_BYTES)
    assert found[0] is not None
    assert name in LOSSY or found == (digest, numbers())


@pytest.mark.parametrize("name", [name for name in CODECS if name != "int8"])
def test_nor_is_one_that_a_lossy_tier_kept_as_it_is(name: str) -> None:
    """It may have been computed after a rounded one."""
    inner = MemoryTier()
    put(encoded(inner, "int8"), 1, numbers())
    assert read(encoded(inner, "int8"), 1, NUM_BYTES)[1] == numbers()
    assert read(shaped(inner, name), 1, NUM_BYTES)[0] is None


@pytest.mark.parametrize("name", CODECS)
def test_blocks_from_before_the_codec_are_given_as_they_are(name: str) -> None:
    inner = MemoryTier()
    digest = put(inner, 1, numbers())
    tier = shaped(inner, name)
    assert read(tier, 1, NUM_BYTES) == (digest, numbers())
    found = tier.get_whole(key_of(1), NUM_BYTES)
    assert found is not None
    assert (found[0], bytes(found[1])) == (digest, numbers())
    assert read(tier, 1, NUM_BYTES - 2)[0] is None


@pytest.mark.parametrize("name", CODECS)
def test_a_tier_without_a_codec_takes_no_encoded_block_for_a_block(name: str) -> None:
    inner = MemoryTier()
    for number in range(4):
        put(shaped(inner, name), number, numbers(number))
    assert [read(inner, number, NUM_BYTES)[0] for number in range(4)] == [None] * 4


def test_what_it_is_asked_for_is_made_with_its_codec(tmp_path: Path) -> None:
    plain = make_tier(DiskSpec(str(tmp_path / "a"), 1 << 20), ManualClock(), KnownShapes())
    assert isinstance(plain, DiskTier)
    with closing(make_tier(DiskSpec(str(tmp_path / "b"), 1 << 20, "zstd"), ManualClock(), KnownShapes())) as tier:
        put(tier, 1, numbers())
        assert 0 < tier.figures().num_bytes < NUM_BYTES
    plain.close()
    with pytest.raises(ConfigError, match="unknown codec"):
        make_tier(DiskSpec(str(tmp_path / "c"), 1 << 20, "gzip"), ManualClock(), KnownShapes())


class EncodedMachine(RuleBasedStateMachine):
    """Codecs come and go over the same store, blocks are damaged, and shapes become known or doubtful."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MemoryTier()
        self.tier = encoded(self.inner, "zstd")
        self.name = "zstd"
        self.put: dict[int, tuple[int, bytes]] = {}

    @rule(number=st.integers(0, 5), seed=st.integers(0, 3))
    def keep(self, number: int, seed: int) -> None:
        block = numbers(8 * number + seed)
        if not self.inner.contains([key_of(number)]):
            self.put[number] = put(self.tier, number, block), block

    @rule(name=st.sampled_from(CODECS), is_known=st.booleans())
    def restart(self, name: str, is_known: bool) -> None:
        self.name = name
        self.tier = encoded(self.inner, name, *([(NUM_BYTES, SHAPE)] if is_known else []))

    @rule(number=st.integers(0, 5), at=st.integers(0, NUM_BYTES + HEADER_BYTES))
    def damage(self, number: int, at: int) -> None:
        kept = self.inner.kept.get(key_of(number))
        if kept is not None and kept.block[:1] == b"\xb5":
            flip(self.inner, number, at % len(kept.block))

    @rule(number=st.integers(0, 5))
    def forget(self, number: int) -> None:
        self.tier.delete([key_of(number)])

    @rule(number=st.integers(0, 5))
    def ask(self, number: int) -> None:
        digest, found = read(self.tier, number, NUM_BYTES)
        if digest is None:
            assert not self.inner.contains([key_of(number)]), "a miss leaves the way free for the next put"
            return
        exact = self.put[number]
        if (digest, found) != exact:
            assert self.name in LOSSY, "only who has asked for it gets another block"
            assert digest == block_digest(key_of(number), memoryview(found), SHAPE.num_layers)
            assert np.abs(floats(found) - floats(exact[1])).max() < 0.08 * np.abs(floats(exact[1])).max()

    @invariant()
    def holds_no_more_than_headers_beyond_the_blocks(self) -> None:
        assert all(len(kept.block) <= NUM_BYTES + HEADER_BYTES for kept in self.inner.kept.values())


EncodedMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestEncodedMachine: Callable[[], object] = EncodedMachine.TestCase
