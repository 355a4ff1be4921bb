"""Children of the launcher, each the head of a process group of its own: looked at, signalled and ended as groups.

A group counts as alive while /proc shows a member that is not dead; a killed API server's engine core is one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from transport.parent import tied

STOP_TIMEOUT_S = 4.0
KILL_TIMEOUT_S = 2.0
TRACKER_TIMEOUT_S = 1.0
_POLL_S = 0.02
_NUM_THREADS = 17
"""Of the fields of /proc/PID/stat behind the name."""
_SEGMENT = re.compile(r"/dev/shm/(?:psm_|vllm_dist_)\S+")


class Child(Protocol):
    """One started process; its pid is its group's id."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code (negative: by that signal), None while it runs."""


def start_child(
    command: Sequence[str], environment: Mapping[str, str], log: Path, keep_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Starts a command in its own session, output to a file, killed with the calling thread. keep_fds: descriptors
    that it inherits."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with log.open("ab") as output:
        return subprocess.Popen(
            tied(list(command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_fds,
            env=variables | dict(environment),
        )


def group_members(group: int) -> list[int]:
    """Living processes of a group."""
    return [pid for pid, found in _groups() if found == group]


def living_groups(groups: Collection[int]) -> set[int]:
    """Those of the groups that have a living process."""
    return {found for _, found in _groups() if found in groups}


def signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def stop_groups(children: Sequence[Child], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """SIGTERM to all heads at once, SIGKILL to what is left of the groups; returns when nothing of them lives.

    Only the head hears SIGTERM, it passes it on: a second one kills vLLM's engine core in the middle of its clean-up.
    Nothing of theirs stays in /dev/shm: what they map is known now; what the dead had mapped is unlinked by Python's
    resource trackers, which are therefore killed last.
    """
    shared = _shared_memory({child.pid for child in children})
    for child in children:
        if child.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
    groups = {child.pid for child in children}
    wait_for_end(groups, timeout_s)
    for group in living_groups(groups):
        for pid in group_members(group):
            if not _is_resource_tracker(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    wait_for_end(groups, TRACKER_TIMEOUT_S)
    for group in living_groups(groups):
        signal_group(group, signal.SIGKILL)
    wait_for_end(groups, KILL_TIMEOUT_S)
    for child in children:
        child.poll()
    for path in shared:
        path.unlink(missing_ok=True)


def _shared_memory(groups: Collection[int]) -> set[Path]:
    """Segments of Python and of vLLM's tensor-parallel ranks that the groups' processes map."""
    found = set()
    for pid in (pid for pid, group in _groups() if group in groups):
        with suppress(OSError):
            found |= set(_SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text()))
    return {Path(name) for name in found}


def _is_resource_tracker(pid: int) -> bool:
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def wait_for_end(groups: Collection[int], timeout_s: float) -> None:
    """Until no process of these groups lives, or the time is over. A dead head that nobody asked for its exit code
    counts as ended."""
    deadline = time.monotonic() + timeout_s
    while living_groups(groups) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _groups() -> list[tuple[int, int]]:
    """(pid, group) of every process that is not dead: a zombie with another thread still has its files, and listens
    where it did, until that thread has given back the memory."""
    result = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                fields = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()
                if fields[0] not in (b"Z", b"X") or int(fields[_NUM_THREADS]) > 1:
                    result.append((int(entry.name), int(fields[2])))
    return result
