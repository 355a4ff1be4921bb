"""One NIXL peer as the engine's thread sees it: checks arguments, hands transfers to the transport's thread.

Memory model: transfers hold block numbers only. Threading: any thread; what is shared with the transport's thread is
handed over in `NixlThread.call`, which keeps the order.
"""

from __future__ import annotations

from collections.abc import Mapping

from transport.base import Blocks, Region
from transport.nixl_lane import Copy, NixlTransfer
from transport.nixl_link import NixlLink
from transport.nixl_thread import NixlThread
from transport.nixl_wire import NixlDescription
from transport.regions import check_pairing, check_words, resolve


class NixlEndpoint:
    """See transport/base.py. `regions` is the transport's table of our own regions."""

    def __init__(self, regions: Mapping[int, Region], description: NixlDescription, thread: NixlThread) -> None:
        self._regions = regions
        self._remote = {place.id: place.region() for place in description.regions}
        self._thread = thread
        self._why_failed = ""
        self._link = NixlLink(description, thread, self._fail)
        thread.call(self._link.start)

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> NixlTransfer:
        check_words(tag, notice)
        source = resolve(self._regions, local, "local")
        target = resolve(self._remote, remote, "remote")
        check_pairing(local, source, remote, target)
        return self._start(Copy(source, local.ids, target, remote.ids, tag, notice))

    def read(self, remote: Blocks, local: Blocks) -> NixlTransfer:
        source = resolve(self._remote, remote, "remote")
        target = resolve(self._regions, local, "local")
        check_pairing(local, target, remote, source)
        return self._start(Copy(target, local.ids, source, remote.ids))

    def failure(self) -> str:
        return self._why_failed

    def close(self) -> None:
        """Returns at once; transfers end within CLOSE_GRACE_S."""
        self._fail("the endpoint is closed")
        self._thread.call(lambda: self._link.end("the endpoint is closed"))

    def _start(self, copy: Copy) -> NixlTransfer:
        transfer = NixlTransfer(copy, self._thread.wake)
        if self._why_failed:
            transfer.finish(self._why_failed)
        else:
            self._thread.call(lambda: self._add(transfer))
        return transfer

    def _add(self, transfer: NixlTransfer) -> None:
        """On the thread."""
        if self._why_failed:
            transfer.finish(self._why_failed)
        else:
            self._link.add(transfer)

    def _fail(self, why: str) -> None:
        self._why_failed = self._why_failed or why
