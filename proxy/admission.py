"""How many requests are under way, and the queue of those that wait.

Every fallback lands on a decode instance, and an unbounded fallback would feed itself; so each prefill instance has a
window of outstanding hand-offs, each instance a bound of requests that it answers, and the rest waits here, first come
first served among those that want the same. A request that wants a decode instance alone does not wait behind a
full prefill window.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from core.errors import Overloaded
from proxy.errors import NoInstance
from proxy.registry import Instance
from proxy.router import Route, Router, Want
from proxy.settings import Settings


class Lease:
    """One admitted request's places: as a hand-off on P until P is done with it, and on the instance that answers."""

    def __init__(self, admission: Admission, route: Route) -> None:
        self._admission = admission
        self._prefill = route.prefill
        self._server: Instance | None = route.server
        self.route = route
        route.server.serving += 1
        if route.prefill is not None:
            route.prefill.handoffs += 1

    def release_prefill(self) -> None:
        """P's part has ended. May be called again."""
        if self._prefill is not None:
            self._prefill.handoffs -= 1
            self._prefill = None
            self._admission.pump()

    def move_to(self, server: Instance) -> None:
        """Another instance answers from now on."""
        if self._server is not None:
            self._server.serving -= 1
        self._server = server
        server.serving += 1
        self._admission.pump()

    def release(self) -> None:
        """Everything has ended. May be called again."""
        self.release_prefill()
        if self._server is not None:
            self._server.serving -= 1
            self._server = None
            self._admission.pump()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class _Waiter:
    """One request in the queue."""

    def __init__(self, want: Want, why: str) -> None:
        self.want = want
        self.why = why
        self.lease: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()


class Admission:
    """Hands out leases. All on the event loop's thread."""

    def __init__(self, router: Router, settings: Settings) -> None:
        self._router = router
        self._settings = settings
        self._queue: dict[_Waiter, None] = {}

    @property
    def queue_length(self) -> int:
        return len(self._queue)

    async def admit(self, want: Want, why: str = "") -> Lease:
        """Waits for a place. Raises Overloaded if the queue is full or the wait too long, NoInstance if nobody is left.

        A caller that is cancelled while it waits leaves the queue.
        """
        if not any(waiter.want is want for waiter in self._queue):
            route = self._router.route(want, why)
            if route is not None:
                return Lease(self, route)
        if len(self._queue) >= self._settings.queue_limit:
            raise Overloaded(f"{len(self._queue)} requests are waiting already; try again later")
        waiter = _Waiter(want, why)
        self._queue[waiter] = None
        try:
            async with asyncio.timeout(self._settings.queue_timeout_s):
                return await asyncio.shield(waiter.lease)
        except TimeoutError as error:
            _give_back(waiter)
            raise Overloaded(f"waited {self._settings.queue_timeout_s:g} s for a place; try again later") from error
        except asyncio.CancelledError:
            _give_back(waiter)
            raise
        finally:
            self._queue.pop(waiter, None)
            waiter.lease.cancel()

    def pump(self) -> None:
        """Places have come free, or instances have come or gone: lets in who can be let in, in order."""
        blocked: set[Want] = set()
        for waiter in list(self._queue):
            if waiter.want in blocked:
                continue
            try:
                route = self._router.route(waiter.want, waiter.why)
            except NoInstance as error:
                del self._queue[waiter]
                waiter.lease.set_exception(error)
                continue
            if route is None:
                blocked.add(waiter.want)
                if len(blocked) == len(Want):
                    return
                continue
            del self._queue[waiter]
            waiter.lease.set_result(Lease(self, route))


def _give_back(waiter: _Waiter) -> None:
    """A lease that was granted in the same moment as its request left."""
    if waiter.lease.done() and not waiter.lease.cancelled() and waiter.lease.exception() is None:
        waiter.lease.result().release()
