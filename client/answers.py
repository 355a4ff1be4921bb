"""What the server answers, as frozen records."""

from __future__ import annotations

from typing import Any

import msgspec


class Context(msgspec.Struct, frozen=True):
    """A context as the server shows it.

    endpoint: `chat` or `completion`, for which its KV was computed. tokens: of its prompt. blocks, bytes: that the
    cache has of it now, of total_blocks; None where the cache cannot be asked. expires_at: unix seconds. note: why less
    is kept than was asked for.
    """

    id: str
    kind: str = "text"
    endpoint: str = "completion"
    name: str | None = None
    model: str | None = None
    variables: list[str] = []
    tokens: int = 0
    blocks: int | None = None
    total_blocks: int = 0
    bytes: int | None = None
    pinned: bool = False
    created_at: int = 0
    expires_at: int | None = None
    request_id: str | None = None
    note: str | None = None


class ContextReuse(msgspec.Struct, frozen=True):
    """One context of a request. reuse: `prefix` (computed before, in this order) or `recomputed`."""

    id: str
    reuse: str


class Usage(msgspec.Struct, frozen=True):
    """Tokens as OpenAI counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Generation(msgspec.Struct, frozen=True):
    """One answer. token_ids: if `return_token_ids` was asked for. body: the server's JSON; of a stream its last."""

    text: str
    request_id: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    contexts: tuple[ContextReuse, ...] = ()
    token_ids: tuple[int, ...] = ()
    body: dict[str, Any] = {}


class Tokens(msgspec.Struct, frozen=True):
    """Where a prompt's tokens came from; None until the instance has said it. The last four add up to `prompt`."""

    prompt: int | None = None
    handed_over: int | None = None
    found_locally: int | None = None
    from_cache: int | None = None
    computed: int | None = None

    def __str__(self) -> str:
        if self.prompt is None:
            return "not reported"
        return (
            f"{self.prompt} prompt tokens: {self.from_cache} from the cache, {self.found_locally} found locally, "
            f"{self.handed_over} handed over, {self.computed} computed"
        )


class Record(msgspec.Struct, frozen=True):
    """What became of a request: `GET /requests/{id}`, of which these are the parts most asked for. path: `prefill`,
    `decode`, `transport`, `why`."""

    id: str
    status: str
    tokens: Tokens = Tokens()
    outcome: str | None = None
    path: dict[str, str | None] = {}
    contexts: list[ContextReuse] = []
    moments_ms: dict[str, float] = {}
