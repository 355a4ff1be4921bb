"""In which order the complete blocks of an arena go, by the rules that were asked for.

    every block that may be evicted ──▶ the policy's books          whose room is needed next?
                                    ├─▶ its tenant's own books      (with quota=) which of this tenant's?
                                    └─▶ the watch over idle ones    (with ttl=)

Memory model: keys and tenants only.
Threading: the server's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.clock import Clock
from kvcache.idle import Idle
from kvcache.keys import BlockKey
from kvcache.policy import Policy, make_policy
from kvcache.rules import Rules


class Order:
    """The blocks that may be evicted."""

    def __init__(self, rules: Rules, clock: Clock) -> None:
        self._rules = rules
        self._all = make_policy(rules.policy)
        self._idle = Idle(rules.ttl_s, clock)
        self._tenant_of: dict[BlockKey, bytes] = {}
        self._own: dict[bytes, tuple[Policy, set[BlockKey]]] = {}

    def admitted(self, key: BlockKey, tenant: bytes) -> None:
        """A block of this tenant may be evicted from now on."""
        self._all.admitted(key)
        self._idle.admitted(key)
        if self._rules.quota_bytes:
            policy, keys = self._own.setdefault(tenant, (make_policy(self._rules.policy), set()))
            policy.admitted(key)
            keys.add(key)
            self._tenant_of[key] = tenant

    def touched(self, keys: Sequence[BlockKey]) -> None:
        """A chain of blocks is recent."""
        self._all.touched(keys)
        self._idle.touched(keys)
        for policy in self._owners(keys):
            policy.touched(keys)

    def used(self, keys: Sequence[BlockKey]) -> None:
        """A request asked for a chain of blocks and got it."""
        self._all.used(keys)
        self._idle.touched(keys)
        for policy in self._owners(keys):
            policy.used(keys)

    def removed(self, key: BlockKey) -> None:
        """A block is gone, or may not be evicted for now."""
        self._all.removed(key)
        self._disowned(key)

    def victim(self, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        """The block that goes next, out of those that may; it is in no books any more. None if none may."""
        key = self._all.victim(may_go)
        if key is not None:
            self._disowned(key)
        return key

    def victim_of(self, tenant: bytes, may_go: Callable[[BlockKey], bool]) -> BlockKey | None:
        """The same among one tenant's blocks; only with a quota."""
        own = self._own.get(tenant)
        key = own[0].victim(may_go) if own is not None else None
        if key is not None:
            self.removed(key)
        return key

    def idle(self) -> list[BlockKey]:
        """Blocks that were not used for the rules' time."""
        return self._idle.over()

    def _owners(self, keys: Sequence[BlockKey]) -> list[Policy]:
        if not self._rules.quota_bytes:
            return []
        tenants = dict.fromkeys(self._tenant_of[key] for key in keys if key in self._tenant_of)
        return [self._own[tenant][0] for tenant in tenants]

    def _disowned(self, key: BlockKey) -> None:
        self._idle.removed(key)
        tenant = self._tenant_of.pop(key, None)
        if tenant is not None:
            policy, keys = self._own[tenant]
            policy.removed(key)
            keys.discard(key)
            if not keys:
                del self._own[tenant]
