"""Lets other hosts' cache servers ask this one for blocks of its arena.

    askers ══ ZMQ ROUTER at HOST:PORT ══▶ PeerServer ──▶ Session (one per asker): what is here, what changes
           ══ streams at HOST:any port ═▶ BlockServer (a thread per stream): the blocks themselves

Who is connected may read every block whose key it knows or is told: closed networks only. Nobody can write here.

Memory model: bounded by MAX_SESSIONS and the sockets' queues. Messages larger than any word of ours are dropped unread
by ZMQ.
Threading: the server's event loop, which never waits here; streams have threads of their own.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import partial

import zmq

from core.clock import Clock
from core.errors import ConfigError, ProtocolError
from kvcache import peer_words as words
from kvcache.change_log import ChangeLog
from kvcache.index import Index
from kvcache.peer_blocks import BlockServer
from kvcache.peer_session import Session
from transport.address import bind_address
from transport.mapping import Mapping

MAX_SESSIONS = 64
TICK_S = 0.05
ALIVE_S = 1.0
SILENCE_S = 5.0
"""An asker that says nothing for so long is gone; it says Alive every second."""

MESSAGES_PER_TURN = 64
MAX_QUEUED_MESSAGES = 256
HANDSHAKE_TIMEOUT_MS = 2000


class PeerServer:
    """Serves the complete blocks of `index` at `listen` (HOST:PORT; port 0: any free one) from `start` to `close`.

    Raises ConfigError if it cannot listen there.
    """

    def __init__(self, listen: str, index: Index, arena: Mapping, clock: Clock) -> None:
        self._index = index
        self._clock = clock
        self._log = ChangeLog()
        self._sessions: dict[bytes, Session] = {}
        self._ticking: asyncio.Task[None] | None = None
        host, _, port = listen.rpartition(":")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._router = _bind(self._context, host.strip("[]"), port)
            self.blocks = BlockServer(host.strip("[]"), index, arena)
        except ConfigError:
            self._context.destroy(0)
            raise
        self._fd = int(self._router.getsockopt(zmq.FD))
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.stream_port = self.blocks.port

    def start(self) -> None:
        """Begins to listen to askers; from within the event loop."""
        self._index.on_change = self._log.add
        self.blocks.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, self._drain)
        self._ticking = loop.create_task(self._tick())

    def close(self) -> None:
        """Ends every session and stream; from within the event loop."""
        if self._ticking is not None:
            self._ticking.cancel()
            asyncio.get_running_loop().remove_reader(self._fd)
        self.blocks.close()
        self._router.close(0)
        self._context.destroy(0)

    def figures(self) -> dict[str, float]:
        """What `baton cache stats` shows of it."""
        now = {"askers": len(self._sessions), "port": int(self.address.rpartition(":")[2])}
        return {f"served_{name}": float(value) for name, value in (asdict(self.blocks.counts) | now).items()}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.monotonic_s()
            for identity, session in list(self._sessions.items()):
                if now_s - session.heard_s > SILENCE_S:
                    del self._sessions[identity]
                elif not session.announce() and now_s - session.told_s > ALIVE_S:
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
                self.blocks.counts.malformed += 1
                self._sessions.pop(parts[0], None)
        asyncio.get_running_loop().call_soon(self._drain)

    def _hear(self, parts: list[bytes]) -> None:
        """Raises ProtocolError if a message is none of an asker's at this moment."""
        if len(parts) != 2:
            raise ProtocolError("not a message of one part")
        identity, message = parts
        word = words.decode_at_holder(message)
        session = self._sessions.get(identity)
        if session is None:
            self._greet(identity, word)
        elif isinstance(word, words.Hello):
            raise ProtocolError("Hello was said already")
        else:
            session.heard_s = self._clock.monotonic_s()
            if isinstance(word, words.Subscribe):
                session.subscribe()

    def _greet(self, identity: bytes, word: words.ToHolder) -> None:
        if not isinstance(word, words.Hello):
            raise ProtocolError("the first word must be Hello")
        if word.version != words.VERSION:
            why = f"this cache server speaks version {words.VERSION} to its peers, the asker {word.version}"
        elif len(self._sessions) >= MAX_SESSIONS:
            why = f"{MAX_SESSIONS} peers are connected already"
        else:
            send = partial(self._send, identity)
            self._sessions[identity] = Session(self._index, self._log, send, self._clock.monotonic_s())
            self._send(identity, words.Welcome(words.VERSION, "", self.stream_port, self.blocks.token))
            return
        self._send(identity, words.Welcome(words.VERSION, why))

    def _send(self, identity: bytes, word: words.ToAsker) -> bool:
        """False if the asker is gone or has too much unread."""
        try:
            self._router.send_multipart([identity, words.encode(word)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        session = self._sessions.get(identity)
        if session is not None:
            session.told_s = self._clock.monotonic_s()
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
    address = bind_address(host).removesuffix("*") + port
    router = context.socket(zmq.ROUTER)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.ROUTER_MANDATORY, 1),
        (zmq.MAXMSGSIZE, words.MAX_ASKED_BYTES),
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
