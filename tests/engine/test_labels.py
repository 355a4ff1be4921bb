"""Labels under real engines: what a ticket names is listed, and stays while pinned whatever other prompts need."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from cluster.launcher import Cluster
from core.handoff import Handoff, Label, Peer
from kvcache.client import ask_figures, drop_label, labels
from kvcache.keys import tenant_of
from kvcache.spec import CacheSpec
from kvcache.wire import LabelFigures
from tests.engine.client import Answer, ask, ask_all
from tests.engine.clusters import CHUNKED
from tests.engine.prompts import BLOCK, token_prompt
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SMALL = CacheSpec.parse("8MiB")
NUM_BLOCKS = 1000 // BLOCK


class Instances:
    """A cluster's instances, asked directly with tickets of the test's own."""

    def __init__(self, cluster: Cluster) -> None:
        self.socket = str(cluster.cache.socket)
        listing = requests.get(f"{cluster.url}/instances", timeout=10).json()["instances"]
        self._urls = {each["role"]: each["url"] for each in listing}
        self._peers = {each["role"]: Peer(each["name"], each["control"], each["boot_id"]) for each in listing}

    def ask(self, body: dict[str, Any], label: Label, *, both: bool) -> Answer:
        """Of both instances, as the proxy does, or of the decode instance alone."""
        prefill = self._peers["prefill"] if both else None
        ticket = Handoff(f"req-{label.name}", self._peers["decode"], prefill, 60.0, label)
        leg = body | {"kv_transfer_params": ticket.to_params()}
        with ThreadPoolExecutor(1) as pool:
            if both:
                pool.submit(ask, self._urls["prefill"], leg | {"max_tokens": 1})
            return ask(self._urls["decode"], leg)

    def label(self, name: str) -> LabelFigures | None:
        return next((label for label in labels(self.socket) if label.name == name), None)

    def is_whole(self, name: str) -> bool:
        label = self.label(name)
        return label is not None and (label.blocks, label.num_blocks) == (NUM_BLOCKS, NUM_BLOCKS)


def completion(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": token_prompt(1000, seed), "max_tokens": 8, "ignore_eos": True} | more


def test_a_pinned_labels_blocks_survive_other_prompts_in_a_small_arena(
    start: Callable[..., Cluster], plain: Cluster
) -> None:
    cluster = start("1P1D", *CHUNKED, cache=SMALL)
    instances = Instances(cluster)
    body = completion(800, cache_salt="alice")
    expected = ask(plain.url, body).outcome()
    assert instances.ask(body, Label("pinned", pin=True), both=True).outcome() == expected
    until(lambda: instances.is_whole("pinned"), what="every full block of the prompt")
    pinned = instances.label("pinned")
    assert pinned is not None
    assert (pinned.pinned, pinned.num_tokens, pinned.tenant) == (True, NUM_BLOCKS * BLOCK, tenant_of("alice"))
    instances.ask(completion(801), Label("loose"), both=False)
    until(lambda: instances.is_whole("loose"), what="the blocks of a request without a prefill peer")

    ask_all(cluster.url, [completion(810 + index) for index in range(16)], 4)
    loose = instances.label("loose")
    assert ask_figures(instances.socket)["evicted_blocks"] > 0
    assert loose is None or loose.blocks < NUM_BLOCKS, "sixteen prompts have gone through the arena"
    assert instances.is_whole("pinned")

    cluster.restart("decode-0")
    hits = ask_figures(instances.socket)["found_blocks"]
    assert ask(cluster.url, body).outcome() == expected
    assert ask_figures(instances.socket)["found_blocks"] >= hits + NUM_BLOCKS
    assert drop_label(instances.socket, "pinned")
    assert ask(cluster.url, body).outcome() == expected
