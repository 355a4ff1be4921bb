"""What a proxy knows of contexts: whose they are, for how long, in which order computed, and after its death."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import ManualClock
from core.errors import ConfigError
from proxy.context_journal import Journal
from proxy.context_orders import MAX_ORDERS, Orders, rendering_of
from proxy.context_store import ContextStore
from proxy.contexts import Context, parse_wish
from proxy.errors import RequestRefused
from proxy.settings import Settings
from proxy.split import Endpoint


def context(number: int, tenant: str | None = None, ttl_s: float = 0.0, now_s: float = 1000.0) -> Context:
    wish = parse_wish({"text": f"text {number}", "name": f"name {number}"} | ({"ttl_s": ttl_s} if ttl_s else {}))
    return Context(f"ctx-{number}", wish, tenant, now_s, now_s + ttl_s if ttl_s else 0.0, 100, 6, "model")


def store_of(path: Path | str = "", clock: ManualClock | None = None, **settings: int) -> ContextStore:
    return ContextStore(Settings(**settings), clock or ManualClock(), Journal(str(path)))  # type: ignore[arg-type]


def test_when_its_time_is_over_a_context_is_not_found_not_listed_and_its_name_is_free() -> None:
    clock = ManualClock()
    store = store_of(clock=clock, context_limit=4)
    store.put(context(1, ttl_s=10))
    assert store.get("ctx-1", None).tokens == 100
    with pytest.raises(RequestRefused, match="your contexts may be 1"):
        store.check_room(None, 10)
    clock.advance(10)
    with pytest.raises(RequestRefused, match="no context 'ctx-1'"):
        store.get("ctx-1", None)
    assert store.of(None) == []
    assert store.named("name 1", None) is None
    store.check_room(None, 10)


def test_bytes_are_bounded_too_and_all_tenants_together() -> None:
    store = store_of(context_bytes=400, context_limit=100)
    with pytest.raises(RequestRefused, match="your contexts may be 25 with 100 bytes"):
        store.check_room("a", 101)
    store = store_of(context_limit=4)
    for number in range(4):
        store.check_room(f"tenant {number}", 10)
        store.put(context(number, f"tenant {number}"))
    with pytest.raises(RequestRefused, match="all contexts may be 4"):
        store.check_room("another", 10)


def test_a_proxy_that_is_started_again_knows_what_the_one_before_knew(tmp_path: Path) -> None:
    path = tmp_path / "contexts.jsonl"
    first = store_of(path)
    for number in range(4):
        first.put(context(number, "tenant"))
    first.remove("ctx-1")
    with path.open("ab") as file:
        file.write(b'{"kept": {"id": "ctx-9", "wi')  # the first one's death in the middle of a line
    second = store_of(path)
    assert [known.id for known in second.of("tenant")] == ["ctx-0", "ctx-2", "ctx-3"]
    assert second.get("ctx-2", "tenant") == context(2, "tenant")
    second.remove("ctx-0")
    assert [known.id for known in store_of(path).of("tenant")] == ["ctx-2", "ctx-3"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["contexts.jsonl"]


def test_a_file_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot keep contexts in .*missing.*; name a file in a folder"):
        store_of(tmp_path / "missing" / "contexts.jsonl")


IDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=4).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(["add", "ask", "forget"]), st.sampled_from(["r", "s"]), IDS), max_size=30))
def test_orders_know_the_longest_prefix_of_any_order_that_was_computed(
    steps: list[tuple[str, str, tuple[str, ...]]],
) -> None:
    orders, model = Orders(), set[tuple[str, tuple[str, ...]]]()
    for what, rendering, ids in steps:
        prefixes = [ids[:end] for end in range(1, len(ids) + 1)]
        if what == "add":
            orders.add(rendering, ids)
            model |= {(rendering, prefix) for prefix in prefixes}
        elif what == "forget":
            orders.forget(ids[0] if ids else "a")
            model = {known for known in model if (ids[0] if ids else "a") not in known[1]}
        else:
            expected = max((len(p) for p in prefixes if (rendering, p) in model), default=0)
            assert orders.num_computed(rendering, ids) == expected


def test_orders_are_bounded_and_the_last_used_stay() -> None:
    orders = Orders()
    orders.add("r", ("kept",))
    for number in range(MAX_ORDERS):
        orders.add("r", (f"ctx-{number}",))
        assert orders.num_computed("r", ("kept",)) == 1
    assert orders.num_computed("r", ("ctx-0",)) == 0


@pytest.mark.parametrize(
    ("fields", "is_same"),
    [
        ({"temperature": 1.0, "max_tokens": 9, "messages": [1], "stream": True, "seed": 3}, True),
        ({"cache_salt": "x", "priority": 2, "add_generation_prompt": False, "tools": None}, True),
        ({"tools": [{}]}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"reasoning_effort": "low"}, False),
    ],
)
def test_what_changes_a_prompts_beginning_is_another_rendering(fields: dict[str, object], is_same: bool) -> None:
    assert (rendering_of(Endpoint.CHAT, fields, "m") == rendering_of(Endpoint.CHAT, {}, "m")) == is_same
    assert rendering_of(Endpoint.CHAT, {}, "m") != rendering_of(Endpoint.CHAT, {}, "n")
    assert rendering_of(Endpoint.CHAT, {}, "m") != rendering_of(Endpoint.COMPLETION, {}, "m")


def test_a_context_that_is_made_again_and_again_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.context_journal.MOST_BYTES", 1000)
    path = tmp_path / "contexts.jsonl"
    store = store_of(path)
    for _ in range(100):
        store.put(context(1))
        store.put(context(2))
    assert path.stat().st_size < 3000
    assert [known.id for known in store_of(path).of(None)] == ["ctx-1", "ctx-2"]


def test_a_full_disk_costs_the_file_and_not_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal("")
    journal._path, journal._file = Path("/dev/full"), os.open("/dev/full", os.O_WRONLY)
    store = ContextStore(Settings(), ManualClock(), Journal(""))
    store._journal = journal
    store.put(context(1))
    store.put(context(2))
    assert [known.id for known in store.of(None)] == ["ctx-1", "ctx-2"]
    assert capsys.readouterr().err.count("contexts will not outlive this proxy: /dev/full: No space left") == 1
