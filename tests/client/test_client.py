"""Both clients: what is asked, what comes back, what is tried again, and what is raised."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from client import BatonClientError, Busy, ContextNotFound, Generation, NotReached, Refused, TimedOut
from core.errors import BatonError
from core.handoff import Role
from proxy.server import listen
from proxy.settings import Settings
from tests.client.blocking import client_of
from tests.fakes.engine import FakeEngine
from tests.proxy.fleet import Fleet, running, until
from tests.proxy.place import Place
from tests.proxy.storing import BLOCK
from tests.readme import ROOT

A, B = "alpha. " * 10, "beta, " * 10


def test_a_context_from_its_making_to_its_end(place: Place, client: Any) -> None:
    made = client.cache_context(text=A, name="alpha", ttl_s=100, pin=True)
    assert (made.name, made.kind, made.endpoint, made.pinned, made.note) == ("alpha", "text", "completion", True, None)
    assert (made.tokens, made.blocks, made.total_blocks) == (len(A), len(A) // BLOCK, len(A) // BLOCK)
    assert client.context(made.id).bytes == made.bytes > 0
    assert [context.id for context in client.contexts()] == [made.id]
    answer = client.generate_with_context(made, "And?", max_tokens=3, seed=5)
    assert answer.text == " t0 t1 t2"
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 3)
    assert [(part.id, part.reuse) for part in answer.contexts] == [(made.id, "prefix")]
    assert (place.asked()["prompt"], place.asked()["seed"], place.asked()["model"]) == (A + "And?", 5, "fake")
    record = client.record(answer.request_id)
    assert (record.status, record.contexts) == ("done", list(answer.contexts))
    client.drop_context(made)
    assert client.contexts() == []
    with pytest.raises(ContextNotFound, match="GET /v1/contexts lists yours") as gone:
        client.generate_with_context(made, "And?")
    assert (gone.value.status, gone.value.code) == (404, "context_not_found")


def test_a_text_behind_a_chats_context_is_what_the_user_asks(place: Place, client: Any) -> None:
    made = client.cache_context(text=A, endpoint="chat")
    other = client.cache_context(messages=[{"role": "user", "content": B}])
    asked = {"role": "user", "content": "And?"}
    both = [{"role": "system", "content": A}, {"role": "user", "content": B}]
    answer = client.generate_with_contexts([made, other], "And?")
    assert place.asked()["messages"] == [*both, asked]
    assert [part.reuse for part in answer.contexts] == ["prefix", "recomputed"]
    client.generate([asked], contexts=[made.id])
    assert place.asked()["messages"] == [both[0], asked]


def test_templates_and_a_batch_in_which_one_fails(place: Place, client: Any) -> None:
    template = client.template(A + "{{who}}: {{what}}", name="ask")
    assert (template.id, template.variables) == (template.context.id, ["who", "what"])
    answer = client.generate(template.fill(who="Rome", what="war").followed_by(" Well?"))
    assert place.asked()["prompt"] == A + "Rome: war Well?"
    assert [part.reuse for part in answer.contexts] == ["prefix"]
    with pytest.raises(Refused, match="missing: what; unknown: when"):
        template.fill(who="Rome", when="now")
    variables = [{"who": "Rome", "what": str(number)} for number in range(12)]
    variables[5] = {"who": "Rome"}
    before = len(place.decode.generations())
    answers = client.batch(template, variables, concurrency=3, max_tokens=2)
    assert [isinstance(answer, Generation) for answer in answers] == [number != 5 for number in range(12)]
    assert isinstance(answers[5], Refused)
    prompts = {client.record(a.request_id).id: a for a in answers if isinstance(a, Generation)}
    sent = {r.request_id: r.body["prompt"] for r in place.decode.generations()[before:]}
    for number, answer in enumerate(answers):
        if number != 5:
            assert sent[answer.request_id] == A + f"Rome: {number}", "each answer stands in its variables' place"
    assert len(prompts) == 11


def test_a_stream_gives_the_texts_as_they_come_and_the_whole_at_its_end(place: Place, client: Any) -> None:
    made = client.cache_context(text=A)
    pieces, whole = client.read("?", contexts=[made], max_tokens=3, stream_options={"include_usage": True})
    assert pieces == [" t0", " t1", " t2"]
    assert (whole.text, whole.usage.completion_tokens) == (" t0 t1 t2", 3)
    assert [part.reuse for part in whole.contexts] == ["prefix"]
    assert client.record(whole.request_id).status == "done"
    assert client.read([{"role": "user", "content": "?"}], max_tokens=2)[0] == [" t0", " t1"]


def test_a_stream_that_breaks_off_is_an_error_and_one_that_is_left_ends_at_the_instance(
    place: Place, client: Any
) -> None:
    place.decode.behaviour.break_after = 2
    with pytest.raises(BatonClientError, match="was lost"):
        client.read("?", max_tokens=5)
    place.decode.behaviour.break_after, place.decode.behaviour.hold_after = None, 1
    until(lambda: place.fleet.state(place.decode) == "ready", "D is back")

    def noticed() -> None:
        until(lambda: len(place.decode.left) == 1, "the instance has noticed")

    assert client.begin("?", noticed, max_tokens=5) == " t0"
    place.decode.behaviour.hold_after = None


def test_a_stream_that_is_refused_says_why(place: Place, client: Any) -> None:
    place.decode.behaviour.status, place.decode.behaviour.message = 400, "too long"
    with pytest.raises(Refused, match="too long"):
        client.read("?")


def test_a_conversation_keeps_its_turns_and_forgets_those_that_failed(place: Place, client: Any) -> None:
    made = client.cache_context(text=A, endpoint="chat")
    talk = client.conversation(made, max_tokens=2)
    assert talk.say("One?") == " t0 t1"
    place.decode.behaviour.status = 400
    with pytest.raises(Refused):
        talk.say("Two?")
    place.decode.behaviour.status = 200
    assert "".join(talk.stream("Three?")) == " t0 t1"
    answer = {"role": "assistant", "content": " t0 t1"}
    asked = [{"role": "user", "content": text} for text in ("One?", "Three?")]
    assert talk.messages == [asked[0], answer, asked[1], answer]
    assert place.asked()["messages"] == [{"role": "system", "content": A}, asked[0], answer, asked[1]]
    assert [part.reuse for part in talk.last.contexts] == ["prefix"]


def test_an_error_has_the_servers_words(client: Any) -> None:
    with pytest.raises(Refused) as refused:
        client.generate("?", kv_transfer_params={"a": 1})
    error = refused.value
    assert (error.status, error.code, error.param) == (400, "field_not_allowed", "kv_transfer_params")
    assert isinstance(error, BatonError)


def test_tenants_by_key_and_by_salt(place: Place, kind: str) -> None:
    def nothing(_seconds: float) -> None: ...

    with (
        client_of(kind, place.fleet.url, nothing, api_key="sk-one") as one,
        client_of(kind, place.fleet.url, nothing, cache_salt="two") as two,
    ):
        made = [client.cache_context(text=A, name="same") for client in (one, two)]
        for client, own, others in ((one, *made), (two, *reversed(made))):
            assert [context.id for context in client.contexts()] == [own.id]
            assert client.generate_with_context(own, "?").contexts[0].reuse == "prefix"
            with pytest.raises(ContextNotFound):
                client.generate_with_context(others, "?")
            with pytest.raises(ContextNotFound):
                client.drop_context(others)
            client.drop_context(own)


def test_busy_is_tried_again_after_the_time_that_the_server_says(fleet: Fleet, kind: str) -> None:
    waited: list[float] = []
    with FakeEngine(Role.DECODE) as engine:

        def join(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                fleet.join(engine)

        with client_of(kind, fleet.url, join) as client:
            assert client.generate("?", max_tokens=1).text == " t0"
        assert len(waited) == 2
        assert all(1.0 <= seconds <= 1.3 for seconds in waited), "the server says 1 s"


def test_busy_for_too_long_is_raised_with_the_time_to_wait(fleet: Fleet, kind: str) -> None:
    waited: list[float] = []
    with client_of(kind, fleet.url, waited.append, max_retries=2) as client, pytest.raises(Busy) as busy:
        client.generate("?")
    assert (busy.value.status, busy.value.code, busy.value.retry_after_s) == (503, "no_instance", 1.0)
    assert len(waited) == 2


def test_a_server_that_is_not_there_is_tried_again_and_named(kind: str) -> None:
    with listen("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    waited: list[float] = []
    with (
        client_of(kind, url, waited.append, max_retries=3) as client,
        pytest.raises(NotReached, match=f"cannot reach {url}: .*; is it running"),
    ):
        client.contexts()
    assert len(waited) == 3
    assert waited == sorted(waited), "each wait is longer"


def test_silence_is_bounded_and_ends_the_request(place: Place, kind: str) -> None:
    place.decode.behaviour.hold = True
    with (
        client_of(kind, place.fleet.url, lambda _: None, timeout_s=0.2) as client,
        pytest.raises(TimedOut, match="silent for too long"),
    ):
        client.generate("?")
    until(lambda: bool(place.decode.left), "the instance has noticed")
    place.decode.behaviour.hold = False
    assert len(place.decode.generations()) == 1, "nothing that may have been done is asked again"


def test_what_is_not_baton_is_said_to_be(kind: str) -> None:
    with (
        FakeEngine(Role.DECODE) as other,
        client_of(kind, other.url, lambda _: None) as client,
        pytest.raises(BatonClientError, match="something that is not Baton"),
    ):
        client.cache_context(text=A)


def test_the_command_does_not_import_what_only_the_client_needs() -> None:
    code = (
        "import sys, baton; print('httpx' in sys.modules); from baton import AsyncBatonClient, BatonClient;"
        "import client; print(client.BatonClient is BatonClient, client.AsyncBatonClient is AsyncBatonClient)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == ["False", "True", "True"]


@pytest.fixture
def fleet() -> Any:
    with running(Settings(health_poll_s=0.02, report_wait_s=0.05)) as fleet:
        yield fleet
