"""The ticket that joins both phases of one request.

The proxy writes the same `Handoff` into both legs, as `kv_transfer_params = {"baton": {...}}`. Each instance finds
its role by comparing boot ids with its own, so a ticket written for an instance that has restarted since fits nobody
and is computed locally. A ticket without a prefill peer asks for no transfer; it only carries the id under which the
instance reports what it did, and perhaps a label.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, Any

import msgspec

from core.errors import ProtocolError

PARAMS_KEY = "baton"
"""The key of `kv_transfer_params` under which the ticket travels."""

LONGEST_NAME = 1024
"""Characters of what names an instance or a hand-off: peers keep them."""

LONGEST_LABEL = 128
"""Characters of a label's name."""


class Role(enum.Enum):
    """The phases an instance is routed for. Any instance can send and receive; the role is a routing matter."""

    PREFILL = "prefill"
    DECODE = "decode"


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One side of a hand-off.

    name: the instance's name, for people.
    control: address of its control socket, for example `tcp://127.0.0.1:40123`.
    boot_id: random per engine start; a restarted engine is another peer.
    num_ranks: its tensor-parallel workers, each of which sends and receives its own heads.
    """

    name: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
    control: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
    boot_id: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
    num_ranks: int = 1


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name for the KV blocks of one prompt, so that they can be listed, pinned, kept for a time and dropped.

    ttl_s: seconds until its blocks are dropped from the cache; 0: they stay until they are evicted.
    pin: they are not evicted while the label lives.
    Raises ProtocolError for a name that is not 1 to 128 printable characters, or a time that is not finite and >= 0.
    """

    name: str
    ttl_s: float = 0.0
    pin: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= LONGEST_LABEL or not self.name.isprintable():
            raise ProtocolError(f"a label has 1 to {LONGEST_LABEL} printable characters, not {self.name[:200]!r}")
        if not (math.isfinite(self.ttl_s) and self.ttl_s >= 0):
            raise ProtocolError(f"the label {self.name!r} cannot be kept for {self.ttl_s} s: give seconds, or 0")


class Handoff(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One request's ticket. `timeout_s` counts from each instance's own sight of the request, so clocks may differ.

    label: names the prompt's blocks in the host's cache, whichever instance computes them.
    """

    id: str
    decode: Peer
    prefill: Peer | None = None
    timeout_s: float = 60.0
    label: Label | None = None

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
