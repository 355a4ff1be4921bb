"""Every error that Baton raises on purpose, in one tree.

    BatonError
    ├── ConfigError          what the user asked for cannot be started; the message names cause and remedy
    │   └── UnsupportedError     a model, vLLM version or option that no test covers yet
    ├── ProtocolError        a peer or client sent something that does not parse or does not fit
    ├── TransferError        bytes could not be moved: peer gone, connection refused, memory unmapped
    └── Overloaded           a bound was reached; try again later

Foreign errors are translated into one of these at the edge where they occur.
"""

from __future__ import annotations


class BatonError(Exception):
    """Root of the tree."""


class ConfigError(BatonError):
    """What the user asked for cannot be started."""


class UnsupportedError(ConfigError):
    """A model, version or option that no test covers yet is refused by name."""


class ProtocolError(BatonError):
    """A message does not parse, or says something impossible."""


class TransferError(BatonError):
    """Bytes could not be moved."""


class Overloaded(BatonError):
    """A bound was reached."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
