"""BatonClient: every call waits for its answer. May be used by several threads at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Unpack

import httpx

from client.answers import Context, Generation, Record
from client.connection import DEFAULT_URL, Connection, Options, StreamedAnswer, answer_of, request_of, translated
from client.conversation import Conversation
from client.errors import BatonClientError
from client.operations import A, ContextFields, Messages, Operation, Prompt, T, TemplateFields
from client.templates import Template


class TextStream(StreamedAnswer):
    """The texts of one answer as they come. `generation` is there when they have been read to the end.

    Use it in a `with`: leaving it early ends the request.
    """

    def __iter__(self) -> Iterator[str]:
        try:
            for chunk in self._response.iter_bytes():
                yield from self._reader.feed(chunk)
            self._generation = self._reader.end()
        except httpx.HTTPError as error:
            raise translated(error, self._url) from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends the request if it runs still."""
        self._response.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class BatonClient:
    """A client of the proxy at `url`. options: see `client.connection.Options`.

    Every method raises BatonClientError (`client.errors`). Close it, or use it in a `with`.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, sleep: Callable[[float], None] = time.sleep, **options: Unpack[Options]
    ) -> None:
        self._connection = Connection.of(url, options)
        self._ask = self._connection.defaults
        self._sleep = sleep
        self._dice = random.Random()
        connection = self._connection
        self._http = httpx.Client(
            base_url=connection.url,
            headers=connection.headers,
            timeout=connection.timeout,
            limits=connection.limits,
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> BatonClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def cache_context(self, **fields: Unpack[ContextFields]) -> Context:
        """Computes a text, messages or the constant part of a template, and keeps its KV; see docs/contexts.md.

        A name that is there with the same content gives the same context, its time begun anew.
        """
        return self._run(self._ask.cache_context(**fields))

    def contexts(self) -> list[Context]:
        """This tenant's, the oldest first."""
        return self._run(self._ask.contexts())

    def context(self, context_id: str) -> Context:
        return self._run(self._ask.context(context_id))

    def drop_context(self, context: Context | str) -> None:
        """Forgets it and its blocks."""
        self._run(self._ask.drop_context(context))

    def record(self, request_id: str) -> Record:
        """What became of a request: where its tokens came from."""
        return self._run(self._ask.record(request_id))

    def generate(self, prompt: Prompt, *, contexts: Sequence[Context | str] = (), **sampling: Any) -> Generation:
        """The answer to a text, messages or a filled template. sampling: further fields of the body."""
        return self._run(self._ask.generate(prompt, contexts, sampling))

    def generate_with_context(self, context: Context | str, prompt: Prompt = "", **sampling: Any) -> Generation:
        """The answer to what stands behind one context."""
        return self.generate(prompt, contexts=[context], **sampling)

    def generate_with_contexts(
        self, contexts: Sequence[Context | str], prompt: Prompt = "", **sampling: Any
    ) -> Generation:
        """The answer to what stands behind several contexts, in this order; `contexts` of it says what was reused."""
        return self.generate(prompt, contexts=contexts, **sampling)

    def stream(self, prompt: Prompt, *, contexts: Sequence[Context | str] = (), **sampling: Any) -> TextStream:
        """As `generate`, the texts as they come."""
        operation = self._ask.generate(prompt, contexts, sampling | {"stream": True})
        return self._again(lambda: self._open(operation))

    def template(self, template: str | Messages, **fields: Unpack[TemplateFields]) -> Template:
        """Keeps a template; `generate(template.fill(name=value))` uses it."""
        return Template(self.cache_context(template=template, **fields))

    def batch(
        self, template: Template, variables: Sequence[Mapping[str, str]], concurrency: int = 8, **sampling: Any
    ) -> list[Generation | BatonClientError]:
        """One answer, or the error in its place, for each set of variables, in their order."""

        def one(values: Mapping[str, str]) -> Generation | BatonClientError:
            try:
                return self.generate(template.fill(**values), **sampling)
            except BatonClientError as error:
                return error

        with ThreadPoolExecutor(max(1, concurrency), thread_name_prefix="baton-batch") as pool:
            return list(pool.map(one, variables))

    def conversation(self, context: Context | str | Sequence[Context | str] = (), **sampling: Any) -> Conversation:
        """A chat that begins with these contexts."""
        contexts = [context] if isinstance(context, Context | str) else list(context)
        return Conversation(self, contexts, sampling)

    def _run(self, operation: Operation[T]) -> T:
        method, path, headers, body = request_of(operation)

        def once() -> T:
            try:
                response = self._http.request(method, path, content=body, headers=headers)
            except httpx.HTTPError as error:
                raise translated(error, self._connection.url) from error
            return operation.read(answer_of(response))

        return self._again(once)

    def _open(self, operation: Operation[Generation]) -> TextStream:
        method, path, headers, body = request_of(operation)
        request = self._http.build_request(method, path, content=body, headers=headers)
        try:
            response = self._http.send(request, stream=True)
            if response.status_code >= 400:
                response.read()
                operation.read(answer_of(response))
        except httpx.HTTPError as error:
            raise translated(error, self._connection.url) from error
        return TextStream(response, self._connection.url)

    def _again(self, once: Callable[[], A]) -> A:
        """Asks until there is an answer, or an error that another try would not change."""
        attempt = 0
        while True:
            try:
                return once()
            except BatonClientError as error:
                wait_s = self._connection.wait_s(attempt, error, self._dice)
                if wait_s is None:
                    raise
            self._sleep(wait_s)
            attempt += 1
