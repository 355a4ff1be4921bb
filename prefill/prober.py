"""The thread that measures paths: peers are introduced, connected to and probed while the engine does something else.

    door ── Named, Await, Meet ──▶ scratch landings, connections ──▶ probe: connect, measure, compare ──▶ News ──▶ door

Memory and threads: one daemon thread per worker, which waits for peers so that the engine's thread never does. It owns
the door; what it shares with the engine's thread is behind the locks of `Connections` and of the guarded transports.
"""

from __future__ import annotations

import logging
import threading

from core.clock import Clock
from core.errors import TransferError
from prefill.connections import Connections
from prefill.peer_paths import Far, Way
from transport.door import Await, Door, Meet, Named, News, Word
from transport.probe import PATIENT_BUDGET_S, PROBE_BUDGET_S, measure, wait_ready
from transport.scratch import ScratchLandings, probe_tag

TURN_S = 0.5
CLOSE_TIMEOUT_S = 2.0
PATHS_PER_NEWS = 128
_log = logging.getLogger(__name__)


class Prober:
    """Runs from construction until `close`."""

    def __init__(self, connections: Connections, landings: ScratchLandings, door: Door, clock: Clock) -> None:
        self._connections = connections
        self._landings = landings
        self._door = door
        self._clock = clock
        self._boot_id = ""
        self._version = 0
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="baton-probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Close the connections first: that ends what it waits for."""
        self._is_closing.set()
        self._door.wake()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            try:
                self._turn()
            except Exception:  # noqa: BLE001 - one peer's nonsense must not end the measuring of all others
                _log.exception("measuring paths: a turn failed")
                self._is_closing.wait(TURN_S)
        self._landings.close()
        self._door.close()

    def _turn(self) -> None:
        for word in self._door.hear(TURN_S):
            self._take(word)
        self._connections.sweep()
        for far in self._connections.due() if self._boot_id else ():
            if not self._is_closing.is_set():
                probe(self._connections, far, self._boot_id, self._clock)
        version, paths = self._connections.news(self._version)
        if version == self._version or not self._door.is_attended():
            return
        for first in range(0, max(len(paths), 1), PATHS_PER_NEWS):
            self._door.say(News(first == 0, paths[first : first + PATHS_PER_NEWS]))
        self._version = version

    def _take(self, word: Word) -> None:
        if isinstance(word, Named):
            self._boot_id, self._version = word.boot_id, -1
        elif isinstance(word, Await):
            self._landings.expect(word.boot_id)
        elif isinstance(word, Meet):
            try:
                self._connections.greet(word.peer, word.schemes, word.rank)
            except TransferError as error:
                _log.warning("%s: %s", word.peer.name, error)


def probe(connections: Connections, far: Far, own_boot_id: str, clock: Clock) -> None:
    """Measures every path to one receiver, one after the other, and lets `connections` choose."""
    tag = probe_tag(own_boot_id)
    opened = connections.open_all(far)
    ready = [way for way in opened if _is_ready(connections, way, tag, clock)]
    if len(opened) == 1:
        for way in ready:
            connections.measured(way, None)
    elif not _measure(connections, ready, tag, clock, PROBE_BUDGET_S / max(len(ready), 1)):
        _measure(connections, ready, tag, clock, PATIENT_BUDGET_S)
    connections.is_measured(far)


def _measure(connections: Connections, ways: list[Way], tag: str, clock: Clock, budget_s: float) -> bool:
    """Whether any of them moved something in time; `budget_s` for each."""
    moved = False
    for way in ways:
        try:
            measurement = measure(way.endpoint, tag, clock, budget_s)
            connections.measured(way, measurement)
            moved = moved or measurement.write_s > 0
        except TransferError as error:
            connections.unreachable(way, str(error))
    return moved


def _is_ready(connections: Connections, way: Way, tag: str, clock: Clock) -> bool:
    try:
        wait_ready(way.endpoint, tag, clock)
    except TransferError as error:
        connections.unreachable(way, str(error))
        return False
    return True
