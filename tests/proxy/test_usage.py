"""Handed-over tokens are not shown as cached; everything else passes byte for byte."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from proxy.usage import EventFilter, without_cached

TOLD = b'{"id":"1","choices":[],"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8}}}'
SAID = b'{"choices":[{"text":"prompt_tokens_details"}],"usage":null}'
PLAIN = b'{"choices":[{"text":"caf\xc3\xa9"}],  "usage": {"prompt_tokens_details":null}}'
STREAM = b"".join(b"data: " + event + b"\n\n" for event in (PLAIN, SAID, TOLD, PLAIN, b"[DONE]"))


def test_the_detail_becomes_null_and_the_rest_stays() -> None:
    told = json.loads(TOLD)
    told["usage"]["prompt_tokens_details"] = None
    assert json.loads(without_cached(TOLD)) == told


def test_text_that_only_speaks_of_it_is_not_touched() -> None:
    for text in (SAID, PLAIN, b"prompt_tokens_details", b'["prompt_tokens_details"]'):
        assert without_cached(text) is text


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_wherever_the_stream_is_cut_the_same_comes_out(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    events = EventFilter()
    out = b"".join(events.feed(STREAM[a:b]) for a, b in pairwise(edges)) + events.flush()
    assert out == STREAM.replace(TOLD, without_cached(TOLD))
    assert b"cached_tokens" not in out


def test_a_whole_event_passes_at_once_and_a_half_one_waits() -> None:
    events = EventFilter()
    assert events.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert events.feed(b"data: 2\n\ndata: ") == b"data: 2\n\n"
    assert events.feed(b"3\n\n") == b"data: 3\n\n"
    assert events.feed(b"data: 4") == b""
    assert events.flush() == b"data: 4"
