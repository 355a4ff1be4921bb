"""A disk tier gives back what it was given, or nothing: after restarts and kills, on bad, full and read-only disks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.clock import ManualClock
from core.errors import ConfigError
from kvcache.conformance import BLOCK_BYTES, block_of, check_tier, key_of, read
from kvcache.disk import STAMP_S, DiskTier
from kvcache.disk_folder import HEADER_BYTES
from kvcache.faulty_tier import FaultyTier, TierFaults
from kvcache.tier import TierError
from tests.poll import until

ROOT = Path(__file__).parents[2]
FILE_BYTES = HEADER_BYTES + BLOCK_BYTES
SMALL = b"a small block"
NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def tier_in(folder: Path, num_blocks: int = 40, clock: ManualClock | None = None) -> DiskTier:
    return DiskTier(folder, num_blocks * FILE_BYTES, clock or ManualClock())


def put(tier: DiskTier, *numbers: int) -> dict[int, bytes]:
    blocks = {number: block_of(number) for number in numbers}
    for number, block in blocks.items():
        tier.put(key_of(number), number, memoryview(block))
    return blocks


def held(tier: DiskTier, numbers: range) -> list[int]:
    return [number for number in numbers if tier.contains([key_of(number)])]


def file_of(folder: Path, number: int) -> Path:
    name = key_of(number).hex()
    return folder / name[:2] / name


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_it_keeps_the_contract_of_every_tier(folder: Path) -> None:
    check_tier(lambda: tier_in(folder))


def test_it_still_does_when_every_call_is_late(folder: Path) -> None:
    check_tier(lambda: FaultyTier(tier_in(folder), TierFaults(delay_s=0.005)))


def test_a_restart_keeps_the_blocks_and_their_order_of_use(folder: Path) -> None:
    clock = ManualClock()
    with closing(tier_in(folder, clock=clock)) as tier:
        blocks: dict[int, bytes] = {}
        for number in (3, 1, 2):
            blocks |= put(tier, number)
            clock.advance(1)
        clock.advance(STAMP_S)
        assert read(tier, 3)[0] == 3
    with closing(tier_in(folder, 3, clock)) as tier:
        assert tier.figures().blocks == 3
        assert {number: read(tier, number) for number in blocks} == {n: (n, block) for n, block in blocks.items()}
    with closing(tier_in(folder, 3, clock)) as tier:
        put(tier, 4)
        assert held(tier, range(5)) == [2, 3, 4]


def test_a_smaller_capacity_at_start_evicts_what_was_used_least_recently(folder: Path) -> None:
    clock = ManualClock()
    with closing(tier_in(folder, clock=clock)) as tier:
        for number in (5, 4, 3, 2, 1):
            put(tier, number)
            clock.advance(1)
    with closing(tier_in(folder, 2, clock)) as tier:
        assert held(tier, range(6)) == [1, 2]
        assert tier.figures().evicted == 3
        assert bytes_in(folder) == tier.figures().num_bytes == 2 * FILE_BYTES


def test_empty_files_as_a_power_cut_leaves_them_are_evicted_and_never_found(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        put(tier, 1, 2)
    os.truncate(file_of(folder, 1), 0)
    os.utime(file_of(folder, 1), (1, 1))
    with closing(tier_in(folder, 1)) as tier:
        put(tier, 3)
        assert held(tier, range(4)) == [3]
        assert files_in(folder) == [file_of(folder, 3)]


def test_the_bound_holds_even_while_a_block_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []

    def rename(source: str, target: str, rename: Callable[[str, str], None] = os.rename) -> None:
        sums.append(bytes_in(folder))
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with closing(tier_in(folder, 3)) as tier:
        put(tier, *range(8))
        assert sums == [min(n + 1, 3) * FILE_BYTES for n in range(8)]
        assert tier.figures().evicted == 5


def test_get_and_put_count_as_use_and_the_least_recently_used_goes_first(folder: Path) -> None:
    with closing(tier_in(folder, 4)) as tier:
        put(tier, 0, 1, 2, 3)
        read(tier, 0)
        put(tier, 2)
        put(tier, 4, 5)
        assert held(tier, range(6)) == [0, 2, 4, 5]


def test_a_block_larger_than_the_capacity_is_not_kept_and_evicts_nothing(folder: Path) -> None:
    with closing(tier_in(folder, 2)) as tier:
        put(tier, 1, 2)
        before = tier.figures()
        tier.put(key_of(3), 3, memoryview(bytes(2 * FILE_BYTES - HEADER_BYTES + 1)))
        assert tier.figures() == before
        assert read(tier, 3)[0] is None
        tier.put(key_of(3), 3, memoryview(bytes(2 * FILE_BYTES - HEADER_BYTES)))
        assert held(tier, range(4)) == [3]


def test_a_flipped_bit_anywhere_is_a_miss_and_the_file_is_gone(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        num_bits = 8 * (HEADER_BYTES + len(SMALL))
        for bit in range(num_bits):
            tier.put(key_of(1), 2**63 + 1, memoryview(SMALL))
            flip(file_of(folder, 1), bit)
            assert read(tier, 1, len(SMALL))[0] is None, f"bit {bit}"
            assert not file_of(folder, 1).exists()
            assert tier.figures().corrupt == bit + 1
        assert tier.figures().num_bytes == 0


def test_another_blocks_file_under_a_name_is_a_miss(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        put(tier, 1, 2)
        file_of(folder, 1).write_bytes(file_of(folder, 2).read_bytes())
        assert read(tier, 1)[0] is None
        assert read(tier, 2)[0] == 2
        assert tier.figures().corrupt == 1


@pytest.mark.parametrize("num_bytes", [0, HEADER_BYTES - 1, HEADER_BYTES, FILE_BYTES - 1, FILE_BYTES + 1])
def test_a_file_of_another_length_is_a_miss_before_and_after_a_restart(folder: Path, num_bytes: int) -> None:
    with closing(tier_in(folder)) as tier:
        put(tier, 1, 2)
        os.truncate(file_of(folder, 1), num_bytes)
        assert read(tier, 1)[0] is None
        assert (tier.figures().blocks, tier.figures().corrupt) == (1, 1)
        os.truncate(file_of(folder, 2), num_bytes)
    with closing(tier_in(folder)) as tier:
        assert read(tier, 2)[0] is None
        assert files_in(folder) == []
        assert (tier.figures().num_bytes, tier.figures().corrupt) == (0, 1)


def test_a_file_that_is_cut_while_it_is_read_is_a_miss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def one_byte_then_cut(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        num_read = real(descriptor, [buffers[0][:1]], offset)
        os.truncate(file_of(folder, 1), 1)
        return num_read

    with closing(tier_in(folder)) as tier:
        put(tier, 1)
        monkeypatch.setattr(os, "preadv", one_byte_then_cut)
        assert read(tier, 1)[0] is None
        assert tier.figures().corrupt == 1


def test_reads_and_writes_that_the_system_does_in_pieces_are_completed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, real_write = os.preadv, os.writev

    def pieces(buffers: list[memoryview]) -> list[memoryview]:
        return [buffer[:13] for buffer in buffers if len(buffer)][:1]

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, pieces(buffers), offset))
    monkeypatch.setattr(os, "writev", lambda fd, buffers: real_write(fd, pieces(buffers)))
    block = bytes(range(256))
    with closing(tier_in(folder)) as tier:
        tier.put(key_of(1), 1, memoryview(block))
        assert read(tier, 1, len(block)) == (1, block)


def test_unfinished_files_are_removed_at_start_and_never_found_and_other_files_stay(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        blocks = put(tier, 1, 2)
    part = file_of(folder, 2).with_suffix(".part")
    os.rename(file_of(folder, 2), part)
    others = [part.with_name("notes.part"), part.with_name("00ff"), folder / "notes"]
    for path in others:
        path.write_text("not ours")
    with closing(tier_in(folder)) as tier:
        assert not part.exists()
        assert tier.contains([key_of(2)]) == 0
        assert read(tier, 2)[0] is None
        assert read(tier, 1) == (1, blocks[1])
        assert tier.figures().num_bytes == FILE_BYTES
    assert all(path.exists() for path in others)


HOLDER = """
import sys
from pathlib import Path
from core.clock import SystemClock
from kvcache.conformance import BLOCK_BYTES, key_of
from kvcache.disk import DiskTier

