"""What a cluster is started with beyond its topology."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from cluster.bundled import bundled_model
from core.handoff import Role
from engine.instance import ServedModel
from kvcache.spec import CacheSpec


class Start(enum.Enum):
    """How instances are started: forked from a preloaded process (CPU only), or each by `vllm serve`."""

    FORK = "fork"
    PLAIN = "plain"


class ClusterOptions(msgspec.Struct, frozen=True):
    """host and port are the proxy's; port 0 takes a free one. open_control: instances of other hosts may join, so
    everything listens on `host` instead of on loopback.

    arguments_*: for `vllm serve`, by role. connector: options of every connector (engine/settings.py), connector_*: of
    one role's. start: None takes the fastest that this vLLM knows. environment: for the instances.
    cache: the KV cache that all instances share; None: each keeps its own blocks only.
    keys: path of the cluster's key file (`baton keys`); empty: nothing is encrypted.
    restart: start again what dies. start_timeout_s: until all are ready.
    """

    model: ServedModel = msgspec.field(default_factory=bundled_model)
    host: str = "127.0.0.1"
    port: int = 0
    open_control: bool = False
    transport: str = "auto"
    start: Start | None = None
    arguments_prefill: tuple[str, ...] = ()
    arguments_decode: tuple[str, ...] = ()
    connector: dict[str, Any] = {}
    connector_prefill: dict[str, Any] = {}
    connector_decode: dict[str, Any] = {}
    environment: dict[str, str] = {}
    proxy_arguments: tuple[str, ...] = ()
    cache: CacheSpec | None = None
    keys: str = ""
    restart: bool = True
    start_timeout_s: float = 900.0

    def arguments(self, role: Role) -> tuple[str, ...]:
        return self.arguments_prefill if role is Role.PREFILL else self.arguments_decode

    def connector_of(self, role: Role) -> dict[str, Any]:
        keys = {"keys": self.keys} if self.keys else {}
        return keys | self.connector | (self.connector_prefill if role is Role.PREFILL else self.connector_decode)
