"""One end of a pair, in a process of its own: `python -m benchmarks.transfer_end PLACE`, the place as JSON.

    standard input: orders        descriptor that was standard output: answers        standard output: where errors go

Both pools lie in memories that the measurer made and that this process inherits as descriptors; a transport that must
own its memory (shm) allocates the target itself. Libraries that print do not disturb the answers, which have a
descriptor of their own.

Threading: one thread, and whatever a library starts. Ends with its standard input, and is killed with its parent.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import closing

import msgspec

from benchmarks.kv_pool import Pool, PoolShape
from benchmarks.mover import Ground, Job, Receiver, Sender, sharpen_sleep
from benchmarks.mover_baton import TransportReceiver, TransportSender
from benchmarks.transfer_systems import module_of
from benchmarks.transfer_words import (
    ORDERS,
    Answer,
    Check,
    Checked,
    Connect,
    Expect,
    Failed,
    Landed,
    Order,
    Ready,
    Send,
    Sent,
    Stop,
    line,
)
from cluster.ports import LOOPBACK
from core.errors import BatonError, TransferError
from transport.base import Memory
from transport.digest import add, blocks_digest
from transport.mapping import Mapping
from transport.parent import die_with_parent
from transport.regions import view
from transport.schemes import make_transport


class Place(msgspec.Struct, frozen=True):
    """Which end of which pair this is."""

    parent_pid: int
    is_sender: bool
    system: str
    shape: PoolShape
    source_fd: int
    target_fd: int


class SendingEnd:
    """Carries out what a sender is told."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def handle(self, order: Order) -> Answer:
        """One order."""
        if isinstance(order, Connect):
            self._sender.connect(order.description)
            return Ready()
        if not isinstance(order, Send):
            raise TransferError(f"a sender cannot {order}")
        cpu_s = time.process_time()
        begun_s, held_s = self._write(order)
        is_end = self._sender.finish()
        ended_s = time.monotonic()
        return Sent(begun_s, held_s, time.process_time() - cpu_s, ended_s if is_end else 0.0)

    def close(self) -> None:
        self._sender.close()

    def _write(self, order: Send) -> tuple[float, float]:
        """When everything was there to be written, and how long the calls held the caller up."""
        job, begun_s, held_s = order.job, time.monotonic(), 0.0
        if job.num_writes == 1:
            self._sender.write(job, range(job.num_layers), is_last=True)
            return begun_s, time.monotonic() - begun_s
        for layer in range(job.num_layers):
            time.sleep(order.layer_s)
            begun_s = time.monotonic()
            self._sender.write(job, range(layer, layer + 1), is_last=layer == job.num_layers - 1)
            held_s += time.monotonic() - begun_s
        return begun_s, held_s


class ReceivingEnd:
    """Carries out what a receiver is told."""

    def __init__(self, receiver: Receiver, pool: Pool, mouth: Mouth) -> None:
        self._receiver = receiver
        self._pool = pool
        self._mouth = mouth

    def handle(self, order: Order) -> Answer:
        """One order: says that it is ready, and then that everything has landed."""
        if not isinstance(order, Expect):
            raise TransferError(f"a receiver cannot {order}")
        if order.is_cleared:
            _clear(self._pool, order.job)
        cpu_s = time.process_time()
        self._receiver.expect(order.job)
        self._mouth.say(Ready())
        self._receiver.receive()
        return Landed(time.monotonic(), time.process_time() - cpu_s)

    def close(self) -> None:
        self._receiver.close()


class Mouth:
    """Where answers go."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)

    def say(self, answer: Answer) -> None:
        words = line(answer)
        while words:
            words = words[os.write(self._fd, words) :]


def digest_of(pool: Pool, ids: tuple[int, ...], num_layers: int) -> int:
    """Over every byte of these blocks in the first layers."""
    total = 0
    for region in pool.regions()[:num_layers]:
        total = add(total, blocks_digest(region, ids, 0, full=True))
    return total


def _clear(pool: Pool, job: Job) -> None:
    empty = bytes(pool.shape.piece_bytes)
    for layer in range(job.num_layers):
        for block_id in job.remote_ids:
            view(pool.address_of(layer, block_id), pool.shape.piece_bytes)[:] = empty


def _sending(place: Place, source: Pool, target: Pool) -> Sender:
    module = module_of(place.system)
    if module is not None:
        return module.sender(Ground(place.system, source, target))
    return TransportSender(make_transport(place.system, LOOPBACK), source)


def _receiving(place: Place, target: Pool) -> tuple[Receiver, Pool, Memory | None]:
    """Also the pool that it really is in, and what keeps that mapped."""
    module = module_of(place.system)
    if module is not None:
        return module.receiver(Ground(place.system, target, target)), target, None
    transport = make_transport(place.system, LOOPBACK)
    memory = transport.allocate(place.shape.num_bytes)
    pool = target if memory is None else Pool(place.shape, memory.address)
    return TransportReceiver(transport, pool), pool, memory


def _serve(place: Place, mouth: Mouth) -> None:
    memories = [Mapping(fd, place.shape.num_bytes) for fd in (place.source_fd, place.target_fd)]
    source, target = (Pool(place.shape, memory.address) for memory in memories)
    needed = memories if place.system == "memcpy" else memories[:1] if place.is_sender else memories[1:]
    for memory in needed:
        memory.populate()
    end: SendingEnd | ReceivingEnd
    kept: Memory | None = None
    if place.is_sender:
        pool, end = source, SendingEnd(_sending(place, source, target))
        mouth.say(Ready())
    else:
        receiver, pool, kept = _receiving(place, target)
        end = ReceivingEnd(receiver, pool, mouth)
        mouth.say(Ready(receiver.describe()))
    with closing(end):
        for words in sys.stdin.buffer:
            order = ORDERS.decode(words)
            if isinstance(order, Stop):
                return
            mouth.say(
                Checked(digest_of(pool, order.ids, order.num_layers)) if isinstance(order, Check) else end.handle(order)
            )
    del kept


def main() -> int:
    """Ends with 1 when something failed, after saying what."""
    place = msgspec.json.decode(sys.argv[1], type=Place)
    die_with_parent(place.parent_pid)
    sharpen_sleep()
    mouth = Mouth()
    try:
        _serve(place, mouth)
    except BatonError as error:
        mouth.say(Failed(str(error)))
        return 1
    except Exception as error:  # noqa: BLE001 - peers' libraries raise what they like: the measurer is told, and goes on
        mouth.say(Failed(f"{type(error).__name__}: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # what peers' libraries do at their end is not what is measured, and one of them crashes there
