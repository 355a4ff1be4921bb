"""What an instance knows of its paths to one peer, as it tells the proxy: the source of `/status` and the metrics."""

from __future__ import annotations

import enum

import msgspec


class PathState(enum.Enum):
    """CHOSEN: hand-offs take it. STANDBY: works, is slower or not measured yet. FAILED: not taken until a probe
    succeeds."""

    CHOSEN = "chosen"
    STANDBY = "standby"
    FAILED = "failed"


class Path(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One transport between the instance that says this, which sends, and the instance `peer`, which receives.

    write_gb_per_s: measured towards the peer, which is what a hand-off does; read_gb_per_s: from it; latency_us: of one
        block. 0 where it was not measured.
    num_failures: since this peer is known. why: for people: of the failure, or of the choice.
    sender_rank, receiver_rank: the tensor-parallel ranks that it joins.
    """

    peer: str
    boot_id: str
    transport: str
    state: PathState
    write_gb_per_s: float = 0.0
    read_gb_per_s: float = 0.0
    latency_us: float = 0.0
    num_failures: int = 0
    why: str = ""
    sender_rank: int = 0
    receiver_rank: int = 0

    @property
    def target(self) -> str:
        """The receiver, for people."""
        if self.sender_rank == self.receiver_rank == 0:
            return self.peer
        return f"{self.peer} (rank {self.sender_rank} to {self.receiver_rank})"
