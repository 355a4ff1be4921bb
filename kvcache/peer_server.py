"""Lets other hosts' cache servers ask this one for blocks of its arena.

    askers ══ ZMQ at HOST:PORT (Door) ═══▶ PeerServer ──▶ Session (one per asker): what is here, what changes
           ══ streams at HOST:PORT+1 ═══▶ BlockServer (a thread per stream): the blocks themselves

Who is connected may read every block whose key it knows or is told: closed networks only. Nobody can write here.

Memory model: bounded by MAX_SESSIONS, and as `peer_door` and `peer_blocks` say.
Threading: the server's event loop, which never waits here; streams have threads of their own.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from functools import partial

from core.clock import Clock
from core.errors import ConfigError, ProtocolError
from kvcache import peer_words as words
from kvcache.change_log import ChangeLog
from kvcache.index import Index
from kvcache.peer_blocks import BlockServer
from kvcache.peer_door import Door
from kvcache.peer_session import Session
from transport.mapping import Mapping

MAX_SESSIONS = 64
TICK_S = 0.05
ALIVE_S = 1.0
SILENCE_S = 5.0
"""An asker that says nothing for so long is gone; it says Alive every second."""

MESSAGES_PER_TURN = 64


class PeerServer:
    """Serves the complete blocks of `index` at `listen` (HOST:PORT; port 0: any free one) from `start` to `close`.
    Where PORT+1 is taken, streams have any other: peers are told.

    Raises ConfigError if it cannot listen there.
    """

    def __init__(self, listen: str, index: Index, arena: Mapping, clock: Clock) -> None:
        self._index = index
        self._clock = clock
        self._log = ChangeLog()
        self._sessions: dict[bytes, Session] = {}
        self._ticking: asyncio.Task[None] | None = None
        host, _, port = listen.rpartition(":")
        self.blocks = BlockServer(host.strip("[]"), _next_port(int(port)), index, arena)
        try:
            self._door = Door(host.strip("[]"), port)
        except ConfigError:
            self.blocks.close()
            raise
        self.address = self._door.address
        self.stream_port = self.blocks.port

    def start(self) -> None:
        """Begins to listen to askers; from within the event loop."""
        self._index.complete.on_change = self._log.add
        self.blocks.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._door.fd, self._drain)
        self._ticking = loop.create_task(self._tick())

    def close(self) -> None:
        """Ends every session and stream; from within the event loop."""
        if self._ticking is not None:
            self._ticking.cancel()
            asyncio.get_running_loop().remove_reader(self._door.fd)
        self.blocks.close()
        self._door.close()

    def figures(self) -> dict[str, float]:
        """What `baton cache stats` shows of it."""
        now = {"askers": len(self._sessions), "sending": self.blocks.num_sending}
        now |= {"port": int(self.address.rpartition(":")[2])}
        figures = {f"served_{name}": float(value) for name, value in (asdict(self.blocks.counts) | now).items()}
        figures["served_bytes"] = figures.pop("served_num_bytes")
        return figures

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
            self._door.watch()

    def _drain(self) -> None:
        """Takes what has come. ZMQ's descriptor tells of the first message only, so it is asked until it has none."""
        for _ in range(MESSAGES_PER_TURN):
            parts = self._door.next_message()
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
        if not self._door.send(identity, words.encode(word)):
            return False
        session = self._sessions.get(identity)
        if session is not None:
            session.told_s = self._clock.monotonic_s()
        asyncio.get_running_loop().call_soon(self._drain)  # sending may have swallowed the news of a message
        return True


def _next_port(port: int) -> int:
    """0, which is any, where there is none."""
    return port + 1 if 0 < port < 65535 else 0
