"""Lets other hosts' cache servers ask this one for blocks of its arena.

    askers ══ ZMQ ROUTER at HOST:PORT ══▶ PeerServer ──▶ Session (one per asker) ──▶ Index: search, release
                                                              └─ transport/: blocks written into the asker's memory

Who is connected may read every block whose key it knows or is told: closed networks only. Nobody can write here: the
transport that sends opens no landing, and its description is given to no one.

Memory model: bounded by MAX_SESSIONS, by what each may have under way, and by the sockets' queues. Messages larger
than any word of ours are dropped unread by ZMQ.
Threading: the server's event loop, which never waits here; the transport has a thread of its own, seals and closing
endpoints have two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import zmq

from core.clock import Clock
from core.errors import ConfigError, ProtocolError, TransferError
from kvcache import peer_words as words
from kvcache.change_log import ChangeLog
from kvcache.index import Index
from kvcache.peer_session import ARENA_REGION, ServedCounts, Session, Source
from transport.address import bind_address
from transport.base import Region, Transport
from transport.mapping import Mapping
from transport.zmq_tcp import ZmqTransport

MAX_SESSIONS = 64
TICK_S = 0.05
ALIVE_S = 1.0
SILENCE_S = 5.0
"""An asker that says nothing for so long is gone; it says Alive every second."""

MESSAGES_PER_TURN = 64
MAX_QUEUED_MESSAGES = 256
HANDSHAKE_TIMEOUT_MS = 2000
MAX_ASKED_BYTES = words.MAX_DESCRIPTION_BYTES + 4096
"""The largest message that an asker may send: its Hello."""


@dataclass
class _Asker:
    """A session, and when its asker was heard and spoken to last."""

    session: Session
    heard_s: float
    told_s: float


class PeerServer:
    """Serves the complete blocks of `index` at `listen` (HOST:PORT; port 0: any free one) from `start` to `close`.

    `transport` is what blocks leave by, zmq unless one is given; closed with the server. Raises ConfigError if it
    cannot listen there.
    """

    def __init__(
        self, listen: str, index: Index, arena: Mapping, clock: Clock, transport: Transport | None = None
    ) -> None:
        self._index = index
        self._clock = clock
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        host, _, port = listen.rpartition(":")
        try:
            self._router = _bind(self._context, host, port)
        except ConfigError:
            self._context.destroy(0)
            raise
        self._fd = int(self._router.getsockopt(zmq.FD))
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._transport = transport or ZmqTransport(host.strip("[]"), clock)
        size = arena.num_bytes
        self._transport.register(Region(ARENA_REGION, arena.address, size, size, 1))
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="baton-cache-seal")
        self._source = Source(index, arena, ChangeLog(), self._threads, clock, ServedCounts())
        self._askers: dict[bytes, _Asker] = {}
        self._num_askers = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.malformed = 0

    def start(self) -> None:
        """Begins to listen to askers; from within the event loop."""
        self._index.on_change = self._source.log.add
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, self._drain)
        self._tasks.append(loop.create_task(self._tick()))

    def close(self) -> None:
        """Ends every session and every write; from within the event loop."""
        for task in self._tasks:
            task.cancel()
        asyncio.get_running_loop().remove_reader(self._fd)
        for asker in self._askers.values():
            asker.session.close()
        self._transport.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._router.close(0)
        self._context.destroy(0)

    def figures(self) -> dict[str, float]:
        """What `baton cache stats` shows of it."""
        counts = {f"served_{name}": float(value) for name, value in asdict(self._source.counts).items()}
        port = float(self.address.rpartition(":")[2])
        sending = sum(asker.session.num_sending for asker in self._askers.values())
        now = {"askers": len(self._askers), "sending": sending, "malformed": self.malformed, "port": port}
        return counts | {f"served_{name}": float(value) for name, value in now.items()}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.monotonic_s()
            for identity, asker in list(self._askers.items()):
                asker.session.reap()
                if asker.session.is_over or now_s - asker.heard_s > SILENCE_S:
                    self._end(identity)
                elif not asker.session.announce() and now_s - asker.told_s > ALIVE_S:
                    self._send(identity, words.Alive())
            self._drain()

    def _drain(self) -> None:
        """Takes what has come. ZMQ's descriptor tells of the first message only, so it is asked until it has none."""
        if self._router.closed:
            return
        for _ in range(MESSAGES_PER_TURN):
            parts = _next_message(self._router)
            if parts is None:
                return
            try:
                self._hear(parts)
            except ProtocolError:
                self.malformed += 1
                self._end(parts[0])
        asyncio.get_running_loop().call_soon(self._drain)

    def _hear(self, parts: list[bytes]) -> None:
        """Raises ProtocolError if a message is none of an asker's at this moment."""
        if len(parts) != 2:
            raise ProtocolError("not a message of one part")
        identity, message = parts
        word = words.decode_at_holder(message)
        asker = self._askers.get(identity)
        if asker is None:
            self._greet(identity, word)
            return
        asker.heard_s = self._clock.monotonic_s()
        match word:
            case words.Subscribe():
                asker.session.subscribe()
            case words.Fetch():
                asker.session.fetch(word)
            case words.Hello():
                raise ProtocolError("Hello was said already")

    def _greet(self, identity: bytes, word: words.ToHolder) -> None:
        if not isinstance(word, words.Hello):
            raise ProtocolError("the first word must be Hello")
        why = ""
        if word.version != words.VERSION:
            why = f"this cache server speaks version {words.VERSION} to its peers, the asker {word.version}"
        elif len(self._askers) >= MAX_SESSIONS:
            why = f"{MAX_SESSIONS} peers are connected already"
        else:
            why = self._admit(identity, word)
        self._send(identity, words.Welcome(words.VERSION, why))

    def _admit(self, identity: bytes, hello: words.Hello) -> str:
        """Why not; empty if a session has begun."""
        try:
            endpoint = self._transport.connect(hello.description)
        except TransferError as error:
            return str(error)[:1024]
        self._num_askers += 1
        send: Callable[[words.ToAsker], bool] = partial(self._send, identity)
        now_s = self._clock.monotonic_s()
        self._askers[identity] = _Asker(Session(self._source, -self._num_askers, endpoint, send), now_s, now_s)
        return ""

    def _end(self, identity: bytes) -> None:
        asker = self._askers.pop(identity, None)
        if asker is not None:
            asker.session.close()
            self._threads.submit(asker.session.endpoint.close)

    def _send(self, identity: bytes, word: words.ToAsker) -> bool:
        """False if the asker is gone or has too much unread."""
        try:
            self._router.send_multipart([identity, words.encode(word)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        asker = self._askers.get(identity)
        if asker is not None:
            asker.told_s = self._clock.monotonic_s()
        asyncio.get_running_loop().call_soon(self._drain)  # sending may have swallowed the news of a message
        return True


def _next_message(router: zmq.Socket[bytes]) -> list[bytes] | None:
    """At most three parts of the next message; None if there is none. More parts are dropped as they come."""
    parts: list[bytes] = []
    try:
        part = router.recv(zmq.NOBLOCK, copy=False)
        parts.append(part.bytes)
        while part.more:
            part = router.recv(zmq.NOBLOCK, copy=False)
            if len(parts) < 3:
                parts.append(part.bytes)
    except zmq.Again:
        return None
    return parts


def _bind(context: zmq.Context[zmq.Socket[bytes]], host: str, port: str) -> zmq.Socket[bytes]:
    address = bind_address(host.strip("[]")).removesuffix("*") + port
    router = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.ROUTER_MANDATORY, 1),
        (zmq.MAXMSGSIZE, MAX_ASKED_BYTES),
        (zmq.SNDHWM, MAX_QUEUED_MESSAGES),
        (zmq.RCVHWM, MAX_QUEUED_MESSAGES),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS),
        (zmq.IPV6, int("[" in address)),
    ):
        router.setsockopt(option, value)
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        router.close(0)
        raise ConfigError(f"--cache: cannot listen at {host}:{port} for peers: {error}") from error
    return router
