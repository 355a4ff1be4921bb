"""The processes of a cluster: how each is started, and what can be asked of and done to it."""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from cluster.logs import last_lines
from cluster.processes import Child, group_members, signal_group, start_child, wait_for_end
from core.topology import InstanceInfo
from engine.build import Device
from engine.instance import InstanceSpec
from transport.join import JoinThread
from transport.keys import read_keys

PROBE_TIMEOUT_S = 1.0
END_TIMEOUT_S = 5.0
Starter = Callable[[], Child]


class Member:
    """One process group, started again and again by the same recipe."""

    def __init__(self, name: str, log: Path, starter: Starter) -> None:
        self.name = name
        self.log = log
        self._starter = starter
        self.child: Child | None = None

    @property
    def pid(self) -> int:
        """Of the head of the group: the proxy, or the API server. 0 before the first start."""
        return self.child.pid if self.child else 0

    def start(self) -> None:
        self.child = self._starter()

    def exit_code(self) -> int | None:
        """None while it runs; negative: by that signal."""
        return self.child.poll() if self.child else None

    def pids(self) -> list[int]:
        """Every living process of the group; the first is the head, then engine core and workers."""
        return sorted(group_members(self.pid)) if self.pid else []

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals the head alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_group(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals every process of the group."""
        signal_group(self.pid, number)

    def after_death(self) -> None:
        """Called when the head has ended: takes the rest of the group along.

        Returns when nothing of it lives, or after five seconds: a forked engine core shares the API server's listening
        socket, and with gigabytes to give back it outlives the signal; until then nobody else can listen there.
        """
        if self.pid:
            signal_group(self.pid, signal.SIGKILL)
            wait_for_end({self.pid}, END_TIMEOUT_S)
            self.exit_code()  # and no zombie is left of the head

    def leave(self) -> None:
        """Called before it is stopped on purpose."""

    def last_words(self) -> str:
        """The lines of its log that say why it ended, each with its name in front."""
        return "\n".join(f"{self.name}: {line}" for line in last_lines(self.log))


class InstanceMember(Member):
    """A vLLM server. A plain one has no connector that would join the proxy, so it is joined from here."""

    def __init__(self, spec: InstanceSpec, log: Path, starter: Starter) -> None:
        super().__init__(spec.name, log, starter)
        self.spec = spec
        self._join: JoinThread | None = None

    @property
    def url(self) -> str:
        return self.spec.url

    def start(self) -> None:
        super().start()
        if self.spec.plain:
            spec, pid = self.spec, self.pid
            info = InstanceInfo(spec.name, spec.role, spec.url, boot_id=secrets.token_hex(8), pid=pid)
            self._join = JoinThread(spec.join, lambda: info, read_keys(spec.keys) if spec.keys else None)

    def after_death(self) -> None:
        self.leave()
        super().after_death()

    def leave(self) -> None:
        if self._join is not None:
            self._join.close(leaving=True)
            self._join = None


def plain_starter(spec: InstanceSpec, log: Path, variables: dict[str, str], device: Device) -> Starter:
    """`vllm serve` from scratch: slow, and what a GPU needs."""
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", *spec.serve_arguments(device)]
    return lambda: start_child(command, variables, log)


def get(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[int, bytes]:
    """Status and body of a GET; status 0 where nobody answers."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
