"""The proxy's listing of instances, as the launcher reads it: who can be used, and who is waited for in vain."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from cluster.members import InstanceMember, get


class Listing:
    """Of the proxy at `url`; asked anew each time."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/instances"

    def not_ready(self, members: Sequence[InstanceMember]) -> str:
        """The names of those that the proxy cannot use yet, in their newest start."""
        status, body = get(self._url)
        ready = _ready_groups(body) if status == 200 else {}
        return ", ".join(member.name for member in members if ready.get(member.name) != member.pid)

    def silent(self) -> set[str]:
        """Names of instances that another one waits for in vain."""
        status, body = get(self._url)
        return silent_names(body) if status == 200 else set()


def silent_names(body: bytes) -> set[str]:
    """From the proxy's listing: who is named, by its boot id, in another's `silent_peers`."""
    entries = msgspec.json.decode(body)["instances"]
    silent = {boot_id for entry in entries for boot_id in entry["silent_peers"]}
    return {entry["name"] for entry in entries if entry["boot_id"] in silent}


def _ready_groups(body: bytes) -> dict[str, int]:
    """The process group of every instance that the proxy calls ready, by name."""
    ready = {}
    for entry in msgspec.json.decode(body)["instances"]:
        if entry["state"] == "ready":
            with suppress(ProcessLookupError):
                ready[entry["name"]] = os.getpgid(entry["pid"])
    return ready
