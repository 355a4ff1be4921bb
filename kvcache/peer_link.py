"""The line to one other host's cache server: what it has goes to the directory; while it is up, blocks can be read.

    directory ◀── Known, Changed ── thread ── DEALER ══▶ PeerServer of the other host
    any thread ──▶ streams: the blocks themselves        (PeerStreams, as Welcome describes them)

    DOWN ── connected, Welcome ──▶ UP ── silent, broken, garbage ──▶ DOWN, tried again after a pause that doubles

Memory model: what is known of the peer lives in the directory and goes with the line. Messages larger than any word of
ours are dropped unread by ZMQ.
Threading: one thread per peer owns the sockets; every other method is for any thread and never waits, `close` excepted.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import zmq

from core.clock import Clock
from core.errors import ProtocolError, TransferError
from kvcache import peer_words as words
from kvcache.breaker import Breaker
from kvcache.directory import Directory
from kvcache.keys import BlockKey, split_keys
from kvcache.peer_streams import PeerStreams
from transport.intake import Intake, IntakeLimits
from transport.monitor import ENDED, REFUSED, Monitor

CONNECT_TIMEOUT_S = 2.0
SILENCE_S = 3.0
"""A holder that says nothing for so long is taken to be gone; it says Alive every second."""

ALIVE_S = 1.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
TURN_MS = 200
MESSAGES_PER_TURN = 64
MAX_QUEUED_MESSAGES = 256
CLOSE_TIMEOUT_S = 5.0
LIMITS = IntakeLimits(connection_bytes=64 << 20, total_bytes=64 << 20, max_connections=1)


class PeerLink:
    """The line to the cache server at `peer` (HOST:PORT), kept up until `close`."""

    def __init__(self, peer: str, directory: Directory, clock: Clock) -> None:
        self.peer = peer
        self._host = peer.rpartition(":")[0].strip("[]")
        self._directory = directory
        self._clock = clock
        self._lock = threading.Lock()
        self._breaker = Breaker(clock)
        self._streams: PeerStreams | None = None
        self._pause_s = FIRST_PAUSE_S
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self.why_down = "it has not been reached yet"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._run, name=f"baton-peer-{peer}", daemon=True)
        self._thread.start()

    @property
    def streams(self) -> PeerStreams | None:
        """To read blocks over; None while the line is down."""
        return self._streams

    def allows(self) -> bool:
        """Whether to count on this peer now: of one whose blocks did not come, one try per pause."""
        with self._lock:
            return self._streams is not None and self._breaker.allows()

    @property
    def is_well(self) -> bool:
        with self._lock:
            return self._streams is not None and not self._breaker.is_open

    def good(self) -> None:
        """A block has come."""
        with self._lock:
            self._breaker.good()

    def bad(self) -> None:
        """A block has not come."""
        with self._lock:
            self._breaker.bad()

    def close(self) -> None:
        """Hangs up and ends the thread, if the resolver lets it."""
        self._closing = True
        self._ring()
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._bell)
            self._context.destroy(0)

    def _ring(self) -> None:
        with suppress(OSError):
            os.eventfd_write(self._bell, 1)

    def _run(self) -> None:
        while not self._closing:
            try:
                with self._context.socket(zmq.DEALER) as dealer:
                    self._converse(dealer)
            except Exception as error:  # noqa: BLE001 - whatever a peer says must not end the line to it for good
                self._hang_up(str(error))
            if not self._closing:
                zmq.zmq_poll([(self._bell, zmq.POLLIN)], int(self._pause_s * 1e3))
                self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        self._hang_up("the tier is closed")

    def _hang_up(self, why: str) -> None:
        with self._lock:
            streams, self._streams = self._streams, None
            self.why_down = why
        self._directory.forget(self.peer)
        if streams is not None:
            streams.close()

    def _converse(self, dealer: zmq.Socket[bytes]) -> None:
        """Until the line ends, which raises, or is closed."""
        monitor = _connect(self._context, dealer, f"tcp://{self.peer}")
        try:
            dealer.send(words.encode(words.Hello(words.VERSION)), zmq.NOBLOCK)
            line = _Line(dealer, monitor, int(self.peer.rpartition(":")[2]), self._clock)
            while not self._closing:
                zmq.zmq_poll([(dealer, zmq.POLLIN), (monitor.socket, zmq.POLLIN), (self._bell, zmq.POLLIN)], TURN_MS)
                with suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
                for word in line.take():
                    self._hear(word, line)
                line.check()
                line.say_alive()
        finally:
            monitor.close()

    def _hear(self, word: words.ToAsker, line: _Line) -> None:
        """Raises ProtocolError if a word is none that may come at this moment."""
        match word:
            case words.Welcome():
                self._welcome(word, line)
            case words.Alive():
                return
            case _ if self._streams is None:
                raise ProtocolError(f"{type(word).__name__} came before Welcome")
            case words.Known():
                if word.is_first:
                    self._directory.forget(self.peer)
                self._directory.add(self.peer, _keys(word.keys))
            case words.Changed():
                self._directory.add(self.peer, _keys(word.added))
                self._directory.discard(self.peer, _keys(word.removed))

    def _welcome(self, welcome: words.Welcome, line: _Line) -> None:
        if welcome.why or welcome.version != words.VERSION or line.is_welcome:
            raise ProtocolError(welcome.why or f"version {welcome.version}, or welcomed twice")
        line.is_welcome = True
        line.say(words.Subscribe())
        self._pause_s = FIRST_PAUSE_S
        with self._lock:
            self._streams = PeerStreams(self._host, welcome.port, welcome.token)
            self.why_down = ""


class _Line:
    """One connection: its sockets, when anything was heard or said last."""

    def __init__(self, dealer: zmq.Socket[bytes], monitor: Monitor, port: int, clock: Clock) -> None:
        self._dealer = dealer
        self._monitor = monitor
        self._intake = Intake(port, LIMITS)
        self._clock = clock
        self._heard_s = self._said_s = clock.monotonic_s()
        self.is_welcome = False

    def take(self) -> list[words.ToAsker]:
        """Some words that have come. Raises ProtocolError."""
        result = []
        for _ in range(MESSAGES_PER_TURN):
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            if len(parts) != 1:
                raise ProtocolError("it says something of several parts")
            if not self._intake.took(parts[0], len(parts[0])):
                raise ProtocolError("it does not speak ZMTP 3")
            result.append(words.decode_at_asker(parts[0].buffer))
        if result:
            self._heard_s = self._clock.monotonic_s()
        return result

    def check(self) -> None:
        """Raises TransferError if the connection is lost or silent, or says too much at once."""
        for event in self._monitor.take():
            if event.kind != zmq.EVENT_CONNECTED:
                raise TransferError("the connection is lost" if self.is_welcome else "nobody answers there")
            self._intake.opened(event.value)
        if self._intake.check():
            raise TransferError("it sent too much at once")
        patience_s = SILENCE_S if self.is_welcome else CONNECT_TIMEOUT_S
        if self._clock.monotonic_s() - self._heard_s > patience_s:
            raise TransferError(f"it has been silent for {patience_s:.0f} s")

    def say(self, word: words.ToHolder) -> None:
        """Raises zmq.ZMQError if the connection takes nothing more."""
        self._dealer.send(words.encode(word), zmq.NOBLOCK)
        self._said_s = self._clock.monotonic_s()

    def say_alive(self) -> None:
        if self.is_welcome and self._clock.monotonic_s() - self._said_s > ALIVE_S:
            self.say(words.Alive())


def _connect(context: zmq.Context[zmq.Socket[bytes]], dealer: zmq.Socket[bytes], address: str) -> Monitor:
    """Begins to connect; returns the monitor that tells of the connection's end. Raises zmq.ZMQError."""
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.RECONNECT_IVL, -1),
        (zmq.MAXMSGSIZE, words.MAX_MESSAGE_BYTES),
        (zmq.SNDHWM, MAX_QUEUED_MESSAGES),
        (zmq.RCVHWM, MAX_QUEUED_MESSAGES),
        (zmq.IPV6, int("[" in address)),
    ):
        dealer.setsockopt(option, value)
    monitor = Monitor(context, dealer, zmq.EVENT_CONNECTED | REFUSED | ENDED)
    try:
        dealer.connect(address)
    except zmq.ZMQError:
        monitor.close()
        raise
    return monitor


def _keys(joined: bytes) -> list[BlockKey]:
    try:
        return split_keys(joined)
    except ValueError as error:
        raise ProtocolError(str(error)) from error
