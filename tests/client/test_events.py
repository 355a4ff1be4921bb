"""A stream's bytes may be cut anywhere; the text is the same."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import BatonClientError, Busy, NotReached
from client.errors import error_of
from client.events import EventReader

TEXTS = [" Frënds,", " Romans,\n", " countrymen"]


def stream_of(texts: list[str], end: bytes = b"data: [DONE]\n\n") -> bytes:
    events = [{"choices": [{"index": 0, "delta": {"content": text}, "token_ids": [7]}]} for text in texts]
    last = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}}
    lines = [json.dumps(event, ensure_ascii=False).encode() for event in [*events, last]]
    return b": a comment\n\n" + b"".join(b"data: " + line + b"\r\n\r\n" for line in lines) + end


@given(st.lists(st.integers(0, len(stream_of(TEXTS))), max_size=12))
def test_wherever_it_is_cut(cuts: list[int]) -> None:
    data = stream_of(TEXTS)
    ends = [0, *sorted(cuts), len(data)]
    reader = EventReader({"x-request-id": "req-1", "x-baton-contexts": "ctx-1=prefix"})
    pieces = [text for begin, end in itertools.pairwise(ends) for text in reader.feed(data[begin:end])]
    whole = reader.end()
    assert pieces == TEXTS
    assert (whole.text, whole.token_ids, whole.request_id) == ("".join(TEXTS), (7, 7, 7), "req-1")
    assert whole.usage is not None
    assert whole.usage.total_tokens == 8
    assert [(part.id, part.reuse) for part in whole.contexts] == [("ctx-1", "prefix")]


def test_a_stream_without_its_end_is_an_error() -> None:
    reader = EventReader({})
    reader.feed(stream_of(TEXTS, end=b""))
    with pytest.raises(NotReached, match="ended before its end"):
        reader.end()


def test_an_error_in_the_stream_is_raised() -> None:
    error = b'data: {"error": {"message": "the instance was lost", "code": "instance_lost"}}\n\n'
    with pytest.raises(BatonClientError, match="the instance was lost"):
        EventReader({}).feed(stream_of(TEXTS[:1], end=error))


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"", "status 503"), (b"<html>", "<html>"), (b'{"error": "x"}', '{"error": "x"}'), (b"\xff", "\ufffd")],
)
def test_an_answer_that_is_no_error_object_is_shown_as_it_is(body: bytes, message: str) -> None:
    error = error_of(503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, body)
    assert (type(error), str(error), error.retry_after_s) == (Busy, message, None)
