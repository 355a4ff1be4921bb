"""A client for Python: contexts computed ahead, generation that begins with them, templates, batches, conversations.

    BatonClient, AsyncBatonClient ─▶ operations (bodies, parsing; shared) ─▶ httpx ─▶ the proxy

`from client import BatonClient` or `from baton import BatonClient`. Imports nothing of Baton's but `core.errors`.
"""

from client.answers import Context, ContextReuse, Generation, Record, Tokens
from client.async_client import AsyncBatonClient
from client.errors import BatonClientError, Busy, ContextNotFound, NotReached, Refused, TimedOut
from client.sync_client import BatonClient
from client.templates import Filled, Template

__all__ = [
    "AsyncBatonClient",
    "BatonClient",
    "BatonClientError",
    "Busy",
    "Context",
    "ContextNotFound",
    "ContextReuse",
    "Filled",
    "Generation",
    "NotReached",
    "Record",
    "Refused",
    "Template",
    "TimedOut",
    "Tokens",
]
