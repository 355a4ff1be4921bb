"""A client's body: parsed once, guarded, and passed on byte for byte with its tenant's salt and our ticket spliced in.

The bytes that D gets are the client's own, so nothing that a JSON library might change (number forms, key order,
escapes) is changed. Clients may not speak to the connector: `kv_transfer_params`, `ec_transfer_params` and any key that
begins with `baton` are refused wherever vLLM would copy them into a request's `extra_args`.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from core.handoff import Handoff
from proxy.errors import RequestRefused

MAX_BODY_BYTES = 64 << 20
_REFUSED = frozenset({"kv_transfer_params", "ec_transfer_params"})
_CONTAINERS = ("vllm_xargs", "extra_args", "sampling_params")
"""Fields whose content vLLM copies into `SamplingParams.extra_args`, on one endpoint or another."""


class ClientBody(msgspec.Struct, frozen=True):
    """A body that has passed the guard: the fields to decide by, and the bytes to send."""

    fields: dict[str, Any]
    raw: bytes

    def with_salt(self, salt: str | None) -> ClientBody:
        """The same body in the cache of this tenant; unchanged without one, or if the client has set a salt itself."""
        if salt is None or self.fields.get("cache_salt") is not None:
            return self
        return ClientBody(self.fields | {"cache_salt": salt}, self._with("cache_salt", salt))

    def with_ticket(self, handoff: Handoff | None) -> bytes:
        """The bytes for the instance that answers."""
        return self.raw if handoff is None else self._with("kv_transfer_params", handoff.to_params())

    def _with(self, name: str, value: object) -> bytes:
        """The bytes with one more field, at the end: of a name that is there twice (with null), JSON takes the last."""
        separator = "," if self.fields else ""
        field = f'{separator}"{name}":'.encode() + msgspec.json.encode(value)
        return self.raw.rstrip()[:-1] + field + b"}"


def read_body(raw: bytes) -> ClientBody:
    """Parses and guards. Raises RequestRefused (400) with the reason, naming the field where there is one."""
    try:
        fields = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise RequestRefused(f"the body must be a JSON object, not {type(fields).__name__}", code="invalid_json")
    if _drop_guarded(fields, ""):
        raw = json.dumps(fields, separators=(",", ":")).encode()
    return ClientBody(fields, raw)


def _drop_guarded(fields: dict[str, Any], path: str) -> bool:
    """Refuses guarded names, drops those whose value is null; True if any was dropped."""
    dropped = False
    for name in [name for name in fields if name in _REFUSED or name.startswith("baton")]:
        if fields[name] is not None:
            raise RequestRefused(f"clients may not set {path}{name}", param=path + name, code="field_not_allowed")
        del fields[name]
        dropped = True
    for name in _CONTAINERS:
        inner = fields.get(name)
        if isinstance(inner, dict) and _drop_guarded(inner, f"{path}{name}."):
            dropped = True
    return dropped
