"""An engine that stores two blocks, reserves two more, pins one, says ready, and waits to be killed."""

from __future__ import annotations

import sys
import time

from kvcache import wire
from kvcache.client import CacheClient
from kvcache.keys import join_keys
from tests.kvcache.places import BLOCK_BYTES, key
from tests.poll import until


def main(path: str) -> None:
    client = CacheClient(path, wire.Hello("doomed", "boot", BLOCK_BYTES))
    until(lambda: client.is_connected)
    first = client.reserve(join_keys(map(key, (1, 2, 3, 4))))
    granted = until(lambda: client.take(first))
    assert isinstance(granted, wire.Granted)
    client.send(wire.Commit([wire.Written(key(g.index + 1), g.offset, 7) for g in granted.grants[:2]]))
    second = client.search(join_keys([key(1)]), reserve=False)
    until(lambda: client.take(second))
    print("ready", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
