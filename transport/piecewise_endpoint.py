"""A connected peer whose link moves transfers in frames, on an I/O thread: what zmq and ucx have in common.

    write, read ──▶ checked against both sides' regions ──▶ Task ──▶ a transfer ──▶ link.start

Memory model and threading: see transport/pieces.py and the link's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

from transport.base import Blocks, Region
from transport.pieces import PiecewiseTransfer, Task
from transport.regions import check_pairing, check_words, resolve

T = TypeVar("T", bound=PiecewiseTransfer)
T_contra = TypeVar("T_contra", contravariant=True)


class Link(Protocol[T_contra]):
    """One connection. why_failed: empty while it connects or works."""

    why_failed: str

    def start(self, transfer: T_contra) -> None: ...

    def close(self) -> None: ...


class PiecewiseEndpoint(Generic[T]):
    """See transport/base.py. transfer_of: makes the transport's own kind of transfer."""

    def __init__(
        self,
        regions: Mapping[int, Region],
        remote: Mapping[int, Region],
        link: Link[T],
        transfer_of: Callable[[Task], T],
    ) -> None:
        self._regions = regions
        self._remote = remote
        self._link = link
        self._transfer_of = transfer_of

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> T:
        check_words(tag, notice)
        return self._start(local, remote, tag, notice)

    def read(self, remote: Blocks, local: Blocks) -> T:
        return self._start(local, remote, None, None)

    def failure(self) -> str:
        return self._link.why_failed

    def close(self) -> None:
        self._link.close()

    def _start(self, local: Blocks, remote: Blocks, tag: str | None, notice: bytes | None) -> T:
        near = resolve(self._regions, local, "local")
        far = resolve(self._remote, remote, "remote")
        check_pairing(local, near, remote, far)
        transfer = self._transfer_of(Task(near, local.ids, far, remote.ids, tag, notice))
        self._link.start(transfer)
        return transfer
