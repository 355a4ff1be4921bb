"""Blocks in one or several Redis or Valkey servers, each block on `replicas` of them.

    key ──▶ every server weighed by hash(server, key) ──▶ the `replicas` heaviest (rendezvous hashing)
    put ──▶ all of them; one that takes it is enough         get ──▶ the heaviest, then the others
    baton:kv:KEY = | BATONKV + version | arena's digest u64 | payload's length u64 | seal u64 | payload |

A server that failed is left out for 1 s until one call tries it again, then for 2 s, up to 30 s; the others go on.
Nothing is moved when a server joins or leaves: a block whose servers changed is a miss, and put again.
The servers decide what to evict: give them `maxmemory` and `maxmemory-policy allkeys-lru`.

Memory model: `put` hands the caller's memory to the socket without copying it. `get` asks for no more than the block
that fits, plus a byte, so that whatever lies under our key cannot fill this process; its bytes go straight into place
and are verified there. A server has as many connections as calls go on at once.
Threading: any method from any thread. A call waits at most timeout_s for a connection and as long for each silence of
each server that it asks, one server after another.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from contextlib import suppress

from core.clock import Clock, SystemClock
from core.errors import ConfigError
from kvcache.keys import BlockKey
from kvcache.redis_server import KEY_PREFIX, RedisServer, packed, packed_around
from kvcache.redis_value import Unfit
from kvcache.tier import TierError, TierFigures, seal

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"BATONKV\x01"
_DEFAULT_REPLICAS = 2
_DEFAULT_TIMEOUT_S = 0.5


class RedisTier:
    """See kvcache/tier.py."""

    name = "redis"
    is_written = True
    lossy = ""

    def __init__(
        self,
        urls: Sequence[str],
        replicas: int | None = None,
        ttl_s: float = 0.0,
        timeout_s: float = _DEFAULT_TIMEOUT_S,
        clock: Clock | None = None,
    ) -> None:
        """Connects to nothing yet. urls: redis://, rediss:// or unix://. replicas: servers per block, at most 2 unless
        told. ttl_s: seconds that a block is kept after it was put, 0 for ever. timeout_s: seconds, see above. Raises
        ConfigError if the client library is missing, or an argument is malformed."""
        _check_times(ttl_s, timeout_s)
        self._servers = [RedisServer(url, timeout_s, clock or SystemClock()) for url in urls]
        self._replicas = min(_DEFAULT_REPLICAS, len(urls)) if replicas is None else replicas
        if len({server.name for server in self._servers}) != len(urls) or not urls:
            raise ConfigError("the Redis tier needs one or more servers, each of them once")
        if not 1 <= self._replicas <= len(urls):
            raise ConfigError(f"{replicas} replicas on {len(urls)} Redis servers: ask for 1 to {len(urls)}")
        self._set_options = (b"NX", b"PX", b"%d" % max(round(ttl_s * 1000), 1)) if ttl_s else (b"NX",)
        self._figures = TierFigures()
        self._figures_lock = threading.Lock()

    def contains(self, keys: Sequence[BlockKey]) -> int:
        """See Tier. One round trip to each server. The count ends where no server of a key answers; raises TierError if
        that is the first key."""
        there, answered, why = set[int](), set[int](), ""
        for server, places in self._places(keys).items():
            command = b"".join(packed(b"EXISTS", KEY_PREFIX + keys[at]) for at in places)
            try:
                answers = server.ask([command], [int] * len(places))
            except TierError as error:
                why = str(error)
                continue
            answered.update(places)
            there.update(at for at, answer in zip(places, answers, strict=True) if answer)
        first_gap = next((at for at in range(len(keys)) if at not in there), len(keys))
        if keys and first_gap == 0 and 0 not in answered:
            raise TierError(f"no Redis server of a block answers: {why}")
        return first_gap

    def get(self, key: BlockKey, into: memoryview) -> int | None:
        """See Tier. Raises TierError if none of the key's servers answers."""
        return self._read(key, _Value(into, len(into)))

    def get_whole(self, key: BlockKey, most_bytes: int) -> tuple[int, memoryview] | None:
        """See Tier. Raises TierError if none of the key's servers answers."""
        value = _Value(None, most_bytes)
        digest = self._read(key, value)
        return None if digest is None else (digest, value.payload)

    def _read(self, key: BlockKey, value: _Value) -> int | None:
        """The digest of a block that now lies in the value's memory, from the first server that has it whole."""
        failures = []
        servers = self._servers_of(key)
        for server in servers:
            try:
                is_there = server.read(KEY_PREFIX + key, _HEADER.size + value.most_bytes + 1, value.room)
                digest = value.opened(key) if is_there else None
            except Unfit:
                is_there, digest = True, None
            except TierError as error:
                failures.append(str(error))
                continue
            if digest is not None:
                return digest
            if is_there:
                self._discard(server, key)
        if len(failures) == len(servers):
            raise TierError(f"no Redis server of a block answers: {'; '.join(failures)}")
        return None

    def put(self, key: BlockKey, digest: int, block: memoryview) -> bool:
        """See Tier. Raises TierError if none of the key's servers takes it."""
        header = _HEADER.pack(_MAGIC, digest, len(block), seal(key, digest, block))
        before, after = packed_around(len(header) + len(block), b"SET", KEY_PREFIX + key, options=self._set_options)
        failures, answers = [], []
        for server in self._servers_of(key):
            try:
                answers += server.ask([before + header, block, after], [bytes])
            except TierError as error:
                failures.append(str(error))
        if not answers:
            raise TierError(f"no Redis server takes a block: {'; '.join(failures)}")
        if answers[0] is not None:
            self._count(blocks=1, num_bytes=len(block))
        return True

    def delete(self, keys: Sequence[BlockKey]) -> None:
        """See Tier. A copy on a server that does not answer comes back with it. Raises TierError if none of a key's
        servers answers."""
        forgotten, why = set[int](), ""
        for server, places in self._places(keys).items():
            try:
                server.ask([packed(b"UNLINK", *(KEY_PREFIX + keys[at] for at in places))], [int])
                forgotten.update(places)
            except TierError as error:
                why = str(error)
        if len(forgotten) != len(keys):
            raise TierError(f"no Redis server of a block answers: {why}")

    def clear(self) -> None:
        """See Tier. Removes what lies under our prefix in the database of each server, whoever put it there: other
        hosts' blocks too. Raises TierError if a server does not answer."""
        failures = []
        for server in self._servers:
            try:
                server.clear()
            except TierError as error:
                failures.append(str(error))
        if failures:
            raise TierError(f"blocks may be left in Redis: {'; '.join(failures)}")

    def figures(self) -> TierFigures:
        """What this object has put and found corrupt; not what the servers hold, which others share and evict from."""
        return self._figures

    def close(self) -> None:
        """Closes the connections; one in use as soon as its call ends. Every later call raises TierError."""
        for server in self._servers:
            server.close()

    def placement(self, key: BlockKey) -> list[str]:
        """The names of a key's servers (host:port/database), in the order in which `get` asks them."""
        return [server.name for server in self._servers_of(key)]

    def _servers_of(self, key: BlockKey) -> list[RedisServer]:
        return sorted(self._servers, key=lambda server: server.weight(key), reverse=True)[: self._replicas]

    def _places(self, keys: Sequence[BlockKey]) -> dict[RedisServer, list[int]]:
        """Of every server, where its keys are in `keys`."""
        places: dict[RedisServer, list[int]] = {}
        for at, key in enumerate(keys):
            for server in self._servers_of(key):
                places.setdefault(server, []).append(at)
        return places

    def _discard(self, server: RedisServer, key: BlockKey) -> None:
        self._count(corrupt=1)
        with suppress(TierError):  # it stays, and is found out again
            server.ask([packed(b"UNLINK", KEY_PREFIX + key)], [int])

    def _count(self, blocks: int = 0, num_bytes: int = 0, corrupt: int = 0) -> None:
        with self._figures_lock:
            old = self._figures
            self._figures = TierFigures(
                blocks=old.blocks + blocks, num_bytes=old.num_bytes + num_bytes, corrupt=old.corrupt + corrupt
            )