tier = DiskTier(Path(sys.argv[1]), 20 * BLOCK_BYTES, SystemClock())
number = 0
while True:
    number += 1
    tier.put(key_of(number), number, memoryview(number.to_bytes(8, "little") * (BLOCK_BYTES // 8)))
    print(number, flush=True)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_whole_blocks(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        for _ in range(50):
            assert child.stdout.readline()
        with pytest.raises(ConfigError, match="in use by another process"):
            tier_in(folder)
    finally:
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.stdout.close()
        child.wait()
    last = int(rest[-1]) if rest else 50
    with closing(tier_in(folder)) as tier:
        kept = held(tier, range(last + 2))
        assert len(kept) in (18, 19)
        assert last in kept
        for number in kept:
            assert read(tier, number) == (number, number.to_bytes(8, "little") * (BLOCK_BYTES // 8))
        assert bytes_in(folder) == tier.figures().num_bytes


def test_a_second_tier_of_one_process_is_refused_until_the_first_is_closed(folder: Path) -> None:
    with closing(tier_in(folder)), pytest.raises(ConfigError, match="in use"):
        tier_in(folder)
    tier_in(folder).close()


def test_after_close_it_finds_and_keeps_nothing_and_the_files_stay(folder: Path) -> None:
    tier = tier_in(folder)
    put(tier, 1)
    tier.close()
    tier.close()
    put(tier, 2)
    tier.delete([key_of(1)])
    assert (read(tier, 1)[0], tier.contains([key_of(1)])) == (None, 0)
    assert files_in(folder) == [file_of(folder, 1)]


def test_the_folder_and_all_in_it_are_private(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        put(tier, 1, 2)
    modes = {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}


def test_a_folder_that_is_not_ours_alone_is_refused_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        tier_in(folder)
    folder.chmod(0o700)
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=r"belongs to user .* name another folder"):
        tier_in(folder if os.getuid() == 0 else Path("/"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="name a folder"):
        tier_in(tmp_path / "file")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        tier_in(folder)


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A filesystem of one MiB."""
    if os.getuid() != 0:
        pytest.skip("only root may mount a small filesystem")
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small filesystem: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Until nothing fits on the disk any more."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_on_a_disk_smaller_than_its_capacity_old_blocks_give_way(folder: Path) -> None:
    with small_disk(folder), closing(tier_in(folder, 1000)) as tier:
        blocks = put(tier, *range(60))
        kept = held(tier, range(60))
        assert kept == list(range(60 - len(kept), 60))
        assert len(kept) > 15
        assert [read(tier, number) for number in kept] == [(number, blocks[number]) for number in kept]
        assert bytes_in(folder) == tier.figures().num_bytes


def test_a_disk_that_others_have_filled_is_a_tier_error_and_works_again_when_it_has_room(folder: Path) -> None:
    with small_disk(folder), closing(tier_in(folder, 1000)) as tier:
        fill(folder / "filler")
        for number in range(3):
            with pytest.raises(TierError, match="disk is full"):
                put(tier, number)
        assert files_in(folder) == [folder / "filler"]
        assert (tier.figures().blocks, tier.figures().num_bytes) == (0, 0)
        (folder / "filler").unlink()
        blocks = put(tier, 1)
        assert read(tier, 1) == (1, blocks[1])


def test_a_read_only_disk_still_gives_its_blocks_and_refuses_new_ones_and_a_start(folder: Path) -> None:
    with small_disk(folder), closing(tier_in(folder)) as tier:
        blocks = put(tier, 1, 2)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(TierError, match="read-only"):
            put(tier, 3)
        with pytest.raises(TierError, match="read-only"):
            tier.delete([key_of(2)])
        assert [read(tier, number) for number in (1, 2)] == [(1, blocks[1]), (2, blocks[2])]
        assert tier.figures().num_bytes == 2 * FILE_BYTES
        tier.close()
        with pytest.raises(ConfigError, match="cannot be written"):
            tier_in(folder)


def test_a_block_that_the_device_cannot_read_is_a_tier_error_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(tier_in(folder)) as tier:
        put(tier, 1)
        with monkeypatch.context() as broken:
            broken.setattr(os, "preadv", fail)
            with pytest.raises(TierError, match="device fails"):
                read(tier, 1)
        assert read(tier, 1)[0] is None
        with monkeypatch.context() as broken:
            broken.setattr(os, "writev", fail)
            with pytest.raises(TierError, match="device fails"):
                put(tier, 2)
        assert files_in(folder) == []
        assert tier.figures().num_bytes == 0
        put(tier, 2)
        assert read(tier, 2)[0] == 2


def test_a_failed_write_is_never_visible(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails after it wrote a part, at the moment when the file would get its name, and then is tried again."""

    def fail(*_: object) -> None:
        assert files_in(folder), "something was written"
        assert not file_of(folder, 1).exists(), "under another name"
        assert held(tier, range(2)) == []
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(tier_in(folder)) as tier:
        with monkeypatch.context() as broken:
            broken.setattr(os, "rename", fail)
            with pytest.raises(TierError):
                put(tier, 1)
        assert (files_in(folder), held(tier, range(2))) == ([], [])
        put(tier, 1)
        assert read(tier, 1)[0] == 1


def test_a_file_that_was_evicted_while_it_is_looked_for_is_a_miss_and_not_corrupt(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        put(tier, 1, 2)
        file_of(folder, 1).unlink()
        assert read(tier, 1)[0] is None
        figures = tier.figures()
        assert (figures.blocks, figures.num_bytes, figures.corrupt) == (1, FILE_BYTES, 0)


def test_a_reader_of_a_spoilt_file_does_not_remove_the_block_that_replaced_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    blocks: dict[int, bytes] = {}

    def replaced_meanwhile(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        num_read = real(descriptor, buffers, offset)
        tier.delete([key_of(1)])
        blocks.update(put(tier, 1))
        return num_read

    with closing(tier_in(folder)) as tier:
        put(tier, 1)
        flip(file_of(folder, 1), 999)
        with monkeypatch.context() as racing:
            racing.setattr(os, "preadv", replaced_meanwhile)
            assert read(tier, 1)[0] is None
        assert read(tier, 1) == (1, blocks[1])


def test_subfolders_that_somebody_removed_are_made_again(folder: Path) -> None:
    with closing(tier_in(folder)) as tier:
        put(tier, 1)
        file_of(folder, 1).unlink()
        file_of(folder, 1).parent.rmdir()
        put(tier, 2)
        assert read(tier, 2)[0] == 2


def test_a_thread_that_waits_for_the_disk_holds_up_nobody_else(folder: Path) -> None:
    with closing(tier_in(folder, 3)) as tier, ThreadPoolExecutor(2) as pool:
        put(tier, 1, 2)
        file_of(folder, 1).unlink()
        os.mkfifo(file_of(folder, 1), 0o600)
        waiting = pool.submit(read, tier, 1)  # the open of a FIFO waits for its other end, as a slow disk would
        try:
            in_time = pool.submit(lambda: (put(tier, 3), read(tier, 2)[0], tier.figures(), tier.contains([key_of(3)])))
            assert in_time.result(timeout=10)[1] == 2
            assert not waiting.done()
        finally:
            until(lambda: has_reader(file_of(folder, 1)))
        assert waiting.result(timeout=10)[0] is None


def has_reader(fifo: Path) -> bool:
    """Lets it go on, if there is one."""
    with suppress(OSError):
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return True
    return False


def test_a_key_that_is_being_written_is_left_to_its_writer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second put of the key comes, and the tier is closed, while the first one's file has no name yet."""
    second = b"x" * BLOCK_BYTES
    refused: list[str] = []

    def rename(source: str, target: str, rename: Callable[[str, str], None] = os.rename) -> None:
        tier.put(key_of(1), 2, memoryview(second))
        tier.close()
        with pytest.raises(ConfigError, match="in use"):
            tier_in(folder)
        refused.append(target)
        rename(source, target)

    tier = tier_in(folder)
    with monkeypatch.context() as busy:
        busy.setattr(os, "rename", rename)
        blocks = put(tier, 1)
    assert refused == [str(file_of(folder, 1))]
    with closing(tier_in(folder)) as tier:
        assert read(tier, 1) == (1, blocks[1])


def test_many_threads_on_few_keys_get_whole_blocks_or_misses(folder: Path) -> None:
    blocks = {number: block_of(number) for number in range(12)}

    def work(seed: int) -> int:
        num_hits = 0
        for step in range(60):
            number = (seed * 7 + step * (seed + 1)) % 12
            if (seed + step) % 3 == 0:
                tier.put(key_of(number), number, memoryview(blocks[number]))
            elif (seed + step) % 11 == 0:
                tier.delete([key_of(number)])
            else:
                digest, block = read(tier, number)
                assert digest is None or (digest, block) == (number, blocks[number])
                num_hits += digest is not None
        return num_hits

    with closing(tier_in(folder, 8)) as tier:
        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(work, range(6))) > 0
        figures = tier.figures()
        assert figures.corrupt == 0
        assert bytes_in(folder) == figures.num_bytes == figures.blocks * FILE_BYTES <= 8 * FILE_BYTES


class DiskMachine(RuleBasedStateMachine):
    """Against a dict in order of use. Each step takes longer than a stamp lasts, so that a restart keeps the order."""

    CAPACITY = 5 * (HEADER_BYTES + 300)
    NUMBERS = st.integers(0, 9)
    SIZES = (0, 100, 300, 700, CAPACITY)

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.base = tempfile.TemporaryDirectory()
        self.folder = Path(self.base.name) / "cache"
        self.tier = DiskTier(self.folder, self.CAPACITY, self.clock)
        self.model: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        self.spoilt: set[int] = set()
        self.num_corrupt = self.num_evicted = 0

    def teardown(self) -> None:
        self.tier.close()
        self.base.cleanup()

    def size(self) -> int:
        return sum(HEADER_BYTES + len(block) for _, block in self.model.values())

    def drop(self, number: int) -> None:
        self.model.pop(number, None)
        self.spoilt.discard(number)

    @rule(number=NUMBERS, digest=st.integers(0, 2**64 - 1), size=st.sampled_from(SIZES))
    def put(self, number: int, digest: int, size: int) -> None:
        self.clock.advance(STAMP_S)
        block = os.urandom(size)
        self.tier.put(key_of(number), digest, memoryview(block))
        if number in self.model:
            self.model.move_to_end(number)
        elif HEADER_BYTES + size <= self.CAPACITY:
            while self.size() + HEADER_BYTES + size > self.CAPACITY:
                self.drop(next(iter(self.model)))
                self.num_evicted += 1
            self.model[number] = (digest, block)

    @rule(number=NUMBERS)
    def get(self, number: int) -> None:
        self.clock.advance(STAMP_S)
        digest, block = self.model.get(number, (None, b""))
        found, read_block = read(self.tier, number, len(block))
        if number in self.spoilt:
            assert found is None
            self.num_corrupt += 1
            self.drop(number)
        else:
            assert found == digest
            assert digest is None or read_block == block
            if number in self.model:
                self.model.move_to_end(number)

    @precondition(lambda self: self.model)
    @rule(choice=st.integers(0, 99), more=st.sampled_from([-1, 1]))
    def get_another_size(self, choice: int, more: int) -> None:
        number = list(self.model)[choice % len(self.model)]
        size = max(len(self.model[number][1]) + more, 1)
        assert read(self.tier, number, size)[0] is None
        self.num_corrupt += 1
        self.drop(number)

    @rule(numbers=st.lists(NUMBERS, max_size=3))
    def delete(self, numbers: list[int]) -> None:
        self.tier.delete([key_of(number) for number in numbers])
        for number in numbers:
            self.drop(number)

    @precondition(lambda self: set(self.model) - self.spoilt)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(set(self.model) - self.spoilt)))
        path = file_of(self.folder, number)
        before = path.stat()
        flip(path, data.draw(st.integers(0, before.st_size * 8 - 1)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.spoilt.add(number)

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = DiskTier(self.folder, self.CAPACITY, self.clock)
        self.num_corrupt = self.num_evicted = 0

    @rule(numbers=st.lists(NUMBERS, max_size=5))
    def contains(self, numbers: list[int]) -> None:
        count = self.tier.contains([key_of(number) for number in numbers])
        assert all(number in self.model for number in numbers[:count])
        assert count == len(numbers) or numbers[count] not in self.model

    @invariant()
    def folder_and_figures_agree(self) -> None:
        figures = self.tier.figures()
        assert {path.name for path in files_in(self.folder)} == {key_of(number).hex() for number in self.model}
        assert bytes_in(self.folder) == figures.num_bytes == self.size() <= self.CAPACITY
        assert figures.blocks == len(self.model)
        assert (figures.corrupt, figures.evicted) == (self.num_corrupt, self.num_evicted)


DiskMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestDisk = DiskMachine.TestCase
