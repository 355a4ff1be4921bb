"""One write or read over zmq: a `PiecewiseTransfer` whose frames are messages of one header and at most one payload.

Memory model and threading: see transport/pieces.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from transport.frames import Data, Piece
from transport.pieces import PiecewiseTransfer
from transport.pieces import Task as Task
from transport.pieces import gather as gather
from transport.pieces import payload_bytes as payload_bytes
from transport.pieces import scatter as _scatter
from transport.regions import Span
from transport.zmq_buffers import FrameBuffers
from transport.zmq_wire import encode


class ZmqTransfer(PiecewiseTransfer):
    """See transport/pieces.py."""

    def next_frame(self, number: int, buffers: FrameBuffers) -> tuple[Piece | None, list[bytes | memoryview]] | None:
        """The next message under this number, gathered into these; None where nothing is left to send."""
        taken = self.take(number)
        if taken is None:
            return None
        piece, frame = taken
        if piece is None or not isinstance(frame, Data):
            return piece, [encode(frame)]
        return piece, [encode(frame), gather(*self.local(piece), lambda num_bytes: buffers.lend(number, num_bytes))]

    def fill(self, piece: Piece, payload: zmq.Frame) -> bool:
        """Puts what was asked for in place; False if it is not that."""
        if not self.is_read() or len(payload) != payload_bytes(piece):
            return False
        scatter(payload, *self.local(piece))
        return True


def scatter(payload: zmq.Frame, span: Span, ids: Sequence[int]) -> None:
    """Puts a payload of exactly the right size in place."""
    _scatter(payload.buffer, span, ids)
