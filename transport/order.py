"""What one transfer does: which bytes of which blocks go where, under which tag, with which notice behind them.

Memory model: spans hold addresses, and both were checked when the order was made. Where the peer's memory is not mapped
yet, its spans count from address 0; `aimed` puts the mapped region in.
Threading: immutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from transport.base import Blocks, Region
from transport.regions import Span, check_pairing, check_words, resolve

Regions = Mapping[int, Region]


class Order(NamedTuple):
    """A write (with a tag) or a read (without)."""

    local: Span
    local_ids: tuple[int, ...]
    remote: Span
    remote_ids: tuple[int, ...]
    tag: str | None = None
    notice: bytes | None = None

    def aimed(self, remote_regions: Regions) -> Order:
        """The same with the peer's memory where it lies now."""
        there = Span(remote_regions[self.remote.region.id], self.remote.start, self.remote.num_bytes)
        return Order(self.local, self.local_ids, there, self.remote_ids, self.tag, self.notice)

    @property
    def source(self) -> tuple[Span, tuple[int, ...]]:
        return (self.remote, self.remote_ids) if self.tag is None else (self.local, self.local_ids)

    @property
    def target(self) -> tuple[Span, tuple[int, ...]]:
        return (self.local, self.local_ids) if self.tag is None else (self.remote, self.remote_ids)


def order_write(own: Regions, peers: Regions, tag: str, local: Blocks, remote: Blocks, notice: bytes | None) -> Order:
    """Raises TransferError if the arguments do not fit the regions, or each other."""
    check_words(tag, notice)
    return _order(own, peers, local, remote, tag, notice)


def order_read(own: Regions, peers: Regions, remote: Blocks, local: Blocks) -> Order:
    """Raises TransferError if the arguments do not fit the regions, or each other."""
    return _order(own, peers, local, remote, None, None)


def _order(own: Regions, peers: Regions, local: Blocks, remote: Blocks, tag: str | None, notice: bytes | None) -> Order:
    here, there = resolve(own, local, "local"), resolve(peers, remote, "remote")
    check_pairing(local, here, remote, there)
    return Order(here, local.ids, there, remote.ids, tag, notice)
