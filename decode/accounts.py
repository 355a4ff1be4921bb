"""Where each token of a prompt came from, counted where it happened, and reported once the prompt is complete.

`handed_over` is set from what this instance's worker received and checked; `found_locally` from the engine's own
prefix cache; `computed` from what the engine really scheduled. Nothing is inferred from what was promised.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from core.handoff import Role
from core.report import FromCache, Report
from decode.land import Received

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
    from_cache: list[FromCache] = field(default_factory=list)


class Accounts:
    """The accounts of one decode instance. Its own lock guards each call; what the receiver writes into an
    `Account` by itself is guarded by the receiver's."""

    def __init__(self, instance: str, report: Callable[[Report], None]) -> None:
        self._instance = instance
        self._report = report
        self._all: OrderedDict[str, Account] = OrderedDict()
        self._counted: set[str] = set()
        self._lock = threading.RLock()

    def of(self, request_id: str) -> Account:
        """The account of a ticket; made at first sight."""
        with self._lock:
            account = self._all.get(request_id)
            if account is None:
                account = self._all[request_id] = Account(request_id)
                while len(self._all) > MAX_ACCOUNTS:
                    self._all.popitem(last=False)
            return account

    def found(self, request_id: str, handoff: str, num_prompt: int, found_tokens: int) -> None:
        """The engine admitted a request with `found_tokens` of its own prefix cache and nothing from P.

        Counted once: a request that is preempted is admitted again, and what it then computes counts as computed.
        """
        with self._lock:
            if request_id not in self._counted:
                self._counted.add(request_id)
                account = self.of(handoff)
                account.prompt_tokens += num_prompt
                account.found_locally += found_tokens

    def received(self, received: Received, num_prompt: int, found_tokens: int, handed_over: int) -> None:
        """The worker has counted and compared a hand-off of `handed_over` tokens."""
        with self._lock:
            self._counted.add(received.request_id)
            account = self.of(received.handoff)
            account.outcome = "landed"
            account.prompt_tokens, account.found_locally, account.handed_over = num_prompt, found_tokens, handed_over
            account.num_bytes = received.num_bytes
            account.detail["check_s"] = received.check_s
            account.detail["audited_pairs"] = received.audited
            account.detail["unwritten_pairs"] = received.unwritten

    def loaded(self, request_id: str, handoff: str, parts: list[FromCache], num_prompt: int, found_tokens: int) -> None:
        """The worker has loaded and compared blocks of the KV cache, behind `found_tokens` of the engine's own."""
        with self._lock:
            self.found(request_id, handoff, num_prompt, found_tokens)
            self.of(handoff).from_cache += parts

    def lost(self, request_id: str, handoff: str, why: str) -> None:
        """Blocks from outside are not what they should be: the engine admits the request anew, and that counts."""
        with self._lock:
            account = self.of(handoff)
            account.outcome, account.why = "fell_back", why
            if request_id in self._counted:  # its hand-off was received, and is of no use without the rest
                self._counted.discard(request_id)
                account.prompt_tokens = account.handed_over = account.found_locally = account.num_bytes = 0

    def forget(self, request_id: str) -> None:
        """The engine is done with a request; the account of its ticket stays."""
        with self._lock:
            self._counted.discard(request_id)

    def publish(self, request_id: str) -> None:
        """Reports the account as it stands; a later report replaces it."""
        with self._lock:
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
                    from_cache=list(account.from_cache),
                )
            )
