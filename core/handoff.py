"""The ticket that joins both phases of one request.

The proxy writes the same `Handoff` into both legs, as `kv_transfer_params = {"baton": {...}}`. Each instance finds
its role by comparing boot ids with its own, so a ticket written for an instance that has restarted since fits nobody
and is computed locally. A ticket without a prefill peer asks for no transfer; it only carries the id under which the
instance reports what it did.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from core.errors import ProtocolError

PARAMS_KEY = "baton"
"""The key of `kv_transfer_params` under which the ticket travels."""


class Role(enum.Enum):
    """The phases an instance is routed for. Any instance can send and receive; the role is a routing matter."""

    PREFILL = "prefill"
    DECODE = "decode"


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One side of a hand-off.

    name: the instance's name, for people.
    control: address of its control socket, for example `tcp://127.0.0.1:40123`.
    boot_id: random per engine start; a restarted engine is another peer.
    """

    name: str
    control: str
    boot_id: str


class Handoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request's ticket. `timeout_s` counts from each instance's own sight of the request, so clocks may differ."""

    id: str
    decode: Peer
    prefill: Peer | None = None
    timeout_s: float = 60.0

    def to_params(self) -> dict[str, Any]:
        """The value of `kv_transfer_params` that carries this ticket."""
        return {PARAMS_KEY: msgspec.to_builtins(self)}


def handoff_from_params(params: object) -> Handoff | None:
    """The ticket in a request's `kv_transfer_params`, or None where there is none.

    Raises ProtocolError if there is one that does not parse.
    """
    if not isinstance(params, dict) or PARAMS_KEY not in params:
        return None
    try:
        return msgspec.convert(params[PARAMS_KEY], Handoff)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"kv_transfer_params.{PARAMS_KEY} is not a hand-off ticket: {error}") from error
