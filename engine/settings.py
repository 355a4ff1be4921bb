"""The connector's options: `kv_connector_extra_config` of `--kv-transfer-config`, typed."""

from __future__ import annotations

from typing import Any

import msgspec

from core.errors import ConfigError
from core.handoff import Role
from decode.admission import Limits
from transport.faultpoint import Fault
from transport.keys import Keys, read_keys


class ConnectorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of one instance.

    name: for people and metrics; unique behind one proxy. role: what the proxy routes to it.
    url: where this instance's OpenAI server answers; join: the proxy to register with (empty: none).
    host: interface that control and data sockets bind to; loopback unless told otherwise.
    transport: auto, or one of transport/schemes.py. transport_options: by scheme, what it takes (nixl: NixlOptions in
    transport/nixl_agent.py). full_digest: every byte counts in the digest also over shm.
    audit: fill blocks with a pattern before asking for them, and count afterwards what was not written.
    cache: the socket of the host's cache server; empty: KV is kept in the engine alone.
    keys: path of the cluster's key file (`baton keys`): what leaves this host is encrypted, and only who has the same
        keys is spoken to; empty: nothing is encrypted.
    fault, faulty: for tests of recovery, see transport/faultpoint.py and transport/faulty.py (for all, or by scheme).
    device: for tests without a GPU, see engine/devices.py.
    """

    name: str = "baton"
    role: Role = Role.DECODE
    url: str = ""
    join: str = ""
    host: str = "127.0.0.1"
    transport: str = "auto"
    transport_options: dict[str, dict[str, Any]] = {}
    full_digest: bool = False
    audit: bool = False
    limits: Limits = Limits()
    fault: Fault | None = None
    faulty: dict[str, Any] = {}
    cache: str = ""
    keys: str = ""
    device: str = ""

    @classmethod
    def parse(cls, options: dict[str, Any]) -> ConnectorSettings:
        """Raises ConfigError naming the option that is wrong."""
        try:
            return msgspec.convert(options, cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"kv_connector_extra_config: {error}; known options: {known}") from error

    def read_keys(self) -> Keys | None:
        """None where nothing is encrypted. Raises ConfigError as `transport.keys.read_keys` does."""
        return read_keys(self.keys) if self.keys else None
