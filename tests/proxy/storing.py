"""A fake engine that keeps its prompts' blocks at a real cache server, and names them as its tickets say."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from core.handoff import handoff_from_params
from core.topology import InstanceInfo
from kvcache import wire
from kvcache.client import CacheClient
from kvcache.keys import BlockKey, block_key, join_keys, tenant_of
from tests.fakes.engine import FakeEngine, Received
from tests.kvcache.places import BLOCK_BYTES, SPACE

BLOCK = 16
"""Characters of a prompt in a block; a character is a token."""


def prompt_of(body: dict[str, Any]) -> str:
    """What the engine computes, as text."""
    if "messages" in body:
        return "".join(f"<{message['role']}>{message['content']}" for message in body["messages"])
    return str(body["prompt"])


def keys_of(body: dict[str, Any]) -> list[BlockKey]:
    """Of the prompt's full blocks; each covers everything before it, and the salt."""
    text = prompt_of(body)
    salted = f"{body.get('cache_salt')}|{text}"
    offset = len(salted) - len(text)
    ends = range(offset + BLOCK, len(salted) + 1, BLOCK)
    return [block_key(SPACE, hashlib.sha256(salted[:end].encode()).digest()) for end in ends]


@dataclass
class StoringEngine(FakeEngine):
    """socket: of the cache server. forgetful: stores nothing. hold_commit: what is written is not complete yet."""

    socket: str = ""
    forgetful: bool = False
    hold_commit: bool = False
    cache: CacheClient = field(init=False)

    def __enter__(self) -> StoringEngine:
        self.cache = CacheClient(self.socket, wire.Hello(self.name or "engine", "boot", BLOCK_BYTES))
        super().__enter__()
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            self.cache.close()
        super().stop()

    def info(self) -> InstanceInfo:
        return msgspec.structs.replace(super().info(), block_size=BLOCK)

    async def _receive(self, request: web.Request) -> Received:
        received = await super()._receive(request)
        if received in self.generations() and not self.forgetful and self.behaviour.status == 200:
            await self._store(received.body)
        return received

    async def _store(self, body: dict[str, Any]) -> None:
        keys, ticket = keys_of(body), handoff_from_params(body.get("kv_transfer_params"))
        if not keys or ticket is None:
            return
        if ticket.label is not None:
            label, tenant = ticket.label, tenant_of(body.get("cache_salt"))
            self.cache.send(
                wire.Name(label.name, join_keys(keys), len(prompt_of(body)), label.ttl_s, label.pin, tenant)
            )
        number = self.cache.reserve(join_keys(keys))
        while (granted := self.cache.take(number)) is None:
            await asyncio.sleep(0.002)
        assert isinstance(granted, wire.Granted)
        self._committing = asyncio.create_task(self._commit(keys, granted))

    async def _commit(self, keys: list[BlockKey], granted: wire.Granted) -> None:
        """Behind the answer's back, as an engine's worker does."""
        await self._while(lambda: self.hold_commit)
        written = [wire.Written(keys[grant.index], grant.offset, 1) for grant in granted.grants]
        self.cache.send(wire.Commit(written))

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        return super()._usage(body) | {"prompt_tokens": len(prompt_of(body))}
