"""The systems that `baton bench cache` compares: one engine behind Baton's own proxy, `peer` under workloads two.

plain, prefix            proxy ── vLLM                            its own prefix cache off, on
host, disk, redis, peer  proxy ── vLLM + Baton ── cache server ── disk | Redis | another cache server
lmcache, ...-disk, ...   proxy ── vLLM + LMCacheMPConnector ── lmcache server ── disk | Redis
"""

from __future__ import annotations

import enum

import msgspec


class Kind(enum.Enum):
    """Who keeps the blocks beyond the engine's own cache."""

    NOBODY = "nobody"
    BATON = "baton"
    LMCACHE = "lmcache"


class CacheSystem(msgspec.Struct, frozen=True):
    """One competitor. tier: where it finds what its engine has forgotten. has_all_memory: its engine's own cache gets
    the host memory of the others on top. has_workloads: whether workloads are worth their time with it."""

    name: str
    kind: Kind
    tier: str = ""
    has_all_memory: bool = False
    has_workloads: bool = True

    @property
    def is_below_host(self) -> bool:
        """Whether something lies above its tier that has to forget first."""
        return self.tier in ("disk", "redis", "peer")


SYSTEMS = {
    system.name: system
    for system in (
        CacheSystem("plain", Kind.NOBODY),
        CacheSystem("prefix", Kind.NOBODY, "engine"),
        CacheSystem("prefix-large", Kind.NOBODY, "engine", has_all_memory=True),
        CacheSystem("host", Kind.BATON, "host"),
        CacheSystem("disk", Kind.BATON, "disk"),
        CacheSystem("redis", Kind.BATON, "redis"),
        CacheSystem("peer", Kind.BATON, "peer"),
        CacheSystem("lmcache", Kind.LMCACHE, "host"),
        CacheSystem("lmcache-disk", Kind.LMCACHE, "disk", has_workloads=False),
        CacheSystem("lmcache-redis", Kind.LMCACHE, "redis", has_workloads=False),
    )
}


class Memory(msgspec.Struct, frozen=True):
    """engine_bytes: of every engine's KV cache. host_bytes: of every arena and of LMCache's host memory. max_model_len:
    of every engine; 0 leaves it as the recipe has it."""

    engine_bytes: int
    host_bytes: int
    max_model_len: int = 0
