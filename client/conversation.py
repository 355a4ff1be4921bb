"""A conversation: the messages so far, so that each turn finds the turns before it in the cache.

contexts │ user ─ assistant │ user ─ assistant │ user ──▶ say          a turn that fails leaves no trace
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from client.answers import Context, Generation
from client.operations import Messages

if TYPE_CHECKING:
    from client.async_client import AsyncBatonClient
    from client.sync_client import BatonClient


class _Turns:
    """What both kinds of conversation share."""

    def __init__(self, contexts: Sequence[Context | str], sampling: Mapping[str, Any]) -> None:
        self._contexts = list(contexts)
        self._sampling = dict(sampling)
        self.messages: Messages = []
        self.last: Generation | None = None

    def _asked(self, text: str) -> Messages:
        return [*self.messages, {"role": "user", "content": text}]

    def _answered(self, asked: Messages, answer: Generation) -> str:
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        self.last = answer
        return answer.text


class Conversation(_Turns):
    """`messages`: what was said so far, the contexts left out. `last`: the last answer with all that belongs to it."""

    def __init__(self, client: BatonClient, contexts: Sequence[Context | str], sampling: Mapping[str, Any]) -> None:
        super().__init__(contexts, sampling)
        self._client = client

    def say(self, text: str) -> str:
        """The answer. Raises BatonClientError; the conversation is then as it was before."""
        asked = self._asked(text)
        return self._answered(asked, self._client.generate(asked, contexts=self._contexts, **self._sampling))

    def stream(self, text: str) -> Iterator[str]:
        """The answer as it comes; it belongs to the conversation once it has been read to its end."""
        asked = self._asked(text)
        with self._client.stream(asked, contexts=self._contexts, **self._sampling) as pieces:
            yield from pieces
        self._answered(asked, pieces.generation)


class AsyncConversation(_Turns):
    """As Conversation; one turn at a time."""

    def __init__(
        self, client: AsyncBatonClient, contexts: Sequence[Context | str], sampling: Mapping[str, Any]
    ) -> None:
        super().__init__(contexts, sampling)
        self._client = client

    async def say(self, text: str) -> str:
        """The answer. Raises BatonClientError; the conversation is then as it was before."""
        asked = self._asked(text)
        return self._answered(asked, await self._client.generate(asked, contexts=self._contexts, **self._sampling))

    async def stream(self, text: str) -> AsyncIterator[str]:
        """The answer as it comes; it belongs to the conversation once it has been read to its end."""
        asked = self._asked(text)
        async with await self._client.stream(asked, contexts=self._contexts, **self._sampling) as pieces:
            async for piece in pieces:
                yield piece
        self._answered(asked, pieces.generation)
