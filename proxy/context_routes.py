"""`/v1/contexts`: make, list, look at and drop contexts.

    POST /v1/contexts          computes and keeps; 201 when its blocks can be found, 200 if it was there by that name
    GET /v1/contexts[/ID]      what is kept, with the blocks that the cache has of it now
    DELETE /v1/contexts/ID     forgets it, and its blocks in every tier

Whoever asks sees their tenant's contexts alone: the tenant of an API key, or of the body's `cache_salt`; where there is
no body the header `x-cache-salt` says it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from core.clock import Clock
from kvcache.partial import MIN_TOKENS
from kvcache.wire import LabelFigures
from proxy.ahead import Ahead, Computed
from proxy.arrival import forwarded, read
from proxy.body import ClientBody, read_body
from proxy.context_store import ContextStore, Tenant, new_context_id
from proxy.context_use import ContextUse
from proxy.contexts import Context, Wish, parse_wish
from proxy.errors import CacheUnreachable, RequestRefused
from proxy.labels import Labels

SALT_HEADER = "x-cache-salt"
COMPLETE_WAIT_S = 3.0
"""How long a new context waits for its last block to be found; what is missing then is said in its note."""

OfTenant = Callable[[ClientBody, dict[str, str]], ClientBody]


class ContextRoutes:
    """The endpoints. All on the event loop's thread."""

    def __init__(self, store: ContextStore, use: ContextUse, ahead: Ahead, labels: Labels, clock: Clock) -> None:
        self._store = store
        self._use = use
        self._ahead = ahead
        self._labels = labels
        self._clock = clock

    def routes(self, of_tenant: OfTenant) -> APIRouter:
        """of_tenant: puts the salt of the request's tenant into a body."""

        async def create(request: Request) -> Response:
            headers = forwarded(request)
            body = of_tenant(read_body(await read(request)), headers)
            wish = parse_wish(body.fields)
            return await self._create(wish, body.fields.get("cache_salt"), headers)

        def tenant_of(request: Request) -> Tenant:
            salt = request.headers.get(SALT_HEADER)
            fields = {} if salt is None else {"cache_salt": salt}
            return of_tenant(ClientBody(fields, b"{}"), forwarded(request)).fields.get("cache_salt")

        async def every(request: Request) -> Response:
            figures = await self._figures()
            shown = [show(context, figures) for context in self._store.of(tenant_of(request))]
            return _json({"object": "list", "data": shown})

        async def one(request: Request, context_id: str) -> Response:
            context = self._store.get(context_id, tenant_of(request))
            return _json(show(context, await self._figures()))

        async def drop(request: Request, context_id: str) -> Response:
            await self._drop(context_id, tenant_of(request))
            return _json({"id": context_id, "object": "context", "deleted": True})

        router = APIRouter()
        router.add_api_route("/v1/contexts", create, methods=["POST"], response_model=None)
        router.add_api_route("/v1/contexts", every, methods=["GET"], response_model=None)
        router.add_api_route("/v1/contexts/{context_id}", one, methods=["GET"], response_model=None)
        router.add_api_route("/v1/contexts/{context_id}", drop, methods=["DELETE"], response_model=None)
        return router

    async def _create(self, wish: Wish, tenant: Tenant, headers: dict[str, str]) -> Response:
        self._labels.check_cache()
        _check_salt(tenant)
        async with self._store.alone(tenant, wish.name):
            known = self._store.named(wish.name, tenant)
            if known is None:
                self._store.check_room(tenant, wish.content.num_bytes)
            elif known.content != wish.content:
                raise RequestRefused(
                    f"{known.id} has the name {wish.name!r} and another content; DELETE it or choose another name",
                    409,
                    param="name",
                    code="context_name_taken",
                )
            return await self._compute(wish, tenant, headers, known)

    async def _compute(self, wish: Wish, tenant: Tenant, headers: dict[str, str], known: Context | None) -> Response:
        """Also of one that is there: what has gone from the cache is computed again, and its time begins anew."""
        context_id = known.id if known else new_context_id()
        computed = Computed("")
        fields = wish.content.body(tenant)
        if fields is not None:
            answer = await self._ahead.compute(wish.content.endpoint, fields, wish.label(context_id), headers)
            if isinstance(answer, Response):
                return answer
            computed = answer
        found = await self._kept(context_id, wish, computed.num_blocks)
        now_s = self._clock.unix_s()
        context = Context(
            id=context_id,
            wish=wish,
            tenant=tenant,
            created_s=known.created_s if known else now_s,
            deadline_s=now_s + wish.ttl_s if wish.ttl_s else 0.0,
            tokens=computed.tokens,
            num_blocks=computed.num_blocks,
            model=computed.model,
        )
        self._store.put(context)
        if fields is not None:
            self._use.computed_ahead(context_id, wish.content.endpoint, fields, computed.model)
        shown = show(context, {context_id: found} if found else {}) | {"request_id": computed.request_id or None}
        note = _note(context, found, computed.block_size)
        return _json(shown | ({"note": note} if note else {}), 200 if known else 201)

    async def _kept(self, name: str, wish: Wish, num_blocks: int) -> LabelFigures | None:
        """What the cache has of it, once it has everything. Raises CacheUnreachable."""
        if not num_blocks:
            return None
        found = await self._labels.complete(name, num_blocks, COMPLETE_WAIT_S)
        if found is not None and found.pinned and not wish.pin:
            await self._labels.pin(name, False)
            found = msgspec.structs.replace(found, pinned=False)
        return found

    async def _drop(self, context_id: str, tenant: Tenant) -> None:
        name = self._store.get(context_id, tenant).wish.name
        async with self._store.alone(tenant, name):
            context = self._store.get(context_id, tenant)
            await self._labels.drop(context.id)
            self._store.remove(context.id)
            self._use.forget(context.id)

    async def _figures(self) -> dict[str, LabelFigures] | None:
        """None where the cache cannot be asked now: a list of contexts is worth having all the same."""
        try:
            return await self._labels.figures()
        except CacheUnreachable:
            return None


