"""The one thread of a ucx transport: polls while something is under way, sleeps otherwise.

    sockets, UCX's descriptor, the doorbell ──▶ epoll ──▶ UcxWorker.progress ──▶ frames to links and callers ──▶ turns

ucxx's own thread mode costs eight times the latency of polling, and polling costs a core. Here the thread polls while
something happens, looks BUSY_TURNS times more while an answer is awaited, and then arms UCX's descriptor and sleeps.
Memory model: links and callers belong to this thread; other threads hand over links.
Threading: one thread from `start` to `close`; it never waits for a single peer.
"""

from __future__ import annotations

import collections
import logging
import os
import secrets
import select
import threading
import time

from core.clock import Clock
from core.errors import BatonError, TransferError
from transport.affinity import widen_affinity
from transport.doorbell import Doorbell
from transport.ucx_caller import GREETING_TIMEOUT_S, UcxCaller
from transport.ucx_library import make_current
from transport.ucx_link import UcxLink
from transport.ucx_receiver import UcxReceiver
from transport.ucx_socket import UcxDoor, UcxSocket
from transport.ucx_worker import UcxWorker

BUSY_TURNS = 20
IDLE_TURNS = 10
"""Looks without an event before the thread sleeps; a look takes a few microseconds."""

DEADLINE_CHECK_S = 0.1
TICK_S = 1.0
"""An idle thread looks around once a second: UCX itself checks its connections then."""

MAX_LAST_TURNS = 100
LAST_TURN_S = 0.01
"""For how long a closing transport waits for receives that the library has begun."""

BATCHES_PER_TURN = 64
MAX_CALLERS = 256
_log = logging.getLogger(__name__)


