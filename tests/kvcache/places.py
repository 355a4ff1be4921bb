"""What cache tests share: keys, a ledger in memory, a running server, and an engine's blocks in ordinary memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import TransferError
from kvcache.arena import MappedArena, key_summand
from kvcache.client import ask_figures
from kvcache.keys import BlockKey, block_key, namespace
from kvcache.ledger import Ledger, ledger_bytes
from kvcache.orders import Piece
from kvcache.server import ArenaFds
from kvcache.spec import SPEC_VARIABLE
from tests.poll import until
from transport.base import Region
from transport.mapping import Mapping, make_memfd

LAYERS = 3
LAYER_BYTES = 4096
BLOCK_BYTES = LAYERS * LAYER_BYTES
SPACE = namespace("fingerprint", "sha256")


def key(number: int) -> BlockKey:
    return block_key(SPACE, number.to_bytes(8, "little"))


def ledger_of(arena_bytes: int) -> tuple[Ledger, Mapping]:
    num_bytes = ledger_bytes(arena_bytes)
    fd = make_memfd(num_bytes)
    memory = Mapping(fd, num_bytes)
    os.close(fd)
    return Ledger(memory), memory


class Engine:
    """The blocks of one engine: LAYERS regions in ordinary memory."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.memory = (ctypes.c_char * (num_blocks * BLOCK_BYTES))()
        start = ctypes.addressof(self.memory)
        size = num_blocks * LAYER_BYTES
        self.regions = [Region(i, start + i * size, LAYER_BYTES, LAYER_BYTES, num_blocks) for i in range(LAYERS)]

    def block(self, block_id: int) -> bytes:
        return b"".join(ctypes.string_at(r.address + block_id * r.stride, LAYER_BYTES) for r in self.regions)

    def fill(self, block_id: int, number: int) -> bytes:
        """Different bytes for every layer and number; returns the block's."""
        for region in self.regions:
            text = f"{number}/{region.id};".encode() * LAYER_BYTES
            ctypes.memmove(region.address + block_id * region.stride, text, LAYER_BYTES)
        return self.block(block_id)


def stored(engine: Engine, arena: MappedArena, count: int) -> list[Piece]:
    """Fills the engine's first blocks and copies them into the arena; returns what to load, from block 8 on."""
    pieces = []
    for number in range(count):
        engine.fill(number, number)
        offset = number * BLOCK_BYTES
        digest = key_summand(key(number)) + sum(arena.write_layer(layer, number, offset) for layer in range(LAYERS))
        pieces.append(Piece(8 + number, offset, key(number), digest % (1 << 64), "host", 128))
    return pieces


class Server:
    """A real server process over an arena that this test holds, as a launcher would."""

    def __init__(self, folder: Path, arena_bytes: int, words: tuple[str, ...] = ()) -> None:
        self._spec = ",".join(["1MiB", *words])
        self.socket = str(folder / "cache.sock")
        self._fds = ArenaFds(arena_bytes)
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Returns the server's first line when it answers."""
        self.process = self._popen(None)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        until(self.is_up, what="the server's answer")
        return line

    def run_to_the_end(self) -> str:
        """Of a server that cannot start: what it says."""
        process = self._popen(subprocess.PIPE)
        _, why = process.communicate(timeout=30)
        assert process.returncode == 1
        return why

    def _popen(self, stderr: int | None) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "kvcache", "--socket", self.socket]
        command += ["--arena-fd", str(self._fds.arena), "--ledger-fd", str(self._fds.ledger)]
        return subprocess.Popen(
            command,
            pass_fds=(self._fds.arena, self._fds.ledger),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), SPEC_VARIABLE: self._spec},
        )

    def is_up(self) -> bool:
        try:
            return bool(self.figures())
        except TransferError:
            return False

    def figures(self) -> dict[str, float]:
        return ask_figures(self.socket)

    def kill(self) -> None:
        """As `kill -9` does, and waits for it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
            self.process = None

    def close(self) -> None:
        self.kill()
        self._fds.close()


@contextmanager
def serving(folder: Path, arena_bytes: int, *words: str) -> Iterator[Server]:
    """words: tiers, as `--cache` names them after the size."""
    server = Server(folder, arena_bytes, words)
    server.start()
    try:
        yield server
    finally:
        server.close()
