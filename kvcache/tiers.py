"""From what `--cache` says to the tiers themselves. A tier's client library is imported only where the tier is used."""

from __future__ import annotations

from pathlib import Path

from core.clock import Clock
from kvcache.spec import DiskSpec, ObjectSpec, PeersSpec, RedisSpec, TierSpec
from kvcache.tier import Tier


def make_tier(spec: TierSpec, clock: Clock) -> Tier:
    """Raises ConfigError if it cannot be: no such folder, no client library."""
    match spec:
        case DiskSpec():
            from kvcache.disk import DiskTier

            return DiskTier(Path(spec.folder), spec.num_bytes, clock)
        case RedisSpec():
            from kvcache.redis_tier import RedisTier

            return RedisTier(list(spec.urls))
        case PeersSpec():
            from kvcache.peers import PeersTier

            return PeersTier(spec.peers, clock)
        case ObjectSpec():
            from kvcache.object_tier import ObjectTier

            return ObjectTier(spec.url, clock)
