"""The launcher's side of `engine/zygote.py`: starts it, asks it to fork servers, and starts it again if it died."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.logs import last_lines
from cluster.processes import living_groups, start_child, stop_groups
from core.errors import BatonError, UnsupportedError
from engine.build import libraries_to_preload
from engine.instance import cache_folder, common_variables

START_TIMEOUT_S = 180.0
_ANSWER_TIMEOUT_S = 10.0
_POLL_S = 0.02
_GONE = -signal.SIGKILL


class ForkedServer:
    """A `Child` of the zygote. With the zygote dies the child, and the number that it ended by."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self._exit: int | None = None
        self.pid = pid

    def poll(self) -> int | None:
        if self._exit is None:
            self._exit = self._zygote.exit_of(self.pid)
        return self._exit


class Zygote:
    """One preloaded process; may serve several clusters, from any thread.

    offline: its servers ask nothing of a model hub (that library reads this when it is imported, so it is said here).
    """

    def __init__(self, folder: Path, *, offline: bool = True) -> None:
        self.log = folder / "zygote.log"
        self._socket = folder / "zygote.sock"
        self._variables = common_variables(folder, cache_folder(), offline=offline)
        self._variables |= {"OMP_NUM_THREADS": "1", "LD_PRELOAD": libraries_to_preload()}
        self._lock = threading.Lock()
        self._child = self._start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def is_ready(self) -> bool:
        """True once vLLM is imported. Raises UnsupportedError if this one cannot be forked, BatonError if it died."""
        code = self._child.poll()
        if code is not None:
            lines = last_lines(self.log)
            kind = UnsupportedError if code == 2 else BatonError
            raise kind("; ".join(lines[-3:]) or f"the preloaded process ended with exit code {code}")
        return self._socket.exists()

    def fork(self, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> ForkedServer:
        """A new server; waits for the zygote, and starts it again if it has died."""
        with self._lock:
            if self._child.poll() is not None:
                self._child = self._start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise BatonError(f"the preloaded process did not get ready in {START_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        spec = {"arguments": list(arguments), "environment": dict(variables), "log": str(log)}
        return ForkedServer(self, int(self._ask({"start": spec})["pid"]))

    def exit_of(self, pid: int) -> int | None:
        """The exit code of one of its servers, None while it runs."""
        if self._child.poll() is not None:
            return _GONE
        try:
            code = self._ask({"exits": [pid]})["exits"].get(str(pid))
        except OSError:
            return None if living_groups({pid}) else _GONE
        return None if code is None else int(code)

    def close(self) -> None:
        """Ends it, and with it every server that it forked."""
        stop_groups([self._child])

    def _start(self) -> subprocess.Popen[bytes]:
        self._socket.unlink(missing_ok=True)
        return start_child([sys.executable, "-P", "-m", "engine.zygote", str(self._socket)], self._variables, self.log)

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_TIMEOUT_S)
            connection.connect(str(self._socket))
            connection.sendall(msgspec.json.encode(request) + b"\n")
            with connection.makefile("rb") as stream:
                answer: dict[str, Any] = msgspec.json.decode(stream.readline() or b"{}")
        if answer.get("error") or "pid" not in answer:
            raise BatonError(f"the preloaded process refused: {answer.get('error') or 'no answer'}")
        return answer
