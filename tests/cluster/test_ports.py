"""Free ports are free and different; a used one is named."""

from __future__ import annotations

import socket

import pytest

from cluster.ports import LOWEST_PORT, check_free, first_outgoing_port, free_ports
from core.errors import ConfigError


def test_free_ports_differ_and_can_be_bound() -> None:
    ports = free_ports(8, "127.0.0.1")
    assert len(set(ports)) == 8
    for port in ports:
        check_free(port, "127.0.0.1")


def test_no_outgoing_connection_of_this_machine_can_take_a_free_port_before_its_server_does() -> None:
    first = first_outgoing_port()
    if first <= LOWEST_PORT + 1000:
        pytest.skip(f"the kernel gives all ports from {first} on to outgoing connections")
    assert max(free_ports(50, "127.0.0.1")) < first


def test_a_used_port_is_refused_by_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--port"):
            check_free(port, "127.0.0.1")


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and 65535"):
        check_free(port, "127.0.0.1")
