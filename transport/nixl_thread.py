"""The one thread of a NIXL transport: sleeps while nothing moves, drives NIXL's progress while something does.

    sockets, calls from the engine's thread ──▶ epoll ──▶ handlers ──▶ NixlAgent.progress ──▶ parts (peers, listener)

NIXL gives no descriptor to wait for, so whoever is about to write says so on its connection (`Busy`), and only then
both ends poll: without a pause for a millisecond after something happened, then more and more seldom. An idle
transport wakes once a second.
Memory model: parts belong to this thread; other threads hand over callables, run in order.
Threading: the thread takes every core that this process or its parent may use: an engine pins its own threads before it
makes a transport, and copies that share the computing core would halve both.
"""

from __future__ import annotations

import collections
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from core.clock import Clock
from core.errors import TransferError
from transport.affinity import widen_affinity
from transport.nixl_agent import NixlAgent

TICK_S = 1.0
SPIN_S = 0.001
_PAUSES_S = ((SPIN_S, 0.0), (0.05, 20e-6), (1.0, 200e-6), (float("inf"), 1e-3))
"""(so long after the last event, pause between two looks)."""

JOIN_TIMEOUT_S = 10.0
_log = logging.getLogger(__name__)


class Part(Protocol):
    """What the thread drives."""

    def turn(self, now_s: float) -> bool:
        """Does what can be done; whether anything was."""
        ...

    def is_busy(self) -> bool:
        """Whether progress must be driven for it."""
        ...

    def end(self, why: str) -> None:
        """Winds up; the part removes itself once it has ended."""
        ...


class NixlThread:
    """Runs from `start` until `close`. `deliver` gets every notification."""

    def __init__(self, agent: NixlAgent, clock: Clock) -> None:
        self.agent = agent
        self.clock = clock
        self.deliver: Callable[[bytes], None] = lambda notice: None
        self._parts: list[Part] = []
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._signals = _Signals()
        self._thread = threading.Thread(target=self._run, name="baton-nixl", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, what: Callable[[], None]) -> None:
        """Runs it on the thread, soon. From any thread."""
        self._calls.append(what)
        self._signals.wake()

    def wake(self) -> None:
        """Has the thread look at every part. From any thread."""
        self._signals.wake()

    def add(self, part: Part) -> None:
        """On the thread."""
        self._parts.append(part)

    def remove(self, part: Part) -> None:
        """On the thread."""
        self._parts.remove(part)

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Calls the handler for these events, which replace earlier ones. On the thread."""
        if fd in self._handlers:
            self._signals.epoll.modify(fd, events)
        else:
            self._signals.epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Before the descriptor is closed. On the thread."""
        if self._handlers.pop(fd, None) is not None:
            self._signals.epoll.unregister(fd)

    def close(self) -> bool:
        """Ends every part, then the thread: bounded by the parts' own limits. False if NIXL does not return: then the
        agent must be left alone."""
        self._signals.is_stopping = True
        self._signals.wake()
        self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            _log.error("NIXL has not returned for %.0f s; its memory stays registered", JOIN_TIMEOUT_S)
            return False
        self._signals.close()
        return True

    def discard(self) -> None:
        """Instead of `start`."""
        self._signals.close()

    def _run(self) -> None:
        widen_affinity()
        last_event_s = self.clock.monotonic_s()
        while self._parts or self._calls or not self._signals.is_stopping:
            try:
                has_moved = self._turn(self.clock.monotonic_s() - last_event_s)
            except Exception:  # noqa: BLE001 - a fault of ours must not leave transfers running for ever
                _log.exception("the nixl transport has failed")
                has_moved = self._fail()
            if has_moved:
                last_event_s = self.clock.monotonic_s()

    def _turn(self, quiet_s: float) -> bool:
        """One look at everything; whether anything happened."""
        has_moved = self._handle(self._wait(quiet_s))
        has_moved = self._progress() or has_moved
        now_s = self.clock.monotonic_s()
        for part in list(self._parts):
            has_moved = part.turn(now_s) or has_moved
        return has_moved

    def _fail(self) -> bool:
        for part in list(self._parts):
            part.end("the nixl transport has failed, see the log")
        return True

    def _wait(self, quiet_s: float) -> list[tuple[int, int]]:
        if any(part.is_busy() for part in self._parts) or self._signals.is_stopping:
            pause_s = next(pause_s for until_s, pause_s in _PAUSES_S if quiet_s < until_s)
            if pause_s:
                time.sleep(pause_s)
            else:
                os.sched_yield()  # a peer on the same core is what is being waited for: a tick is 4 ms
            return self._signals.epoll.poll(0)
        return self._signals.epoll.poll(TICK_S)

    def _handle(self, events: list[tuple[int, int]]) -> bool:
        for fd, mask in events:
            handler = self._handlers.get(fd)
            if fd == self._signals.wake_fd:
                self._signals.rest()
            elif handler is not None:
                handler(mask)
        num_calls = len(self._calls)
        for _ in range(num_calls):
            self._calls.popleft()()
        if self._signals.is_stopping:
            for part in list(self._parts):
                part.end("the transport is closed")
        return bool(events or num_calls)

    def _progress(self) -> bool:
        try:
            notices = self.agent.progress()
        except TransferError as error:
            _log.warning("%s", error)
            return False
        for notice in notices:
            self.deliver(notice)
        return bool(notices)


class _Signals:
    """How other threads reach the loop."""

    def __init__(self) -> None:
        self.is_stopping = False
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.epoll = select.epoll()
        self.epoll.register(self.wake_fd, select.EPOLLIN)

    def wake(self) -> None:
        with suppress(OSError):  # closed already: nobody is left to wake
            os.eventfd_write(self.wake_fd, 1)

    def rest(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)

    def close(self) -> None:
        fd, self.wake_fd = self.wake_fd, -1
        self.epoll.close()
        os.close(fd)
