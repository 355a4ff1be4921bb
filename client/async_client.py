"""AsyncBatonClient: as BatonClient, every call awaited. One event loop's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Unpack

import httpx

from client.answers import Context, Generation, Record
from client.connection import DEFAULT_URL, Connection, Options, StreamedAnswer, answer_of, request_of, translated
from client.conversation import AsyncConversation
from client.errors import BatonClientError
from client.operations import A, ContextFields, Messages, Operation, Prompt, T, TemplateFields
from client.templates import Template


class AsyncTextStream(StreamedAnswer):
    """As TextStream: the texts of one answer as they come, in an `async with`."""

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._response.aiter_bytes():
                for text in self._reader.feed(chunk):
                    yield text
            self._generation = self._reader.end()
        except httpx.HTTPError as error:
            raise translated(error, self._url) from error
        finally:
            await self.close()

    async def close(self) -> None:
        """Ends the request if it runs still."""
        await self._response.aclose()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


class AsyncBatonClient:
    """A client of the proxy at `url`; see BatonClient for what each method does and raises."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        **options: Unpack[Options],
    ) -> None:
        self._connection = Connection.of(url, options)
        self._ask = self._connection.defaults
        self._sleep = sleep
        self._dice = random.Random()
        connection = self._connection
        self._http = httpx.AsyncClient(
            base_url=connection.url,
            headers=connection.headers,
            timeout=connection.timeout,
            limits=connection.limits,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncBatonClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def cache_context(self, **fields: Unpack[ContextFields]) -> Context:
        """Computes a text, messages or the constant part of a template, and keeps its KV."""
        return await self._run(self._ask.cache_context(**fields))

    async def contexts(self) -> list[Context]:
        """This tenant's, the oldest first."""
        return await self._run(self._ask.contexts())

    async def context(self, context_id: str) -> Context:
        return await self._run(self._ask.context(context_id))

    async def drop_context(self, context: Context | str) -> None:
        """Forgets it and its blocks."""
        await self._run(self._ask.drop_context(context))

    async def record(self, request_id: str) -> Record:
        """What became of a request: where its tokens came from."""
        return await self._run(self._ask.record(request_id))

    async def generate(self, prompt: Prompt, *, contexts: Sequence[Context | str] = (), **sampling: Any) -> Generation:
        """The answer to a text, messages or a filled template. sampling: further fields of the body."""
        return await self._run(self._ask.generate(prompt, contexts, sampling))

    async def generate_with_context(self, context: Context | str, prompt: Prompt = "", **sampling: Any) -> Generation:
        """The answer to what stands behind one context."""
        return await self.generate(prompt, contexts=[context], **sampling)

    async def generate_with_contexts(
        self, contexts: Sequence[Context | str], prompt: Prompt = "", **sampling: Any
    ) -> Generation:
        """The answer to what stands behind several contexts, in this order."""
        return await self.generate(prompt, contexts=contexts, **sampling)

    async def stream(
        self, prompt: Prompt, *, contexts: Sequence[Context | str] = (), **sampling: Any
    ) -> AsyncTextStream:
        """As `generate`, the texts as they come."""
        operation = self._ask.generate(prompt, contexts, sampling | {"stream": True})
        return await self._again(lambda: self._open(operation))

    async def template(self, template: str | Messages, **fields: Unpack[TemplateFields]) -> Template:
        """Keeps a template; `generate(template.fill(name=value))` uses it."""
        return Template(await self.cache_context(template=template, **fields))

    async def batch(
        self, template: Template, variables: Sequence[Mapping[str, str]], concurrency: int = 8, **sampling: Any
    ) -> list[Generation | BatonClientError]:
        """One answer, or the error in its place, for each set of variables, in their order."""
        places = asyncio.Semaphore(max(1, concurrency))

        async def one(values: Mapping[str, str]) -> Generation | BatonClientError:
            async with places:
                try:
                    return await self.generate(template.fill(**values), **sampling)
                except BatonClientError as error:
                    return error

        return list(await asyncio.gather(*(one(values) for values in variables)))

    def conversation(self, context: Context | str | Sequence[Context | str] = (), **sampling: Any) -> AsyncConversation:
        """A chat that begins with these contexts."""
        contexts = [context] if isinstance(context, Context | str) else list(context)
        return AsyncConversation(self, contexts, sampling)

    async def _run(self, operation: Operation[T]) -> T:
        method, path, headers, body = request_of(operation)

        async def once() -> T:
            try:
                response = await self._http.request(method, path, content=body, headers=headers)
            except httpx.HTTPError as error:
                raise translated(error, self._connection.url) from error
            return operation.read(answer_of(response))

        return await self._again(once)

    async def _open(self, operation: Operation[Generation]) -> AsyncTextStream:
        method, path, headers, body = request_of(operation)
        request = self._http.build_request(method, path, content=body, headers=headers)
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code >= 400:
                await response.aread()
                operation.read(answer_of(response))
        except httpx.HTTPError as error:
            raise translated(error, self._connection.url) from error
        return AsyncTextStream(response, self._connection.url)

    async def _again(self, once: Callable[[], Awaitable[A]]) -> A:
        """Asks until there is an answer, or an error that another try would not change."""
        attempt = 0
        while True:
            try:
                return await once()
            except BatonClientError as error:
                wait_s = self._connection.wait_s(attempt, error, self._dice)
                if wait_s is None:
                    raise
            await self._sleep(wait_s)
            attempt += 1
