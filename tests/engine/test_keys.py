"""One key file for the whole cluster: tokens equal, nothing to be read on the way."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cluster.launcher import Cluster
from kvcache.spec import CacheSpec
from tests.engine.client import ask, record
from tests.engine.prompts import token_prompt
from transport.keys import make_keys

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


_SO_RCVBUFFORCE = 33


class Sniffer:
    """Every TCP payload that goes over loopback, by both ports."""

    def __init__(self) -> None:
        self.payloads: list[tuple[int, int, bytes]] = []
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self._socket.bind(("lo", 0))
        self._socket.settimeout(0.1)
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def between(self, ports: set[int]) -> bytes:
        """What went to or from these ports."""
        return b"\0".join(load for source, target, load in self.payloads if {source, target} & ports)

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(5)
        self._socket.close()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            with suppress(TimeoutError):
                packet = self._socket.recv(1 << 17)
                head = (packet[0] & 15) * 4
                if packet[9] != socket.IPPROTO_TCP:
                    continue
                source, target = struct.unpack_from("!HH", packet, head)
                load = packet[head + (packet[head + 12] >> 4) * 4 :]
                if load:
                    self.payloads.append((source, target, load))


@contextmanager
def sniffing() -> Iterator[Sniffer | None]:
    """None where reading loopback's packets is not permitted."""
    try:
        sniffer = Sniffer()
    except PermissionError:
        yield None
        return
    try:
        yield sniffer
    finally:
        sniffer.close()


@pytest.mark.host_memory
def test_a_handoff_by_zmq_is_exact_and_with_keys_nothing_of_it_can_be_read(
    start: Callable[..., Cluster], plain: Cluster, tmp_path: Path
) -> None:
    prompt = token_prompt(700, 61_000)
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True}
    make_keys(tmp_path / "keys")
    seen: dict[str, bytes] = {}
    ids: dict[str, str] = {}
    for keys in ("", str(tmp_path / "keys")):
        cluster = start("1P1D", transport="zmq", keys=keys)
        with sniffing() as sniffer:
            answer = ask(cluster.url, body)
            entry = record(cluster.url, answer)
        assert entry["outcome"] == "landed", entry
        assert entry["path"]["transport"] == "zmq"
        assert answer.outcome() == ask(plain.url, body).outcome()
        ids[keys] = answer.request_id
        if sniffer is not None:
            seen[keys] = sniffer.between(wire_ports(cluster))
    if not seen:
        pytest.skip("tokens were equal; reading what went by needs CAP_NET_RAW and CAP_NET_ADMIN")
    (clear, sealed), (clear_id, sealed_id) = seen.values(), ids.values()
    assert min(len(clear), len(sealed)) > 1_000_000, "both moved the prompt's blocks over these ports"
    assert clear_id.encode() in clear
    assert sealed_id.encode() not in sealed
    step = len(clear) // 200
    slices = [clear[at : at + 32] for at in range(step, len(clear) - 32, step)]
    assert sum(piece in sealed for piece in slices if len(set(piece)) > 8) == 0, "the same blocks, sealed"
    for width in (2, 4, 8):
        tokens = b"".join(token.to_bytes(width, "little") for token in prompt[2:18])
        assert tokens not in sealed


def test_every_socket_that_anything_of_baton_listens_at_is_bound_to_the_chosen_interface(
    start: Callable[..., Cluster],
) -> None:
    cluster = start("1P1D", cache=CacheSpec.parse("64MiB,listen=127.0.0.1:0"))
    bound = [(member.name, *each) for member in cluster.members for pid in member.pids() for each in listening(pid)]
    assert {name for name, _, _ in bound} == {"proxy", "prefill-0", "decode-0", "cache"}
    assert len(bound) >= 1 + 2 * 3 + 2, "HTTP, control and zmq of each instance, the cache's two"
    assert {host for _, host, _ in bound} == {"127.0.0.1"}, bound


def wire_ports(cluster: Cluster) -> set[int]:
    """Where its instances listen, but for HTTP."""
    ports = {port for member in cluster.instances for pid in member.pids() for _, port in listening(pid)}
    return ports - {int(member.url.rpartition(":")[2]) for member in cluster.instances}


def listening(pid: int) -> list[tuple[str, int]]:
    connections = psutil.Process(pid).net_connections("tcp")
    return [(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN]
