"""The contexts that this proxy knows: by id, of one tenant each, bounded in number and bytes, gone after their time.

Two requests for the same name wait for each other (`alone`), so that one content is computed once and two contents do
not share a name. What is known survives a proxy's death in a journal (`proxy/context_journal.py`).

Memory: texts and messages, at most `context_bytes` together. Threading: the event loop's thread alone.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from core.clock import Clock
from core.errors import Overloaded
from proxy.context_journal import Journal
from proxy.contexts import Context
from proxy.errors import RequestRefused
from proxy.settings import Settings

_SHARE_OF_ONE_TENANT = 4
"""One tenant may have a quarter of the contexts and of their bytes."""

Tenant = str | None


class ContextStore:
    """Contexts by id and by (tenant, name)."""

    def __init__(self, settings: Settings, clock: Clock, journal: Journal) -> None:
        self._settings = settings
        self._clock = clock
        self._journal = journal
        self._contexts: dict[str, Context] = {}
        self._num_bytes: dict[str, int] = {}
        for context in journal.load():
            self._keep(context)
        self._busy: dict[tuple[Tenant, str], asyncio.Event] = {}

    @asynccontextmanager
    async def alone(self, tenant: Tenant, name: str | None) -> AsyncIterator[None]:
        """Only one at a time makes or changes a context of this name; nameless ones are always somebody else's. Raises
        Overloaded after as long as a request may wait in the proxy."""
        if name is None:
            yield
            return
        key = (tenant, name)
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s):
                while (busy := self._busy.get(key)) is not None:
                    await busy.wait()
        except TimeoutError as error:
            raise Overloaded(f"another request is making a context named {name!r}; try again later") from error
        self._busy[key] = asyncio.Event()
        try:
            yield
        finally:
            self._busy.pop(key).set()

    def get(self, context_id: str, tenant: Tenant) -> Context:
        """Raises RequestRefused (404) if there is none, or it is another tenant's."""
        context = self._contexts.get(context_id)
        if context is None or context.tenant != tenant or self._is_over(context):
            raise RequestRefused(
                f"no context {context_id[:64]!r} is known (any more); GET /v1/contexts lists yours",
                404,
                code="context_not_found",
            )
        return context

    def named(self, name: str | None, tenant: Tenant) -> Context | None:
        """The tenant's context of this name."""
        if name is None:
            return None
        return next((context for context in self.of(tenant) if context.wish.name == name), None)

    def of(self, tenant: Tenant) -> list[Context]:
        """A tenant's contexts, the oldest first."""
        return [c for c in self._contexts.values() if c.tenant == tenant and not self._is_over(c)]

    def check_room(self, tenant: Tenant, num_bytes: int) -> None:
        """Raises RequestRefused (409) if one more of this size would pass a bound."""
        self._sweep()
        everyone, own = list(self._contexts.values()), self.of(tenant)
        for contexts, share, whose in ((own, _SHARE_OF_ONE_TENANT, "your"), (everyone, 1, "all")):
            limit, limit_bytes = self._settings.context_limit // share, self._settings.context_bytes // share
            held = sum(self._num_bytes[context.id] for context in contexts)
            if len(contexts) >= limit or held + num_bytes > limit_bytes:
                raise RequestRefused(
                    f"{whose} contexts may be {limit:,} with {limit_bytes:,} bytes of text; there are "
                    f"{len(contexts):,} with {held:,}: DELETE some, or give them a ttl_s",
                    409,
                    code="too_many_contexts",
                )

    def num_bytes(self, context_id: str) -> int:
        """Of one context's content, as JSON."""
        return self._num_bytes[context_id]

    def put(self, context: Context) -> None:
        """Keeps it, in place of one with the same id."""
        self._keep(context)
        self._journal.kept(context)

    def remove(self, context_id: str) -> None:
        if self._contexts.pop(context_id, None) is not None:
            del self._num_bytes[context_id]
            self._journal.dropped(context_id)

    def close(self) -> None:
        """What changes from now on is not remembered after the proxy's end."""
        self._journal.close()

    def _keep(self, context: Context) -> None:
        self._contexts[context.id] = context
        self._num_bytes[context.id] = context.content.num_bytes

    def _sweep(self) -> None:
        for context in [context for context in self._contexts.values() if self._is_over(context)]:
            self.remove(context.id)

    def _is_over(self, context: Context) -> bool:
        return 0 < context.deadline_s <= self._clock.unix_s()


def new_context_id() -> str:
    """Unguessable, and the name of the label under which the cache keeps its blocks."""
    return "ctx-" + secrets.token_hex(8)