def show(context: Context, figures: dict[str, LabelFigures] | None) -> dict[str, Any]:
    """A context as JSON. blocks, bytes: that the cache has now; null if it cannot be asked."""
    found = figures.get(context.id) if figures is not None else None
    unknown = 0 if figures is not None else None
    wish, content = context.wish, context.content
    return {
        "id": context.id,
        "object": "context",
        "name": wish.name,
        "kind": content.kind.value,
        "endpoint": content.endpoint.name.lower(),
        "model": context.model or content.model,
        "variables": content.variables,
        "tokens": context.tokens,
        "blocks": found.blocks if found else unknown,
        "total_blocks": context.num_blocks,
        "bytes": found.num_bytes if found else unknown,
        "pinned": found.pinned if found else wish.pin and figures is None,
        "created_at": int(context.created_s),
        "expires_at": int(context.deadline_s) or None,
    }


def _note(context: Context, found: LabelFigures | None, block_size: int) -> str:
    """Why less is kept than was asked for; empty if all is well."""
    if not context.tokens:
        return "the template begins with a variable: nothing is the same in every request, nothing is kept"
    if not context.num_blocks:
        if not block_size:
            return "the instance that computed it has no cache: nothing is kept"
        least = min(block_size, MIN_TOKENS)
        return f"shorter than {least} tokens: nothing is kept, each request computes it"
    if found is None:
        return "the cache server knows no block of it: do the instances share its cache (--cache unix:PATH)?"
    if found.blocks < context.num_blocks:
        return f"{found.blocks} of {context.num_blocks} blocks are kept: the cache is full or busy"
    if context.wish.pin and not found.pinned:
        return "not pinned: the cache server pins no more; unpin or DELETE other contexts"
    return ""


def _check_salt(tenant: object) -> None:
    if tenant is not None and (not isinstance(tenant, str) or not tenant):
        raise RequestRefused("cache_salt must be a text and not empty", param="cache_salt", code="invalid_context")


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
