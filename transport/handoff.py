"""The life of a hand-off, as two tables without I/O: one for the instance that sends, one for the one that receives.

Rule 1: `advance` is the only function that changes a state. Rule 2: whatever is not in the table is impossible, and
says so by raising; callers ask `allows` where a late or repeated event is harmless. docs/handoff.md is drawn from
these tables by tests/transport/test_handoff.py, which also proves that every state reaches `released`.

In the sender, blocks of the engine are held only in MOVING, STOPPING and LANDED. In the receiver they are reserved
from RESERVED on, and may be given back to the engine only in RECEIVED and LOST: these two states are the fence.
"""

from __future__ import annotations

import enum

from core.errors import ProtocolError


class Sending(enum.Enum):
    """States of the prefill side."""

    NEW = "new"
    ASKED = "asked"  # the engine has the request, the decode side has not spoken
    OFFERED = "offered"  # the decode side has spoken, the engine has not seen the request
    ACCEPTED = "accepted"  # both; the engine may take blocks now
    MOVING = "moving"  # layers are computed and pushed
    LANDED = "landed"  # every byte is in place and D knows; the engine still holds the request
    STOPPING = "stopping"  # given up; a write may still be in flight
    RELEASED = "released"


class Receiving(enum.Enum):
    """States of the decode side."""

    NEW = "new"
    RESERVED = "reserved"  # blocks are allocated, Accept is sent
    CHECKING = "checking"  # Landed has come; the worker counts and compares digests
    REVOKING = "revoking"  # given up, but the sender may still write
    RECEIVED = "received"  # counted, equal; the engine may use the blocks
    LOST = "lost"  # nobody can write any more; the engine computes, or frees
    RELEASED = "released"


class Event(enum.Enum):
    """What can happen. Comments say who speaks."""

    ASK = "ask"  # P's engine wants to schedule the request
    ACCEPT = "accept"  # D's message
    DECLINE = "decline"  # D's message, or D's own decision
    REFUSE = "refuse"  # P's comparison failed, or its message
    START = "start"  # P's engine allocated blocks
    PUSHED = "pushed"  # P's worker: all transfers are done
    ABORT = "abort"  # P's engine lost the request, or a transfer failed
    QUIET = "quiet"  # P's worker: no transfer is in flight any more
    FINISH = "finish"  # P's engine got its blocks back
    RESERVE = "reserve"  # D's engine allocated blocks
    LANDED = "landed"  # P's message
    GOOD = "good"  # D's worker: complete and equal
    BAD = "bad"  # D's worker: incomplete or different
    CANCEL = "cancel"  # D's client is gone; to P: D's message
    CANCELLED = "cancelled"  # P's message: no write can follow
    FENCED = "fenced"  # D's transport proves that no write can follow
    DEADLINE = "deadline"
    PEER_LOST = "peer_lost"
    REPORTED = "reported"  # D's engine took note


_S, _R, _E = Sending, Receiving, Event

SENDING: dict[Sending, dict[Event, Sending]] = {
    _S.NEW: {_E.ASK: _S.ASKED, _E.ACCEPT: _S.OFFERED, _E.DECLINE: _S.RELEASED, _E.CANCEL: _S.RELEASED},
    _S.ASKED: {
        _E.ACCEPT: _S.ACCEPTED,
        _E.DECLINE: _S.RELEASED,
        _E.CANCEL: _S.RELEASED,
        _E.REFUSE: _S.RELEASED,
        _E.ABORT: _S.RELEASED,
        _E.DEADLINE: _S.RELEASED,
        _E.PEER_LOST: _S.RELEASED,
    },
    _S.OFFERED: {
        _E.ASK: _S.ACCEPTED,
        _E.CANCEL: _S.RELEASED,
        _E.REFUSE: _S.RELEASED,
        _E.DEADLINE: _S.RELEASED,
        _E.PEER_LOST: _S.RELEASED,
    },
    _S.ACCEPTED: {
        _E.START: _S.MOVING,
        _E.CANCEL: _S.RELEASED,
        _E.REFUSE: _S.RELEASED,
        _E.ABORT: _S.RELEASED,
        _E.DEADLINE: _S.RELEASED,
        _E.PEER_LOST: _S.RELEASED,
    },
    _S.MOVING: {
        _E.PUSHED: _S.LANDED,
        _E.CANCEL: _S.STOPPING,
        _E.ABORT: _S.STOPPING,
        _E.DEADLINE: _S.STOPPING,
        _E.PEER_LOST: _S.STOPPING,
    },
    _S.STOPPING: {_E.QUIET: _S.RELEASED, _E.PUSHED: _S.RELEASED},
    _S.LANDED: {_E.FINISH: _S.RELEASED},
    _S.RELEASED: {},
}

RECEIVING: dict[Receiving, dict[Event, Receiving]] = {
    _R.NEW: {_E.RESERVE: _R.RESERVED, _E.DECLINE: _R.RELEASED, _E.CANCEL: _R.RELEASED},
    _R.RESERVED: {
        _E.LANDED: _R.CHECKING,
        _E.REFUSE: _R.LOST,
        _E.ABORT: _R.LOST,
        _E.CANCEL: _R.REVOKING,
        _E.DEADLINE: _R.REVOKING,
        _E.PEER_LOST: _R.REVOKING,
    },
    _R.CHECKING: {_E.GOOD: _R.RECEIVED, _E.BAD: _R.LOST},
    _R.REVOKING: {
        _E.CANCELLED: _R.LOST,
        _E.LANDED: _R.LOST,
        _E.REFUSE: _R.LOST,
        _E.ABORT: _R.LOST,
        _E.FENCED: _R.LOST,
    },
    _R.RECEIVED: {_E.REPORTED: _R.RELEASED},
    _R.LOST: {_E.REPORTED: _R.RELEASED},
    _R.RELEASED: {},
}


def allows(state: Sending | Receiving, event: Event) -> bool:
    """Whether the event can happen in this state."""
    return event in (SENDING[state] if isinstance(state, Sending) else RECEIVING[state])


def advance_sending(state: Sending, event: Event) -> Sending:
    """The next state of the prefill side. Raises ProtocolError if the table has no such move."""
    if event not in SENDING[state]:
        raise ProtocolError(f"a sending hand-off that is {state.value} cannot see {event.value}")
    return SENDING[state][event]


def advance_receiving(state: Receiving, event: Event) -> Receiving:
    """The next state of the decode side. Raises ProtocolError if the table has no such move."""
    if event not in RECEIVING[state]:
        raise ProtocolError(f"a receiving hand-off that is {state.value} cannot see {event.value}")
    return RECEIVING[state][event]
