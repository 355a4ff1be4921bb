"""The engine's scheduler side over a real server: labels are told, and what is not worth loading is not stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.handoff import Handoff, Label, Peer
from core.layout import KVLayout
from engine.cache_side import CacheScheduler, Owner
from engine.settings import ConnectorSettings
from kvcache.client import labels
from kvcache.keys import tenant_of
from tests.kvcache.places import Server, serving
from tests.poll import until

LAYOUT = KVLayout("model", "float32", 2, 1, 16, 16, 2048, "LBHNC", "vec")
BLOCK_BYTES = 2 * 2048


class Request:
    """What is read of vLLM's: a prompt of so many full blocks and one token more."""

    lora_request = None
    mm_features = None
    prompt_embeds = None
    prompt_token_ids: tuple[int, ...] = ()
    skip_reading_prefix_cache = False

    def __init__(self, request_id: str, num_blocks: int, cache_salt: str | None = None) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = 16 * num_blocks + 1
        self.block_hashes = [f"{cache_salt} {number}".encode() for number in range(num_blocks)]
        self.cache_salt = cache_salt


def ticket(label: Label) -> Handoff:
    return Handoff("r", Peer("decode-0", "tcp://127.0.0.1:1", "boot"), label=label)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, 64 * BLOCK_BYTES) as running:
        yield running


@pytest.fixture
def scheduler(server: Server) -> Iterator[CacheScheduler]:
    made = CacheScheduler(ConnectorSettings(cache=server.socket), LAYOUT, Owner("boot"), "sha256", lambda: None)
    until(lambda: made._client.is_connected, what="the connection")
    yield made
    made.close()


def reserved(server: Server) -> float:
    return server.figures()["reserved_bytes"] / BLOCK_BYTES


def test_a_labelled_request_names_all_full_blocks_of_its_prompt(server: Server, scheduler: CacheScheduler) -> None:
    scheduler.arrived(Request("r1", 3, "alice"), computes=False, ticket=ticket(Label("doc", 60.0, pin=True)))
    (label,) = until(lambda: labels(server.socket), what="the label")
    assert (label.name, label.blocks, label.num_blocks, label.num_tokens) == ("doc", 0, 3, 48)
    assert (label.pinned, label.tenant) == (True, tenant_of("alice"))
    assert label.expires_in_s is not None
    assert 50 < label.expires_in_s <= 60


def test_a_label_that_nobody_could_be_told_is_told_when_the_request_ends(
    server: Server, scheduler: CacheScheduler
) -> None:
    server.kill()
    until(lambda: not scheduler._client.is_connected, what="the end of the connection")
    scheduler.arrived(Request("r1", 3), computes=True, ticket=ticket(Label("doc")))
    server.start()
    until(lambda: scheduler._client.is_connected, what="the new connection")
    scheduler.finished("r1")
    until(lambda: labels(server.socket), what="the label")


def test_while_loading_is_slower_than_computing_no_places_are_asked_for(
    server: Server, scheduler: CacheScheduler
) -> None:
    pace = scheduler._reader.pace
    pace.computed(100, 1.0)
    pace.loaded(100, 2.0, 2.0)
    assert pace.is_worth_storing(), "the one try, taken here"
    scheduler.arrived(Request("r1", 3), computes=True)
    until(lambda: scheduler.look_up(Request("r1", 3), 0) is not None, what="the answer")
    assert reserved(server) == 0
    scheduler.scheduled(Request("r1", 3), 48, lambda: [0, 1, 2])
    assert scheduler.orders().stores == []
    scheduler.arrived(Request("r2", 3), computes=True, ticket=ticket(Label("wanted")))
    until(lambda: reserved(server) == 3, what="places: a label is asked for by name")
    for _ in range(30):
        pace.loaded(100, 0.1, 0.1)
    scheduler.arrived(Request("r3", 5, "bob"), computes=True)
    until(lambda: reserved(server) == 8, what="places for the third")
    assert server.figures()["tenants"] == 2
