"""What the scheduler's side knows of each of vLLM's requests, from its first hook to its last.

Threads: the engine's thread alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from core.errors import ProtocolError
from core.handoff import Handoff, handoff_from_params
from core.prompt import Prompt
from engine.internals import prompt_of

_log = init_logger("vllm.baton")


@dataclass
class EngineRequest:
    """One request. ticket: None if it carries none, or none that parses. sends, receives: this instance's part in it.
    found, cached: tokens of the plan, in the engine's own cache and behind them in the host's. in_step: those of the
    host's are loaded in the step that computes with them. is_allocated: it has blocks."""

    request: Any
    ticket: Handoff | None
    sends: bool
    receives: bool
    found: int = 0
    cached: int = 0
    in_step: bool = False
    is_allocated: bool = False
    _prompt: Prompt | None = None

    @property
    def awaits_peer(self) -> bool:
        """Whether another instance computes its prompt for this one."""
        return self.receives and self.ticket is not None and self.ticket.prefill is not None

    @property
    def is_seeded(self) -> bool:
        """Whether its samples depend on how often was drawn before, also in vain."""
        params = self.request.sampling_params
        return params is not None and params.seed is not None

    def prompt(self) -> Prompt:
        """As the hand-off logic sees it; only for one with a ticket."""
        if self._prompt is None:
            assert self.ticket is not None, "a prompt belongs to a ticket"
            self._prompt = prompt_of(self.request, self.ticket)
        return self._prompt


class EngineRequests:
    """All requests of one engine; `boot_id` is this instance's."""

    def __init__(self, boot_id: str) -> None:
        self._boot_id = boot_id
        self._all: dict[str, EngineRequest] = {}

    def of(self, request: Any) -> EngineRequest:
        """A `vllm.v1.request.Request`, known from its first sight on."""
        known = self._all.get(request.request_id)
        if known is None:
            known = self._all[request.request_id] = self._read(request)
        return known

    def get(self, request_id: str) -> EngineRequest | None:
        """By the engine's id; None before its first hook and after its last."""
        return self._all.get(request_id)

    def allocated(self) -> Iterator[EngineRequest]:
        """Those that have blocks."""
        return (known for known in self._all.values() if known.is_allocated)

    def forget(self, request_id: str) -> None:
        """The engine is done with it."""
        self._all.pop(request_id, None)

    def _read(self, request: Any) -> EngineRequest:
        try:
            ticket = handoff_from_params(request.kv_transfer_params)
        except ProtocolError as error:
            _log.warning("request %s: %s; computed locally", request.request_id, error)
            ticket = None
        sends = ticket is not None and ticket.prefill is not None and ticket.prefill.boot_id == self._boot_id
        receives = ticket is not None and not sends and ticket.decode.boot_id == self._boot_id
        return EngineRequest(request, ticket, sends, receives)
