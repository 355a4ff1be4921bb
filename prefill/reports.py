"""What a prefill instance tells the proxy of the hand-offs it sent, or did not send."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core.handoff import Role
from core.report import Report
from transport.handoff import Event

if TYPE_CHECKING:
    from prefill.outgoing import Outgoing

_OUTCOMES = {Event.DECLINE: "declined", Event.REFUSE: "refused", Event.CANCEL: "cancelled"}


class SendReports:
    """The reports of one instance."""

    def __init__(self, instance: str, report: Callable[[Report], None]) -> None:
        self._instance = instance
        self._report = report

    def sent(self, out: Outgoing) -> None:
        """Everything has left, and Landed was sent."""
        if out.pushed is None:
            return
        detail = {
            "bytes_before_last_layer": float(out.pushed.bytes_before_last_layer),
            "write_s": out.pushed.write_s,
            "copy_s": out.pushed.copy_s,
            "digest_s": out.pushed.digest_s,
            "chunks": float(out.num_chunks),
            "rerouted": float(bool(out.pushed.why_rerouted)),
        }
        self._report(
            Report(
                request_id=out.id,
                instance=self._instance,
                role=Role.PREFILL,
                outcome="sent",
                why=out.pushed.why_rerouted,
                transport=out.pushed.scheme,
                prompt_tokens=out.prompt.num_tokens if out.prompt else 0,
                num_bytes=out.pushed.num_bytes,
                moments=out.moments,
                detail=detail,
                from_cache=list(out.from_cache),
            )
        )

    def ended(self, out: Outgoing, event: Event) -> None:
        """It was released by this event; one that was sent is reported already."""
        if event is Event.FINISH or out.prompt is None:
            return
        self._report(
            Report(
                request_id=out.id,
                instance=self._instance,
                role=Role.PREFILL,
                outcome=_OUTCOMES.get(event, "failed"),
                why=out.why,
                prompt_tokens=out.prompt.num_tokens,
                moments=dict(out.moments),
            )
        )
