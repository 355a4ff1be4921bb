"""Where each token of a prompt came from, counted where it happened, and reported once the prompt is complete.

`handed_over` is set from what this instance's worker received and checked; `found_locally` from the engine's own
prefix cache; `computed` from what the engine really scheduled. Nothing is inferred from what was promised.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from core.handoff import Role
from core.report import Report

MAX_ACCOUNTS = 20_000


@dataclass
class Account:
    """One request's tokens. A ticket shared by several engine requests (n > 1, several prompts) is one account."""

    request_id: str
    outcome: str = "local"
    why: str = ""
    transport: str = ""
    prompt_tokens: int = 0
    handed_over: int = 0
    found_locally: int = 0
    computed: int = 0
    num_bytes: int = 0
    moments: dict[str, float] = field(default_factory=dict)
    detail: dict[str, float] = field(default_factory=dict)


class Accounts:
    """The accounts of one decode instance."""

    def __init__(self, instance: str, report: Callable[[Report], None]) -> None:
        self._instance = instance
        self._report = report
        self._all: OrderedDict[str, Account] = OrderedDict()

    def of(self, request_id: str) -> Account:
        """The account of a ticket; made at first sight."""
        account = self._all.get(request_id)
        if account is None:
            account = self._all[request_id] = Account(request_id)
            while len(self._all) > MAX_ACCOUNTS:
                self._all.popitem(last=False)
        return account

    def publish(self, request_id: str) -> None:
        """Reports the account as it stands; a later report replaces it."""
        account = self.of(request_id)
        self._report(
            Report(
                request_id=request_id,
                instance=self._instance,
                role=Role.DECODE,
                outcome=account.outcome,
                why=account.why,
                transport=account.transport,
                prompt_tokens=account.prompt_tokens,
                handed_over=account.handed_over,
                found_locally=account.found_locally,
                computed=account.computed,
                num_bytes=account.num_bytes,
                moments=dict(account.moments),
                detail=dict(account.detail),
            )
        )
