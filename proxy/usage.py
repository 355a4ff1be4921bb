"""Leaves `prompt_tokens_details` out of the usage of a handed-off request.

The decode instance counts every token it did not compute as cached, also those that a prefill instance computed for
this very request; clients are billed by that number. vLLM without `--enable-prompt-tokens-details` puts null there, and
so does this. Everything else passes byte for byte: only a JSON text in which the key occurs is parsed at all.
"""

from __future__ import annotations

import json

_KEY = b"prompt_tokens_details"
_END = b"\n\n"
_DATA = b"data: "


def without_cached(text: bytes) -> bytes:
    """The same JSON object with its usage's detail set to null."""
    if _KEY not in text:
        return text
    try:
        answer = json.loads(text)
    except ValueError:
        return text
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict) or usage.get(_KEY.decode()) is None:
        return text
    usage[_KEY.decode()] = None
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


class EventFilter:
    """`without_cached` over a stream of events whose chunks may end anywhere.

    A chunk that ends with an event, as vLLM's do, passes without a copy; an event that is cut waits for its other half.
    """

    def __init__(self) -> None:
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """What may go to the client now."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if not chunk.endswith(_END):
            end = chunk.rfind(_END)
            cut = end + len(_END) if end >= 0 else 0
            chunk, self._held = chunk[:cut], chunk[cut:]
        if _KEY not in chunk:
            return chunk
        return _END.join(_filter_event(event) for event in chunk.split(_END))

    def flush(self) -> bytes:
        """What was held when the stream ended."""
        held, self._held = self._held, b""
        return held


def _filter_event(event: bytes) -> bytes:
    if not event.startswith(_DATA):
        return event
    return _DATA + without_cached(event.removeprefix(_DATA))
