"""`/v1/contexts`: what is computed ahead, who may use it, what is said of the reuse, what a DELETE leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from core.handoff import Role
from kvcache.client import ask_figures, drop_all
from tests.kvcache.local_server import serving_here
from tests.kvcache.places import BLOCK_BYTES
from tests.proxy.fleet import engines, running, until
from tests.proxy.place import Place, placed, settings
from tests.proxy.storing import BLOCK, StoringEngine, prompt_of

A, B, C = ("alpha. " * 10, "beta, " * 10, "gamma; " * 10)
KEYS = ({"Authorization": "Bearer sk-one"}, {"Authorization": "Bearer sk-two"})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with placed(tmp_path) as made:
        yield made


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def reuse(response: httpx.Response) -> list[str]:
    """Per context, as the header and the record say."""
    assert response.status_code == 200, response.text
    return [item.partition("=")[2] for item in response.headers["x-baton-contexts"].split(", ")]


def test_a_text_is_computed_on_p_alone_and_its_blocks_are_found_when_it_is_answered(place: Place) -> None:
    made = place.made(text=A, name="alpha", ttl_s=600, pin=True)
    assert (made["object"], made["name"], made["kind"], made["endpoint"]) == ("context", "alpha", "text", "completion")
    blocks = len(A) // BLOCK
    assert (made["tokens"], made["blocks"], made["bytes"]) == (len(A), blocks, blocks * BLOCK_BYTES)
    assert made["pinned"]
    assert made["expires_at"] == pytest.approx(made["created_at"] + 600, abs=1)
    assert "note" not in made
    (received,) = place.prefill.generations()
    assert (received.body["prompt"], received.body["max_tokens"]) == (A, 1)
    assert place.decode.generations() == []
    label = place.labels()[made["id"]]
    assert (label.blocks, label.num_tokens, label.pinned) == (blocks, len(A), True)
    record = place.fleet.client.get(f"/requests/{made['request_id']}").json()
    assert (record["status"], record["path"]["why"]) == ("done", "one_token")


def test_the_metrics_say_what_the_cache_server_says(place: Place) -> None:
    made = place.made(text=A, pin=True)
    assert place.fleet.metric('baton_cache_server{figure="committed_blocks"}') == made["blocks"]
    assert place.fleet.metric('baton_cache_server{figure="pinned_bytes"}') >= made["bytes"]


def test_it_is_answered_when_its_last_block_can_be_found(place: Place) -> None:
    place.prefill.hold_commit = True
    with place.fleet.in_background(lambda: place.post(text=A)) as answers:
        until(lambda: bool(place.labels()), "it has its name")
        assert [label.blocks for label in place.labels().values()] == [0]
        assert answers == []
        place.prefill.hold_commit = False
    assert answers[0].json()["blocks"] == len(A) // BLOCK


def test_who_waits_too_long_for_another_of_the_same_name_is_told_to_come_again(tmp_path: Path) -> None:
    with placed(tmp_path, queue_timeout_s=0.2) as place:
        place.prefill.behaviour.hold = True
        with place.fleet.in_background(lambda: place.post(text=A, name="alpha")) as answers:
            until(lambda: place.prefill.generations(), "the first is being computed")
            waited = place.post(text=A, name="alpha")
            assert waited.status_code == 429
            assert "retry-after" in waited.headers
            place.prefill.behaviour.hold = False
        assert answers[0].status_code == 201


def test_both_legs_get_the_composed_prompt_and_nothing_of_ours(place: Place) -> None:
    ids = place.ids(A, B)
    before = len(place.prefill.generations())
    place.decode.behaviour.hold = True
    with place.fleet.in_background(lambda: place.complete(ids, "And then?", seed=7)) as answers:
        until(lambda: len(place.prefill.generations()) > before and place.decode.generations(), "both legs have it")
        place.decode.behaviour.hold = False
    assert answers[0].status_code == 200
    for engine in (place.prefill, place.decode):
        body = engine.generations()[-1].body
        assert body["prompt"] == A + B + "And then?"
        assert not {"context", "context_ids"} & body.keys()
        assert body["kv_transfer_params"]["baton"]["prefill"], "it is handed off like any other"
    assert place.asked()["seed"] == 7


def test_the_answer_says_which_parts_were_computed_in_this_order(place: Place) -> None:
    a, b = place.ids(A, B)
    first = place.complete([a, b])
    assert first.headers["x-baton-contexts"] == f"{a}=prefix, {b}=recomputed"
    assert place.fleet.record(first)["contexts"] == [{"id": a, "reuse": "prefix"}, {"id": b, "reuse": "recomputed"}]
    assert reuse(place.complete([a, b], "Something else")) == ["prefix", "prefix"], "the request before computed it"
    assert reuse(place.complete([b, a])) == ["prefix", "recomputed"]
    (c,) = place.ids(C)
    assert reuse(place.complete([a, b, c])) == ["prefix", "prefix", "recomputed"]
    assert "x-baton-contexts" not in place.fleet.complete().headers


def test_what_was_computed_for_other_prompts_or_not_at_all_is_not_called_a_prefix(place: Place) -> None:
    (a,) = place.ids(A)
    place.decode.behaviour.status = place.prefill.behaviour.status = 500
    assert place.complete([a, a]).status_code == 500
    place.decode.behaviour.status = place.prefill.behaviour.status = 200
    assert reuse(place.complete([a, a])) == ["prefix", "recomputed"], "a request that failed has computed nothing"
    assert reuse(place.fleet.chat(context_ids=[a])) == ["recomputed"], "in a chat there are other tokens around it"
    assert reuse(place.fleet.chat(context_ids=[a])) == ["prefix"]
    assert reuse(place.complete([a], model="another")) == ["recomputed"], "another model has other KV"
    assert reuse(place.complete([a], add_special_tokens=False)) == ["recomputed"]


def test_a_text_for_chats_is_a_system_message_and_a_prefix_at_once(place: Place) -> None:
    made = place.made(text=A, endpoint="chat")
    body = place.prefill.generations()[-1].body
    assert body["messages"] == [{"role": "system", "content": A}]
    assert body["add_generation_prompt"] is False
    asked = [{"role": "user", "content": "And?"}]
    assert reuse(place.fleet.chat(context_ids=[made["id"]], messages=asked)) == ["prefix"]
    assert place.asked()["messages"] == [{"role": "system", "content": A}, *asked]
    assert prompt_of(place.asked()).startswith(prompt_of(body))
    user = place.made(text=B, role="user")
    assert user["endpoint"] == "chat"
    place.fleet.chat(context_ids=[user["id"]], messages=asked)
    assert place.asked()["messages"][0] == {"role": "user", "content": B}


def test_messages_bring_their_tools(place: Place) -> None:
    tools = [{"type": "function", "function": {"name": "exeunt"}}]
    turns = [{"role": "user", "content": A}, {"role": "assistant", "content": B}]
    made = place.made(messages=turns, tools=tools)
    body = place.prefill.generations()[-1].body
    assert (body["messages"], body["tools"], body["tool_choice"]) == (turns, tools, None)
    asked = [{"role": "user", "content": "And?"}]
    assert reuse(place.fleet.chat(context_ids=[made["id"]], messages=asked)) == ["prefix"]
    assert (place.asked()["messages"], place.asked()["tools"]) == (turns + asked, tools)
    own = [{"type": "function", "function": {"name": "enter"}}]
    assert reuse(place.fleet.chat(context_ids=[made["id"]], tools=own)) == ["recomputed"]
    assert place.asked()["tools"] == own, "the request's own are used"
    other = place.made(messages=turns, tools=own)
    refused = place.fleet.chat(context_ids=[made["id"], other["id"]])
    assert "different tools" in error_of(refused)[2]
    status, _, message = error_of(place.complete([made["id"]]))
    assert (status, "use it on /v1/chat/completions" in message) == (400, True)


def test_of_a_template_what_stands_before_the_first_variable_is_computed_ahead(place: Place) -> None:
    made = place.made(template=A + "Ask {{ who }}: {{question}} of {{who}}.")
    assert made["variables"] == ["who", "question"]
    assert place.prefill.generations()[-1].body["prompt"] == A + "Ask "
    filled = {"id": made["id"], "variables": {"who": "{{question}}", "question": "What?"}}
    answer = place.fleet.complete(context=filled, prompt=" Well?")
    assert reuse(answer) == ["prefix"]
    assert place.asked()["prompt"] == A + "Ask {{question}}: What? of {{question}}. Well?", (
        "values are not filled again"
    )


def test_of_a_templates_messages_the_constant_ones_and_the_beginning_of_the_next(place: Place) -> None:
    parts = [{"type": "text", "text": "fixed "}, {"type": "text", "text": "for {{who}}"}]
    made = place.made(template=[{"role": "system", "content": A}, {"role": "user", "content": parts}])
    computed = place.prefill.generations()[-1].body["messages"]
    assert computed == [
        {"role": "system", "content": A},
        {"role": "user", "content": [parts[0], {"type": "text", "text": "for "}]},
    ]
    place.fleet.chat(context={"id": made["id"], "variables": {"who": "Rome"}}, messages=[])
    assert place.asked()["messages"][1]["content"] == [parts[0], {"type": "text", "text": "for Rome"}]


def test_a_template_that_begins_with_a_variable_keeps_nothing_and_says_so(place: Place) -> None:
    made = place.made(template="{{question}}" + A)
    assert (made["tokens"], made["blocks"], made["request_id"]) == (0, 0, None)
    assert "begins with a variable" in made["note"]
    assert place.prefill.generations() == []
    answer = place.fleet.complete(context={"id": made["id"], "variables": {"question": "Who?"}}, prompt="")
    assert reuse(answer) == ["recomputed"]


def test_wrong_variables_are_a_400_that_names_them(place: Place) -> None:
    made = place.made(template=A + "{{who}} {{what}}")
    status, code, message = error_of(
        place.fleet.complete(context={"id": made["id"], "variables": {"who": "a", "x": ""}})
    )
    assert (status, code) == (400, "wrong_variables")
    assert message == "the template's variables are who, what; missing: what; unknown: x"
    assert place.decode.generations() == []


def test_a_name_is_one_content_and_its_time_begins_anew(place: Place) -> None:
    made = place.made(text=A, name="n", ttl_s=100)
    again = place.post(text=A, name="n", ttl_s=500, pin=True)
    assert (again.status_code, again.json()["id"]) == (200, made["id"])
    assert again.json()["expires_at"] > made["expires_at"] + 300
    assert again.json()["pinned"]
    assert not place.post(text=A, name="n").json()["pinned"]
    assert not place.labels()[made["id"]].pinned, "and the cache knows it"
    status, code, message = error_of(place.post(text=B, name="n"))
    assert (status, code) == (409, "context_name_taken")
    assert made["id"] in message
    assert place.made(KEYS[0], text=B, name="n")["id"] != made["id"], "another tenant's names are other names"


def test_two_at_once_of_one_name_are_one_context(place: Place) -> None:
    place.prefill.behaviour.hold = True
    with (
        place.fleet.in_background(lambda: place.post(text=A, name="n")) as first,
        place.fleet.in_background(lambda: place.post(text=A, name="n")) as second,
    ):
        until(lambda: bool(place.prefill.generations()), "one of them is computed")
        place.prefill.behaviour.hold = False
    assert first[0].json()["id"] == second[0].json()["id"]
    assert {first[0].status_code, second[0].status_code} == {200, 201}
    assert len(place.labels()) == 1


def test_another_tenant_can_neither_use_nor_see_nor_drop_it(place: Place) -> None:
    made = place.made(KEYS[0], text=A)
    salted = place.made(text=B, cache_salt="secret")
    ours, theirs = place.fleet.client, KEYS[1]
    path = f"/v1/contexts/{made['id']}"
    body = {"prompt": "?", "context_ids": [made["id"]], "max_tokens": 2}
    for answer in (
        ours.post("/v1/completions", json=body, headers=theirs),
        ours.post("/v1/completions", json=body),
        ours.post("/v1/completions", json=body | {"cache_salt": "secret"}, headers=KEYS[0]),
        ours.get(path, headers=theirs),
        ours.delete(path, headers=theirs),
        ours.delete(path),
    ):
        assert error_of(answer)[:2] == (404, "context_not_found")
    assert ours.get("/v1/contexts", headers=theirs).json() == {"object": "list", "data": []}
    assert [item["id"] for item in ours.get("/v1/contexts", headers=KEYS[0]).json()["data"]] == [made["id"]]
    assert reuse(ours.post("/v1/completions", json=body, headers=KEYS[0])) == ["prefix"]
    mine = ours.get("/v1/contexts", headers={"x-cache-salt": "secret"}).json()["data"]
    assert [item["id"] for item in mine] == [salted["id"]]
    assert place.made(KEYS[1], text=A)["blocks"] == len(A) // BLOCK, "the same text is computed for each tenant"
    assert len({label.tenant for label in place.labels().values()}) == 3


def test_delete_forgets_the_context_its_label_and_its_blocks(place: Place) -> None:
    a, b = place.ids(A, B)
    blocks = ask_figures(place.socket)["blocks"]
    answer = place.fleet.client.delete(f"/v1/contexts/{a}")
    assert (answer.status_code, answer.json()) == (200, {"id": a, "object": "context", "deleted": True})
    assert ask_figures(place.socket)["blocks"] == blocks - len(A) // BLOCK
    assert place.labels().keys() == {b}
    for gone in (place.complete([a]), place.fleet.client.get(f"/v1/contexts/{a}")):
        assert error_of(gone)[:2] == (404, "context_not_found")
    assert [item["id"] for item in place.fleet.client.get("/v1/contexts").json()["data"]] == [b]


def test_a_short_text_is_made_and_says_that_nothing_is_kept(place: Place) -> None:
    made = place.made(text="short")
    assert (made["tokens"], made["blocks"], made["bytes"]) == (5, 0, 0)
    assert f"shorter than {BLOCK} tokens" in made["note"]
    assert place.complete([made["id"]], "!").status_code == 200
    assert place.asked()["prompt"] == "short!"


def test_blocks_that_do_not_come_are_not_waited_for_for_long_and_are_said(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.context_routes.COMPLETE_WAIT_S", 0.05)
    place.prefill.forgetful = True
    made = place.made(text=A)
    assert made["blocks"] == 0
    assert "do the instances share its cache" in made["note"]


def test_what_finds_no_room_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the arena's 85 blocks may be reserved at a time."""
    monkeypatch.setattr("proxy.context_routes.COMPLETE_WAIT_S", 0.05)
    long = "omega? " * (60 * BLOCK // 7 + 1)
    made = place.made(text=long)
    assert 0 < made["blocks"] < made["total_blocks"] == len(long) // BLOCK
    assert made["note"] == f"{made['blocks']} of {made['total_blocks']} blocks are kept: the cache is full or busy"


def test_what_cannot_be_pinned_is_said(place: Place) -> None:
    """Half of the arena's 85 blocks may be pinned."""
    pinned = [place.made(text=text, pin=True) for text in ("delta! " * 40, "kappa: " * 40, "sigma, " * 40)]
    assert [item["pinned"] for item in pinned] == [True, True, False]
    assert pinned[2]["blocks"] == pinned[2]["total_blocks"]
    assert "not pinned: the cache server pins no more" in pinned[2]["note"]


def test_what_was_evicted_shows_in_the_list_and_comes_back_with_its_name(place: Place) -> None:
    made = place.made(text=A, name="n")
    drop_all(place.socket)
    (shown,) = place.fleet.client.get("/v1/contexts").json()["data"]
    assert (shown["blocks"], shown["total_blocks"]) == (0, len(A) // BLOCK)
    again = place.post(text=A, name="n").json()
    assert (again["id"], again["blocks"]) == (made["id"], len(A) // BLOCK)


def test_an_instances_refusal_is_passed_on_and_nothing_is_kept(place: Place) -> None:
    place.prefill.behaviour.status, place.prefill.behaviour.message = 400, "the context is too long"
    refused = place.post(text=A, name="n")
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "the context is too long")
    assert refused.headers["x-request-id"]
    assert place.fleet.client.get("/v1/contexts").json()["data"] == []
    place.prefill.behaviour.status = 200
    assert place.made(text=B, name="n")


def test_what_cannot_be_a_context_is_a_400_and_nothing_is_computed(place: Place) -> None:
    for fields, said in (
        ({"text": "a", "ttl": 7}, "unknown field 'ttl'; did you mean ttl_s?"),
        ({"text": "\ud800"}, "plain JSON in Unicode"),
        ({"text": "a", "cache_salt": 7}, "cache_salt must be a text"),
        ({"text": "a", "kv_transfer_params": {"a": 1}}, "clients may not set kv_transfer_params"),
    ):
        refused = place.fleet.client.post("/v1/contexts", content=json.dumps(fields).encode())
        assert refused.status_code == 400
        assert said in error_of(refused)[2]
    assert place.prefill.generations() == []


def test_what_cannot_be_used_is_a_400_or_404(place: Place) -> None:
    text, template = place.made(text=A)["id"], place.made(template=A + "{{x}}")["id"]
    for fields, status, said in (
        ({"context_ids": "ctx-1"}, 400, "must be a list"),
        ({"context_ids": ["ctx-1"]}, 404, "no context 'ctx-1' is known"),
        ({"context_ids": [template]}, 400, "is a template"),
        ({"context": {"id": text}}, 400, "is no template"),
        ({"context": {"id": template, "values": {}}}, 400, "context must be"),
        ({"context": {"id": template}, "context_ids": [text]}, 400, "cannot be used together"),
        ({"context_ids": [text], "prompt": [1, 2]}, 400, "the prompt must be a text"),
    ):
        refused = place.fleet.complete(**fields)
        assert refused.status_code == status, refused.text
        assert said in error_of(refused)[2]
    refused = place.fleet.chat(context_ids=[text], messages="hello")
    assert "messages must be a list" in error_of(refused)[2]
    assert place.decode.generations() == []
    assert place.fleet.complete(context_ids=[]).status_code == 200
    assert "context_ids" not in place.asked()


def test_a_few_bytes_cannot_become_very_many(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    text, template = place.made(text=A)["id"], place.made(template="{{x}}" * 9)["id"]
    monkeypatch.setattr("proxy.context_use.MAX_BODY_BYTES", 200)
    monkeypatch.setattr("proxy.placeholders.MAX_BODY_BYTES", 200)
    assert place.complete([text, text]).status_code == 200
    assert error_of(place.complete([text] * 3))[:2] == (413, "body_too_large")
    for value, status in (("x" * 20, 200), ("x" * 30, 413)):
        filled = {"id": template, "variables": {"x": value}}
        assert place.fleet.complete(context=filled).status_code == status


def test_a_streamed_answer_has_the_header_too(place: Place) -> None:
    (a,) = place.ids(A)
    answer = place.complete([a], stream=True)
    assert reuse(answer) == ["prefix"]
    assert answer.text.endswith("data: [DONE]\n\n")


def test_without_a_cache_the_remedy_is_named() -> None:
    with running(settings("")) as fleet, engines(Role.PREFILL, Role.DECODE) as pair:
        fleet.join(*pair)
        status, code, message = error_of(fleet.client.post("/v1/contexts", json={"text": A}))
        assert (status, code, "--cache 8GiB" in message) == (409, "no_cache", True)
        assert fleet.client.get("/v1/contexts").json()["data"] == []


def test_without_its_cache_server_contexts_are_used_and_listed_but_neither_made_nor_dropped(tmp_path: Path) -> None:
    file = str(tmp_path / "contexts.jsonl")
    with (
        serving_here(tmp_path, 1 << 20) as server,
        running(settings(server.socket, contexts_file=file)) as fleet,
        StoringEngine(Role.PREFILL, socket=server.socket) as prefill,
        engines(Role.DECODE) as (decode,),
    ):
        until(lambda: prefill.cache.is_connected, "it knows the cache")
        fleet.join(prefill, decode)
        made = fleet.client.post("/v1/contexts", json={"text": A}).json()
    with running(settings(server.socket, contexts_file=file)) as fleet, engines(Role.PREFILL, Role.DECODE) as pair:
        fleet.join(*pair)
        (shown,) = fleet.client.get("/v1/contexts").json()["data"]
        assert (shown["id"], shown["blocks"], shown["bytes"]) == (made["id"], None, None)
        assert fleet.complete(context_ids=[made["id"]]).status_code == 200
        dropped = fleet.client.delete(f"/v1/contexts/{made['id']}")
        assert error_of(dropped)[:2] == (503, "cache_unreachable")
        assert dropped.headers["retry-after"] == "1"
        assert fleet.client.get(f"/v1/contexts/{made['id']}").status_code == 200


def test_one_tenant_may_fill_a_quarter_of_the_contexts(tmp_path: Path) -> None:
    with (
        serving_here(tmp_path, 1 << 20) as server,
        running(settings(server.socket, context_limit=8)) as fleet,
        engines(Role.PREFILL, Role.DECODE) as pair,
    ):
        fleet.join(*pair)
        for _ in range(2):
            assert fleet.client.post("/v1/contexts", json={"text": "short"}).status_code == 201
        status, code, message = error_of(fleet.client.post("/v1/contexts", json={"text": "short"}))
        assert (status, code) == (409, "too_many_contexts")
        assert "your contexts may be 2" in message
        for key in KEYS:
            assert fleet.client.post("/v1/contexts", json={"text": "short"}, headers=key).status_code == 201
