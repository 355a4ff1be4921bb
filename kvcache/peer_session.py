"""One asker of this host's blocks, and what it has been told of them.

    Subscribe ──▶ every key in pieces ──▶ changes, as the log has them

Memory model: while everything is told, one list of keys; then a position in the log.
Threading: the server's event loop.
"""

from __future__ import annotations

from collections.abc import Callable

from kvcache import peer_words as words
from kvcache.change_log import ChangeLog
from kvcache.index import Index
from kvcache.keys import BlockKey, join_keys

MESSAGES_PER_TICK = 16


class Session:
    """`send`: one word to the asker, False if it cannot be queued now: then it is told later. heard_s, told_s: when it
    was heard and spoken to last, by the server's clock."""

    def __init__(self, index: Index, log: ChangeLog, send: Callable[[words.ToAsker], bool], now_s: float) -> None:
        self._index = index
        self._log = log
        self._send = send
        self.heard_s = self.told_s = now_s
        self._untold: list[BlockKey] | None = None
        self._is_first = True
        self._position: int | None = None

    def subscribe(self) -> None:
        """Everything first, then what changes."""
        self._untold, self._is_first = self._index.complete.keys(), True
        self._position = self._log.end

    def announce(self) -> bool:
        """Tells some news; whether any was told."""
        for count in range(MESSAGES_PER_TICK):
            if not self._tell():
                return count > 0
        return True

    def _tell(self) -> bool:
        """One message of news, if there is any and it can be queued."""
        if self._untold is not None:
            return self._tell_everything(self._untold)
        if self._position is None:
            return False
        changes = self._log.since(self._position, words.MAX_KEYS)
        if changes is None:
            self.subscribe()
            return True
        latest = dict(changes)
        added = join_keys(key for key, is_there in latest.items() if is_there)
        removed = join_keys(key for key, is_there in latest.items() if not is_there)
        if not changes or not self._send(words.Changed(added, removed)):
            return False
        self._position += len(changes)
        return True

    def _tell_everything(self, untold: list[BlockKey]) -> bool:
        if not self._send(words.Known(join_keys(untold[-words.MAX_KEYS :]), self._is_first)):
            return False
        del untold[-words.MAX_KEYS :]
        self._is_first = False
        self._untold = untold or None
        return True
