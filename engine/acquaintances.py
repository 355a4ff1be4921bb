"""Who sends to whom: introduces instances before the first hand-off, and keeps what their workers say of the paths.

    proxy ── peers ──▶ D: Await ──▶ D's worker        D ── Greeting ──▶ P: Meet ──▶ P's worker: connect, measure
                                                                        P's worker ── News ──▶ log, heartbeat, /status

Threads: the join thread brings peers, the control plane's thread greetings and ticks; one lock guards the table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from vllm.logger import init_logger

from core.clock import Clock
from core.errors import TransferError
from core.handoff import Peer
from core.layout import KVLayout
from core.path import Path, PathState
from transport.door import Await, DoorKey, Meet, Named, News, Word
from transport.messages import Greeting, Message
from transport.runs import lanes

GREET_AGAIN_S = 60.0
"""A peer that has lost sight of us meanwhile has forgotten what it measured."""

_log = init_logger("vllm.baton")


@dataclass(frozen=True)
class OwnRank:
    """A worker of ours, which is one tensor-parallel rank: the transports that it offers, best first, and where it
    listens to us."""

    schemes: list[tuple[str, bytes]]
    door: str


class Acquaintances:
    """One instance's. `send`: one message to one peer, without waiting; False if it could not be queued."""

    def __init__(
        self,
        me: Peer,
        layout: KVLayout,
        ranks: Sequence[OwnRank],
        send: Callable[[Peer, Message], bool],
        clock: Clock,
    ) -> None:
        self._layout = layout
        self._schemes = [rank.schemes for rank in ranks]
        self._send = send
        self._clock = clock
        self._lock = threading.Lock()
        self._greeted_s: dict[str, float] = {}
        self._paths: list[list[Path]] = [[] for _ in ranks]
        self._keys: list[DoorKey] = []
        try:
            for rank in ranks:
                self._keys.append(DoorKey(rank.door))
            self._say_to_all(Named(me.boot_id))
        except TransferError as error:
            self.close()
            _log.warning("%s: paths are not measured, the first transport that both sides have is taken", error)

    def on_peers(self, peers: list[Peer]) -> None:
        """The proxy names the instances that may send to us now: each is greeted, now and then. The join thread's."""
        if not self._keys:
            return
        now_s = self._clock.monotonic_s()
        greeted_s = {peer.boot_id: self._greeted_s.get(peer.boot_id, -GREET_AGAIN_S) for peer in peers}
        for peer in peers:
            if now_s - greeted_s[peer.boot_id] >= GREET_AGAIN_S:
                self._say_to_all(Await(peer.boot_id))
                if self._send(peer, Greeting(self._schemes)):
                    greeted_s[peer.boot_id] = now_s
        self._greeted_s = greeted_s

    def on_greeting(self, sender: Peer, greeting: Greeting) -> None:
        """An instance that we may send to expects to be measured: each of our ranks meets those that it writes to."""
        if not self._keys:
            return
        try:
            between = lanes(self._layout, len(self._keys), len(greeting.schemes))
        except TransferError as error:
            _log.warning("paths to %s are not measured: %s", sender.name, error)
            return
        for sending, receiving in dict.fromkeys((lane.sender, lane.receiver) for lane in between):
            self._keys[sending].say(Meet(sender, greeting.schemes[receiving], receiving))

    def tick(self) -> None:
        """Hears what our workers have to say."""
        for rank, key in enumerate(self._keys):
            for word in key.listen():
                if isinstance(word, News):
                    self._take(rank, word)

    def paths(self) -> list[Path]:
        """What is known of the paths to those we send to."""
        with self._lock:
            return [path for paths in self._paths for path in paths]

    def close(self) -> None:
        """Leaves the doors."""
        for key in self._keys:
            key.close()
        self._keys = []

    def _say_to_all(self, word: Word) -> None:
        for key in self._keys:
            key.say(word)

    def _take(self, rank: int, news: News) -> None:
        paths = [msgspec.structs.replace(path, sender_rank=rank) for path in news.paths]
        with self._lock:
            before = {(path.boot_id, path.receiver_rank, path.transport): path for path in self._paths[rank]}
            self._paths[rank] = paths if news.is_first else self._paths[rank] + paths
        for path in paths:
            self._tell(path, before.get((path.boot_id, path.receiver_rank, path.transport)))

    def _tell(self, path: Path, before: Path | None) -> None:
        if path.num_failures > (before.num_failures if before is not None else 0):
            _log.warning("KV to %s: %s has failed: %s", path.target, path.transport, path.why)
        is_new = before is None or (before.state, before.write_gb_per_s) != (path.state, path.write_gb_per_s)
        if is_new and path.state is PathState.CHOSEN:
            _log.info("KV to %s goes by %s: %s", path.target, path.transport, describe(path))
        elif is_new and path.state is PathState.STANDBY and path.write_gb_per_s:
            _log.info("KV to %s could go by %s: %s", path.target, path.transport, describe(path))


def describe(path: Path) -> str:
    """A path's figures for people."""
    if not path.write_gb_per_s:
        return path.why
    figures = f"{path.write_gb_per_s:.2f} GB/s there, {path.read_gb_per_s:.2f} back, {path.latency_us:.0f} us a block"
    return f"{figures} ({path.why})" if path.why else figures
