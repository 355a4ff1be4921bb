"""The connector's side of the shm transport: copies into the owner's memory, then says so.

    write ──▶ waiting (in order) ──▶ Opening(tag) once ──▶ memmove ──▶ Finished(tag, notice)
                                                           small: within `write`; large: shared with helpers

Memory model: copies begin under the endpoint's lock; `close` waits for those that helpers have begun
(transport/shared_copies.py) and unmaps under the same lock.
Threading: a short-lived thread connects and then carries out the writes that waited for it. Afterwards small copies are
made within `write`; large ones by helpers, until a notice or a read has to wait for them and takes part. A write hears
of an owner that is gone only where it says something to it (the opening and the notice); `poll` and `failure` ask, and
the transport's listener tells at once, so that the memory of a dead owner is not kept. Only where the owner does not
empty its socket does a write wait, for `poll`.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping

from core.errors import TransferError
from transport.base import Blocks, Region, Transfer, TransferState
from transport.copying import plans_of, plans_of_blocks
from transport.order import Order, order_read, order_write
from transport.regions import check_words
from transport.shared_copies import Helpers, SharedCopies
from transport.shm_link import ShmLink
from transport.shm_listener import ShmListener
from transport.shm_wire import Finished, ShmDescription
from transport.transfer import JoinedTransfer, SettledTransfer


class ShmTransfer:
    """One copy with a notice or an opening, or a read. Its state is changed by its endpoint alone, under the endpoint's
    lock."""

    def __init__(self, endpoint: ShmEndpoint, order: Order) -> None:
        self._endpoint = endpoint
        self.order = order
        self.is_copied = False
        self.copy_s = 0.0
        self.state = TransferState.RUNNING
        self.why_failed = ""

    def poll(self) -> TransferState:
        if self.state is TransferState.RUNNING:
            self._endpoint.advance()
        return self.state

    def cancel(self) -> None:
        self._endpoint.cancel(self)

    def failure(self) -> str:
        return self.why_failed

    def fail(self, why: str) -> None:
        """Ends it unless it has ended."""
        if self.state is TransferState.RUNNING:
            self.state, self.why_failed = TransferState.FAILED, why


class ShmEndpoint:
    """One owner's memory. `regions` is the transport's table of our own regions; its listener, where it has one, tells
    at once of an owner that is gone, so that its memory is not kept."""

    def __init__(
        self,
        regions: Mapping[int, Region],
        description: ShmDescription,
        helpers: Helpers,
        listener: ShmListener | None = None,
    ) -> None:
        self._regions = regions
        self._helpers = helpers
        self._copies = SharedCopies(helpers)
        self._remote = {region.id: region.at(0) for region in description.regions}
        self._listener = listener
        self._lock = threading.Lock()
        self._link: ShmLink | None = None
        self._is_ready = False
        self._waiting: collections.deque[ShmTransfer] = collections.deque()
        self._why_failed = ""
        threading.Thread(target=self._connect, args=(description,), name="baton-shm-connect", daemon=True).start()

    def write(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None = None) -> Transfer:
        check_words(tag, notice)
        if (transfer := self._at_once(tag, local, remote, notice)) is not None:
            return transfer
        return self._start(order_write(self._regions, self._remote, tag, local, remote, notice))

    def read(self, remote: Blocks, local: Blocks) -> ShmTransfer:
        return self._start(order_read(self._regions, self._remote, remote, local))

    def failure(self) -> str:
        self.advance()
        return self._why_failed

    def close(self) -> None:
        self._fail("the endpoint is closed")

    def advance(self) -> None:
        """Carries out what waits, as far as the owner's socket takes it; notices an owner that is gone."""
        with self._lock:
            if not self._is_ready or self._link is None:
                return
            if self._link.owner.is_alive():
                self._advance(self._link)
            else:
                self._end("the peer hung up")

    def cancel(self, transfer: ShmTransfer) -> None:
        """Copies are whole or not at all, so a cancelled one has either landed or never begun its notice."""
        with self._lock:
            transfer.fail("cancelled")

    def _at_once(self, tag: str, local: Blocks, remote: Blocks, notice: bytes | None) -> Transfer | None:
        """The short way of most writes, where nothing waits before it. A model has a write per layer, so what surrounds
        the copy counts: this way costs half of the other. None: take the other, which may repeat the copy."""
        with self._lock:
            link = self._link
            if link is None or not self._is_ready or self._waiting:
                return None
            source, target = self._regions.get(local.region), link.regions.get(remote.region)
            if source is None or target is None:
                return None
            plans = plans_of_blocks(source, local, target, remote)
            if not plans:
                return None
            try:
                if not link.owner.announce(tag):
                    return None
                addresses = source.address + local.start, target.address + remote.start
                copies = [self._copies.start(plan, *addresses) for plan in plans]
                if notice is not None:
                    self._copies.finish()
                    if not link.owner.send(Finished(tag, notice)):
                        return None
            except TransferError as error:
                self._end(str(error))
                return SettledTransfer(self._why_failed)
            return copies[0] if len(copies) == 1 else JoinedTransfer(copies)

    def _start(self, order: Order) -> ShmTransfer:
        transfer = ShmTransfer(self, order)
        with self._lock:
            if self._why_failed:
                transfer.fail(self._why_failed)
                return transfer
            self._waiting.append(transfer)
            if self._is_ready and self._link is not None:
                self._advance(self._link)
        return transfer

    def _connect(self, description: ShmDescription) -> None:
        """The connecting thread: ends when everything that waited is carried out, or the peer cannot be reached."""
        try:
            link = ShmLink(description)
        except TransferError as error:
            self._fail(str(error))
            return
        self._helpers.start()
        with self._lock:
            if self._why_failed:
                link.close()
                return
            self._link = link
            if self._listener is not None:
                self._listener.watch(link.owner.fd, self._hung_up)
        while not self._drain_one(link):
            pass

    def _drain_one(self, link: ShmLink) -> bool:
        """One waiting transfer at a time, so that the engine's thread gets the lock between. True: ready."""
        with self._lock:
            if self._why_failed:
                return True
            if self._waiting and self._step(link, self._waiting[0]):
                self._waiting.popleft()
                return False
            self._is_ready = True
            return True

    def _advance(self, link: ShmLink) -> None:
        while self._waiting and self._step(link, self._waiting[0]):
            self._waiting.popleft()

    def _step(self, link: ShmLink, transfer: ShmTransfer) -> bool:
        """Carries out one transfer; False if it must be tried again. Under the lock."""
        if transfer.state is not TransferState.RUNNING:
            return True
        try:
            if not self._carry_out(link, transfer):
                return False
        except TransferError as error:
            self._end(str(error))
            return False
        transfer.state = TransferState.DONE
        return True

    def _carry_out(self, link: ShmLink, transfer: ShmTransfer) -> bool:
        order = transfer.order.aimed(link.regions)
        if order.tag is not None and not link.owner.announce(order.tag):
            return False
        if not transfer.is_copied:
            transfer.copy_s = self._copy(order)
            transfer.is_copied = True
        if order.tag is None or order.notice is None:
            return True
        return link.owner.send(Finished(order.tag, order.notice))

    def _copy(self, order: Order) -> float:
        """Together with all that was begun before it. Returns the seconds that copying this took."""
        (source, source_ids), (target, target_ids) = order.source, order.target
        plans = plans_of(source, source_ids, target, target_ids)
        copies = [self._copies.start(plan, source.address(0), target.address(0)) for plan in plans]
        self._copies.finish()
        return sum(copy.copy_s for copy in copies)

    def _hung_up(self) -> None:
        self._fail("the peer hung up")

    def _fail(self, why: str) -> None:
        with self._lock:
            self._end(why)

    def _end(self, why: str) -> None:
        """Nothing moves any more. Under the lock, so no copy runs while the memory is unmapped."""
        self._why_failed = self._why_failed or why
        for transfer in self._waiting:
            transfer.fail(self._why_failed)
        self._waiting.clear()
        self._copies.drop(self._why_failed)
        if self._link is not None:
            if self._listener is not None:
                self._listener.unwatch(self._link.owner.fd)
            self._link.close()
            self._link = None