class UcxThread:
    """Owns the worker, the door and every connection of one transport."""

    def __init__(self, worker: UcxWorker, door: UcxDoor, receiver: UcxReceiver, clock: Clock) -> None:
        self._worker = worker
        self._door = door
        self._clock = clock
        self._parts = _Parts(receiver)
        self._doorbell = Doorbell()
        self._epoll = select.epoll()
        self._thread = threading.Thread(target=self._run, name="baton-ucx", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        for fd in (self._door.fileno(), self._worker.fd, self._doorbell.fd):
            self._epoll.register(fd, select.EPOLLIN)
        self._thread.start()

    def is_open(self) -> bool:
        return not self._doorbell.is_closed

    def wake(self) -> None:
        """Makes the thread take a turn."""
        self._doorbell.ring()

    def adopt(self, link: UcxLink) -> None:
        """Hands a new link to the thread."""
        self._parts.new_links.append(link)
        self._doorbell.ring()

    def use_device(self, device: int) -> None:
        """UCX moves a GPU's memory only where the GPU's context is the thread's own."""
        self._parts.new_devices.append(device)
        self._doorbell.ring()

    def close(self) -> None:
        """Ends every connection, then the thread."""
        if self.is_open():
            self._doorbell.close()
            self._thread.join()
            self._doorbell.free()

    def malformed(self) -> int:
        """Messages that were dropped because they do not parse or contradict themselves."""
        links = list(self._parts.links.values())
        return self._parts.receiver.malformed + sum(link.malformed for link in links)

    def _run(self) -> None:
        widen_affinity()
        num_quiet = 0
        while self.is_open():
            try:
                may_sleep = num_quiet >= IDLE_TURNS and (num_quiet >= BUSY_TURNS or not self._parts.are_busy())
                ready = {fd for fd, _ in self._epoll.poll(self._pause_s() if may_sleep else 0)}
                ready.discard(self._worker.fd)  # stays ready until it is armed
                has_moved = self._worker.progress() or bool(ready)
                if has_moved or may_sleep:
                    self._turn(ready)
                else:
                    os.sched_yield()  # a peer on the same core need not wait for a tick
                num_quiet = 0 if has_moved else num_quiet + 1
            except Exception:  # noqa: BLE001 - a fault of ours must not leave transfers running for ever
                _log.exception("ucx transport: a turn failed; every connection is ended")
                self._end_all("the ucx transport has failed, see its log")
        self._end_all("the transport is closed")
        for _ in range(MAX_LAST_TURNS):
            if not self._worker.is_ending():
                break
            self._worker.progress()
            self._worker.reap()
            time.sleep(LAST_TURN_S)
        self._worker.abandon()
        self._epoll.close()
        self._door.close()

    def _pause_s(self) -> float:
        """How long nothing needs to be looked at, unless a descriptor says so."""
        self._worker.sweep(self._parts.ids())
        if not self._worker.arm():
            return 0
        return DEADLINE_CHECK_S if self._parts.have_deadlines() or self._worker.is_ending() else TICK_S

    def _turn(self, ready: set[int]) -> None:
        """One look at everything."""
        now_s = self._clock.monotonic_s()
        if self._doorbell.fd in ready:
            self._doorbell.answer()
        while self._parts.new_devices:
            make_current(self._parts.new_devices.popleft())
        while self._parts.new_links:
            self._open(self._parts.new_links.popleft())
        if self._door.fileno() in ready:
            self._accept(now_s)
        self._take_controls()
        self._worker.reap()
        self._parts.receiver.unpark(now_s)
        for id_, link in list(self._parts.links.items()):
            if not link.turn(now_s, self._parts.sockets[id_].fileno() in ready):
                self._drop_link(id_, link)
        for id_, caller in list(self._parts.callers.items()):
            self._turn_caller(id_, caller, now_s, ready)

    def _take_controls(self) -> None:
        for _ in range(BATCHES_PER_TURN):
            control = self._worker.next_control()
            if control is None:
                return
            link, caller = self._parts.links.get(control.id), self._parts.callers.get(control.id)
            if link is not None:
                link.take_control(control.message)
            elif caller is not None:
                try:
                    caller.take_control(control.message)
                except BatonError as error:
                    self._parts.receiver.malformed += 1
                    self._drop_caller(control.id, caller, str(error))

    def _open(self, link: UcxLink) -> None:
        id_ = self._parts.new_id()
        try:
            socket = link.open(self._worker, id_)
        except TransferError as error:
            link.fail(str(error))
            link.shut()
            return
        self._parts.links[id_] = link
        self._watch(id_, socket, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _accept(self, now_s: float) -> None:
        while (socket := self._door.accept()) is not None:
            if len(self._parts.callers) >= MAX_CALLERS:
                socket.close()
                continue
            id_ = self._parts.new_id()
            deadline_s = now_s + GREETING_TIMEOUT_S
            self._parts.callers[id_] = UcxCaller(self._parts.receiver, socket, id_, deadline_s)
            self._watch(id_, socket, select.EPOLLIN)

    def _watch(self, id_: int, socket: UcxSocket, events: int) -> None:
        self._parts.sockets[id_] = socket
        self._epoll.register(socket.fileno(), events)

    def _turn_caller(self, id_: int, caller: UcxCaller, now_s: float, ready: set[int]) -> None:
        try:
            caller.turn(now_s, caller.socket.fileno() in ready)
        except BatonError as error:
            self._parts.receiver.malformed += not caller.is_greeted()
            self._drop_caller(id_, caller, str(error))

    def _drop_link(self, id_: int, link: UcxLink) -> None:
        del self._parts.links[id_]
        del self._parts.sockets[id_]
        link.shut()

    def _drop_caller(self, id_: int, caller: UcxCaller, why: str) -> None:
        del self._parts.callers[id_]
        del self._parts.sockets[id_]
        _log.info("ucx transport: hangs up on a peer: %s", why)
        caller.refuse(why)
        caller.close()

    def _end_all(self, why: str) -> None:
        for link in self._parts.new_links:
            link.fail(why)
            link.shut()
        self._parts.new_links.clear()
        for id_, link in list(self._parts.links.items()):
            link.fail(why)
            self._drop_link(id_, link)
        for id_, caller in list(self._parts.callers.items()):
            self._drop_caller(id_, caller, why)


class _Parts:
    """The connections, by the id under which their peers write to us."""

    def __init__(self, receiver: UcxReceiver) -> None:
        self.receiver = receiver
        self.links: dict[int, UcxLink] = {}
        self.callers: dict[int, UcxCaller] = {}
        self.sockets: dict[int, UcxSocket] = {}
        self.new_links: collections.deque[UcxLink] = collections.deque()
        self.new_devices: collections.deque[int] = collections.deque()

    def ids(self) -> dict[int, UcxSocket]:
        """Every id in use."""
        return self.sockets

    def new_id(self) -> int:
        """Unguessable, so that no peer can write in another's name."""
        while True:
            id_ = 1 + secrets.randbelow((1 << 32) - 1)
            if id_ not in self.sockets:
                return id_

    def are_busy(self) -> bool:
        """Whether something is expected to happen within microseconds."""
        return any(link.is_busy() for link in self.links.values()) or any(
            caller.is_busy() for caller in self.callers.values()
        )

    def have_deadlines(self) -> bool:
        """Whether something must be looked at again soon, even if nothing happens."""
        return (
            bool(self.receiver.parking.by_tag)
            or any(link.has_deadline() for link in self.links.values())
            or any(caller.is_busy() or not caller.is_greeted() for caller in self.callers.values())
        )
