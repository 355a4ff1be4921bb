"""Requests that name contexts: composed before they are served, and remembered as an order when they are done."""

from __future__ import annotations

import msgspec

from proxy.body import MAX_BODY_BYTES, ClientBody
from proxy.compose import composed, names_contexts, parts_of
from proxy.context_orders import Orders, rendering_of
from proxy.context_store import ContextStore, Tenant
from proxy.errors import RequestRefused
from proxy.split import Endpoint


class Composition(msgspec.Struct, frozen=True):
    """An ordinary body, and which contexts it begins with.

    reuse: by id, `prefix` where the blocks were computed before in this order, else `recomputed`.
    """

    body: ClientBody
    ids: tuple[str, ...] = ()
    reuse: tuple[tuple[str, str], ...] = ()
    rendering: str = ""


class ContextUse:
    """Composes. All on the event loop's thread."""

    def __init__(self, store: ContextStore, orders: Orders) -> None:
        self._store = store
        self._orders = orders
        self._default_model = ""

    def compose(self, endpoint: Endpoint, body: ClientBody, tenant: Tenant) -> Composition:
        """Raises RequestRefused: 404 for a context that is not this tenant's, 400 for what does not fit."""
        if not names_contexts(body.fields):
            return Composition(body)
        parts = parts_of(body.fields, lambda context_id: self._store.get(context_id, tenant))
        ids = tuple(part.context.id for part in parts)
        if sum(map(self._store.num_bytes, ids)) > MAX_BODY_BYTES:
            raise RequestRefused(
                f"the contexts are larger than {MAX_BODY_BYTES} bytes together", 413, code="body_too_large"
            )
        ordinary = composed(endpoint, body, parts)
        rendering = rendering_of(endpoint, ordinary.fields, self.model_of(ordinary.fields.get("model")))
        count = self._orders.num_computed(rendering, ids)
        reuse = tuple((id_, "prefix" if index < count else "recomputed") for index, id_ in enumerate(ids))
        return Composition(ordinary, ids, reuse, rendering)

    def done(self, composition: Composition) -> None:
        """It was served: from now on this order has been computed."""
        if composition.ids:
            self._orders.add(composition.rendering, composition.ids)

    def computed_ahead(self, context_id: str, endpoint: Endpoint, fields: dict[str, object], model: str) -> None:
        """A context alone was computed, by a request with these fields; model: as the instance calls it."""
        if fields.get("model") is None:
            self._default_model = model
        self._orders.add(rendering_of(endpoint, fields, self.model_of(fields.get("model"))), (context_id,))

    def forget(self, context_id: str) -> None:
        self._orders.forget(context_id)

    def model_of(self, named: object) -> str:
        """The model that a body asks for; without a name it is the one that answered such a request before."""
        return str(named) if named else self._default_model
