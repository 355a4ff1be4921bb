"""What an engine with its KV cache on a device is refused, and which memory it finds there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.errors import ConfigError, UnsupportedError
from engine.devices import device_of, is_on_device, refuse_on_device
from engine.layout import regions_of
from engine.settings import ConnectorSettings
from transport.device_schemes import device_transports
from transport.host_device import HostDevice

ON_GPU = ConnectorSettings(transport="cuda_ipc")


def config(kind: str = "cuda", *, asynchronous: bool = False) -> Any:
    """Of vLLM, as far as it is read."""
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=kind), scheduler_config=SimpleNamespace(async_scheduling=asynchronous)
    )


def test_a_cpu_engine_has_no_device_and_may_do_what_it_could() -> None:
    settings = ConnectorSettings(audit=True)
    refuse_on_device(config("cpu", asynchronous=True), settings)
    assert not is_on_device(config("cpu"), settings)
    assert device_of(config("cpu"), settings) is None


@pytest.mark.parametrize(
    ("wrong", "settings", "error", "says"),
    [
        (config("xpu"), ON_GPU, UnsupportedError, "type xpu are not supported; plain instances are"),
        (config(asynchronous=True), ON_GPU, UnsupportedError, "add --no-async-scheduling"),
        (config(), ConnectorSettings(audit=True), ConfigError, "audit fills blocks by the processor"),
        (config(), ConnectorSettings(faulty={"flip_write": 1}), ConfigError, "faulty damages blocks by the processor"),
        (config(), ConnectorSettings(device="host"), ConfigError, "for tests"),
        (config("cpu"), ConnectorSettings(device="gpu"), ConfigError, "for tests"),
    ],
)
def test_what_cannot_be_done_on_a_device_is_refused_with_the_remedy(
    wrong: Any, settings: ConnectorSettings, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        refuse_on_device(wrong, settings)


def test_a_gpu_engine_as_it_should_be_is_not_refused() -> None:
    refuse_on_device(config(), ON_GPU)
    assert is_on_device(config(), ON_GPU)


@pytest.mark.parametrize(
    ("transport", "says"), [("auto", "none is chosen by itself"), ("zmq", "copies by the processor")]
)
def test_a_transport_that_moves_no_device_memory_is_refused(transport: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        device_transports(transport, HostDevice(), "127.0.0.1", None, {})


def test_blocks_are_found_in_whatever_order_their_inside_lies() -> None:
    """Heads by tokens, shown so and kept so, or kept as tokens by heads."""
    memory = torch.zeros(6 * 4 * 16 * 8, dtype=torch.float16)
    kept = memory.view(6, 4, 16, 8)
    for cache in (kept, memory.view(6, 16, 4, 8).transpose(1, 2)):
        (region,) = regions_of({"layer": cache}, 6)
        assert (region.address, region.block_bytes, region.stride, region.num_blocks) == (
            memory.data_ptr(),
            1024,
            1024,
            6,
        )
    interleaved = torch.zeros(6, 3, 4, 16, 8, dtype=torch.float16)  # every block's layers together
    first, second = regions_of({"0": interleaved[:, 0], "1": interleaved[:, 1]}, 6)
    assert (first.block_bytes, first.stride, second.address - first.address) == (1024, 3 * 1024, 1024)


def test_blocks_that_are_not_the_schedulers_or_lie_in_pieces_are_refused() -> None:
    cache = torch.zeros(6, 4, 16, 8, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="an array of 6, not of the scheduler's 3 blocks"):
        regions_of({"layer": cache}, 3)
    with pytest.raises(UnsupportedError, match="not laid out block by block"):
        regions_of({"layer": torch.zeros(4, 6, 16, 8).transpose(0, 1)}, 6)
