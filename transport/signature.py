"""Signs what is not encrypted: an instance's heartbeat, so that only holders of the cluster's keys join the proxy.

    x-baton-signature: UNIX_TIME.HEX        HMAC-SHA256 over the time and the body, by the keys' signing key

Memory and threading: pure functions.
"""

from __future__ import annotations

import hashlib
import hmac

from core.errors import ProtocolError
from transport.keys import Keys

HEADER = "x-baton-signature"
MAX_AGE_S = 60.0
"""So old, or so far ahead of our clock, may what is signed be: clocks differ, and a copy is of no use for long."""


def sign(keys: Keys, body: bytes, unix_s: float) -> str:
    """The header's value for this body, now."""
    moment = f"{unix_s:.0f}"
    return f"{moment}.{_digest(keys, moment, body)}"


def check_signature(keys: Keys | None, header: str | None, body: bytes, unix_s: float) -> None:
    """Raises ProtocolError, naming cause and remedy, unless both sides have the same keys, or none."""
    if keys is None:
        if header is not None:
            raise ProtocolError("the instance has keys and the proxy has none: start the proxy with the same --keys")
        return
    if header is None:
        raise ProtocolError("the proxy has keys and the instance has none: start the instance with the same --keys")
    moment, _, digest = header.partition(".")
    if not moment.isascii() or not hmac.compare_digest(digest.encode(), _digest(keys, moment, body).encode()):
        raise ProtocolError("the instance has other keys than the proxy: give both the same --keys file")
    if abs(unix_s - float(moment)) > MAX_AGE_S:
        raise ProtocolError(
            f"the heartbeat was signed {unix_s - float(moment):.0f} s ago by the proxy's clock: set both hosts' clocks"
        )


def _digest(keys: Keys, moment: str, body: bytes) -> str:
    return hmac.digest(keys.signing_key(), moment.encode() + b"." + body, hashlib.sha256).hex()
