"""What all connections to one ucx transport share: its memory, who expects what in it, rooms, early frames.

    UcxCaller (one per connection) ──▶ UcxPayloads ──▶ UcxReceiver: regions, inbox, parking, rooms

Memory model: UCX keeps payloads until they are received: those of parked frames are counted, and at most a window per
peer of ours.
Threading: the I/O thread alone; the inbox is shared with the engine's thread under its lock.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import NamedTuple

from core.errors import TransferError
from transport.base import Blocks, Region
from transport.frames import Ask, Notice
from transport.landing import Inbox
from transport.parking import Parking
from transport.pieces import gather, lie_together
from transport.regions import resolve
from transport.ucx_rooms import Rooms
from transport.ucx_wire import MAX_MESSAGE_BYTES, Parcel, Part
from transport.ucx_worker import UcxWorker

_PARKED_COST_BYTES = 512


class Parked(NamedTuple):
    """A frame whose tag is not expected yet; its payload waits in UCX's memory. waiting: where it goes then."""

    waiting: collections.deque[tuple[Parcel | Notice, bool]]
    frame: Parcel | Notice
    until_s: float

    @property
    def tag(self) -> str:
        return self.frame.tag

    def cost(self) -> int:
        return _PARKED_COST_BYTES + (self.frame.size() if isinstance(self.frame, Parcel) else 0)


class UcxReceiver:
    """What all callers share."""

    def __init__(self, worker: UcxWorker, token: str, regions: Mapping[int, Region], inbox: Inbox) -> None:
        self.worker = worker
        self.token = token
        self.regions = regions
        self.inbox = inbox
        self.parking: Parking[Parked] = Parking()
        self.malformed = 0
        self.rooms = Rooms()

    def is_early(self, tag: str) -> bool:
        """Whether nobody expects this tag, nor has lately. Under the inbox's lock."""
        return self.inbox.find(tag) is None and not self.inbox.was_closed(tag)

    def unpark(self, now_s: float) -> None:
        """Hands frames back to their callers whose tag is expected now, or whose time is over."""
        for tag in list(self.parking.by_tag):
            with self.inbox.lock:
                is_known = not self.is_early(tag)
            if is_known or self.parking.by_tag[tag][0].until_s < now_s:
                for parked in self.parking.take(tag):
                    parked.waiting.append((parked.frame, False))

    def notify(self, frame: Notice) -> str:
        """Gives a notice to whoever expects it, or says why nobody does."""
        with self.inbox.lock:
            landing = self.inbox.find(frame.tag)
            if landing is None:
                return f"nothing is expected under tag {frame.tag!r}"
            return "" if landing.notify(frame.notice) else "too many notices wait"

    def payload_for(self, ask: Ask) -> memoryview:
        """The part of our memory that is asked for. Raises TransferError if it cannot be had so."""
        try:
            span = resolve(self.regions, blocks_of(ask), "own")
            if len(ask.ids) * span.num_bytes > MAX_MESSAGE_BYTES:
                raise TransferError("more than one frame was asked for")
        except TransferError:
            self.malformed += 1
            raise
        if span.region.device is not None and not lie_together(span, ask.ids):
            raise TransferError("blocks that lie apart in a GPU's memory must be asked for one by one")
        return gather(span, ask.ids)


def blocks_of(part: Part | Ask) -> Blocks:
    """The part of our memory that is named."""
    return Blocks(part.region, tuple(part.ids), part.start, part.num_bytes)
