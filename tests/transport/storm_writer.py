"""The writing process of the storm of cancels: python -m tests.transport.storm_writer SCHEME DESCRIPTION_HEX

Reads {"write": tag, "slot": n, "ids": [...], "fill": n} and {"cancel": tag}, one JSON line each; says {"ended": tag}
when no write under the tag is running any more. One block at a time, so that cancels come in the middle.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tests.transport.memory import Owned
from transport import native
from transport.base import Transfer, TransferState
from transport.schemes import make_transport

NUM_SLOTS = 8
BLOCKS_PER_TAG = 8
BLOCK_BYTES = 128 << 10


def content(fill: int, position: int) -> bytes:
    """What the block at this position of a prompt holds."""
    return bytes([1 + (fill * 7 + position) % 251]) * BLOCK_BYTES


@dataclass
class Push:
    """One tag that is being written."""

    first: int
    left: deque[tuple[int, int]]
    transfers: list[Transfer] = field(default_factory=list)
    is_cancelled: bool = False


class Writer:
    def __init__(self, scheme: str, description: str) -> None:
        native.compile_now()  # large copies are shared then, where the scheme does that
        self.owned = Owned(make_transport(scheme, "127.0.0.1"), BLOCK_BYTES, NUM_SLOTS * BLOCKS_PER_TAG)
        self.owned.transport.describe()
        self.endpoint = self.owned.transport.connect(bytes.fromhex(description))
        self.pushes: dict[str, Push] = {}

    def hear(self, words: dict[str, Any]) -> None:
        if "cancel" in words:
            push = self.pushes.get(words["cancel"])
            if push is None:
                say({"ended": words["cancel"]})
                return
            push.is_cancelled = True
            for transfer in push.transfers:
                transfer.cancel()
            return
        first = words["slot"] * BLOCKS_PER_TAG
        for position in range(len(words["ids"])):
            self.owned.put(first + position, content(words["fill"], position))
        self.pushes[words["write"]] = Push(first, deque(enumerate(words["ids"])))

    def turn(self) -> None:
        for tag, push in list(self.pushes.items()):
            if push.left and not push.is_cancelled:
                self._write_one(tag, push)
            is_quiet = all(transfer.poll() is not TransferState.RUNNING for transfer in push.transfers)
            if is_quiet and (push.is_cancelled or not push.left):
                del self.pushes[tag]
                say({"ended": tag})

    def _write_one(self, tag: str, push: Push) -> None:
        position, block_id = push.left.popleft()
        notice = None
        if not push.left:
            notice = str(self.owned.digest(range(push.first, push.first + position + 1))).encode()
        local, remote = self.owned.blocks([push.first + position]), self.owned.blocks([block_id])
        push.transfers.append(self.endpoint.write(tag, local, remote, notice))


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


def main(scheme: str, description: str) -> None:
    writer, waiting = Writer(scheme, description), b""
    while True:
        readable, _, _ = select.select([0], [], [], 0 if writer.pushes else 0.2)
        if readable:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, waiting = (waiting + chunk).split(b"\n")
            for line in lines:
                writer.hear(json.loads(line))
        writer.turn()


if __name__ == "__main__":
    main(*sys.argv[1:])
