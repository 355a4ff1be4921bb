"""A payload on its way out: what one write has for it, or several.

    frames of transfers, in order ──▶ Outgoing.takes? ──▶ one Parcel, one payload, one answer, of up to 1 MiB

A payload costs some 60 us of Python at either end, and a model has a write per layer: where many layers wait, those of
few blocks would pay for each. Large pieces that lie together travel alone: nothing has to be copied for them.

Memory model: a payload is a view of local memory where its only piece lies together; otherwise a copy in a buffer of
the link's, which stays as it is until the parcel is answered.
Threading: the I/O thread alone.
"""

from __future__ import annotations

from transport.frames import MAX_IDS_PER_FRAME, Data, Piece
from transport.pieces import PiecewiseTransfer, gather, gather_into, lie_together, payload_bytes
from transport.ucx_wire import MAX_MESSAGE_BYTES, MAX_PARTS, Parcel, Part, part_of
from transport.zmq_buffers import FrameBuffers

LARGEST_JOINED_BYTES = MAX_MESSAGE_BYTES // 2
"""A larger piece gains little from company."""


class Outgoing:
    """One parcel."""

    def __init__(self, number: int, tag: str) -> None:
        self.number = number
        self._tag = tag
        self._parts: list[Part] = []
        self._pieces: list[tuple[PiecewiseTransfer, Piece]] = []
        self._num_bytes = 0
        self._num_ids = 0
        self._is_alone = False

    def takes(self, data: Data, transfer: PiecewiseTransfer, piece: Piece) -> bool:
        """Whether one more piece may travel in it."""
        return (
            not self._is_alone
            and data.tag == self._tag
            and len(self._parts) < MAX_PARTS
            and self._num_ids + len(data.ids) <= MAX_IDS_PER_FRAME
            and self._num_bytes + payload_bytes(piece) <= MAX_MESSAGE_BYTES
            and not _travels_alone(transfer, piece)
        )

    def add(self, data: Data, transfer: PiecewiseTransfer, piece: Piece) -> None:
        """The first piece, or one that it takes."""
        self._parts.append(part_of(data))
        self._pieces.append((transfer, piece))
        self._num_bytes += payload_bytes(piece)
        self._num_ids += len(data.ids)
        self._is_alone = self._is_alone or _travels_alone(transfer, piece)

    def parcel(self) -> Parcel:
        """What the receiver must know of it."""
        return Parcel(self.number, self._tag, self._parts)

    def payload(self, buffers: FrameBuffers) -> memoryview:
        """Its bytes. They stay as they are until the buffers hear of an answer."""
        if len(self._pieces) == 1:
            ((transfer, piece),) = self._pieces
            return gather(*transfer.local(piece), lambda num_bytes: buffers.lend(self.number, num_bytes))
        payload, first = buffers.lend(self.number, self._num_bytes), 0
        for transfer, piece in self._pieces:
            last = first + payload_bytes(piece)
            gather_into(payload[first:last], *transfer.local(piece))
            first = last
        return payload


def _travels_alone(transfer: PiecewiseTransfer, piece: Piece) -> bool:
    if payload_bytes(piece) > LARGEST_JOINED_BYTES or transfer.is_on_device():
        return True
    return payload_bytes(piece) > LARGEST_JOINED_BYTES // 2 and lie_together(*transfer.local(piece))