class _Value:
    """A value's memory: the header's own, and the payload's where the caller wants it. into: None if the size is not
    known before."""

    def __init__(self, into: memoryview | None, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._into = into
        self._header = bytearray(_HEADER.size)
        self.payload = memoryview(b"")

    def room(self, num_bytes: int) -> list[memoryview] | None:
        """See redis_value.Room."""
        payload_bytes = num_bytes - _HEADER.size
        least_bytes = 0 if self._into is None else self.most_bytes
        if not least_bytes <= payload_bytes <= self.most_bytes:
            return None
        self.payload = memoryview(bytearray(payload_bytes)) if self._into is None else self._into
        return [memoryview(self._header), self.payload]

    def opened(self, key: BlockKey) -> int | None:
        """The digest; None if this is not what was put."""
        magic, digest, num_bytes, sealed = _HEADER.unpack(self._header)
        if magic != _MAGIC or num_bytes != len(self.payload) or sealed != seal(key, digest, self.payload):
            return None
        return int(digest)


def _check_times(ttl_s: float, timeout_s: float) -> None:
    if not ttl_s >= 0:
        raise ConfigError(f"a Redis block's time to live is {ttl_s} s: give seconds, or 0 to keep it")
    if not timeout_s > 0:
        raise ConfigError(f"the Redis tier's timeout is {timeout_s} s: give more than 0")
