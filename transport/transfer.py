"""Transfers that need no further work: already settled ones, and several seen as one.

Threading: a transfer belongs to the thread that started it.
"""

from __future__ import annotations

from collections.abc import Sequence

from transport.base import Transfer, TransferState


class SettledTransfer:
    """DONE, or FAILED with a reason, from the beginning. copy_s: of a copy that was made within the call."""

    __slots__ = ("_why_failed", "copy_s")

    def __init__(self, why_failed: str = "", copy_s: float = 0.0) -> None:
        self._why_failed = why_failed
        self.copy_s = copy_s

    def poll(self) -> TransferState:
        return TransferState.FAILED if self._why_failed else TransferState.DONE

    def cancel(self) -> None:
        return

    def failure(self) -> str:
        return self._why_failed


class JoinedTransfer:
    """DONE when all are, FAILED when none runs any more and one has failed."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self._transfers = transfers

    def poll(self) -> TransferState:
        states = [transfer.poll() for transfer in self._transfers]
        if TransferState.RUNNING in states:
            return TransferState.RUNNING
        return TransferState.FAILED if TransferState.FAILED in states else TransferState.DONE

    def cancel(self) -> None:
        for transfer in self._transfers:
            transfer.cancel()

    @property
    def copy_s(self) -> float:
        return sum(transfer.copy_s for transfer in self._transfers)

    def failure(self) -> str:
        return next((why for why in (transfer.failure() for transfer in self._transfers) if why), "")
