"""Starts again what died: one thread, a line per event, and an end to patience."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.members import Member
from core.errors import BatonError

POLL_S = 0.2
STOP_TIMEOUT_S = 2.0
SILENT_POLL_S = 1.0


class RestartBudget:
    """At most `most` starts in `window_s`, with a pause before each that doubles while they come close together."""

    def __init__(self, most: int = 5, window_s: float = 60.0, first_pause_s: float = 0.2) -> None:
        self._most = most
        self._window_s = window_s
        self._first_pause_s = first_pause_s
        self._starts: deque[float] = deque()

    def pause_s(self, now_s: float) -> float | None:
        """Seconds to wait before the next start, None if there have been too many."""
        while self._starts and now_s - self._starts[0] > self._window_s:
            self._starts.popleft()
        if len(self._starts) >= self._most:
            return None
        self._starts.append(now_s)
        return float(self._first_pause_s * 2 ** (len(self._starts) - 1))


class Supervisor:
    """Watches from its own thread, which is also the one that starts: it must live as long as what it has started."""

    def __init__(
        self, members: Sequence[Member], say: Callable[[str], None], silent: Callable[[], set[str]] = set
    ) -> None:
        """silent: names of members that hang while another waits for their end; they are killed."""
        self._members = members
        self._say = say
        self._silent = silent
        self._silent_due_s = 0.0
        self._budgets: dict[str, RestartBudget] = {}
        self._due_s: dict[str, float] = {}
        self._stopping = threading.Event()
        self._released = threading.Event()
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="baton-supervisor", daemon=True)
        self.given_up: set[str] = set()
        self.budget: Callable[[], RestartBudget] = RestartBudget

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No more starts from now on; what one that is under way brings forth is killed again."""
        self._stopping.set()
        if self._starting.acquire(timeout=STOP_TIMEOUT_S):
            self._starting.release()

    def release(self) -> None:
        """Ends the thread, and by the kernel's hand whatever it started: for after everything was stopped."""
        self._released.set()

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            self._end_silent()
            for member in self._members:
                with self._starting:
                    if member.name not in self.given_up and not self._stopping.is_set():
                        self._look_after(member)
        self._released.wait()

    def _end_silent(self) -> None:
        now_s = time.monotonic()
        if now_s < self._silent_due_s:
            return
        self._silent_due_s = now_s + SILENT_POLL_S
        names = self._silent()
        for member in self._members:
            if member.name in names:
                self._say(f"{member.name} hangs while another instance waits for it to stop writing; ending it")
                member.kill_group()

    def _look_after(self, member: Member) -> None:
        now_s = time.monotonic()
        if member.name in self._due_s:
            if now_s >= self._due_s[member.name]:
                del self._due_s[member.name]
                self._start(member)
        elif (code := member.exit_code()) is not None:
            member.after_death()
            pause_s = self._budgets.setdefault(member.name, self.budget()).pause_s(now_s)
            if pause_s is None:
                self.given_up.add(member.name)
                self._say(f"{member.name} keeps dying (exit code {code}) and stays down\n{member.last_words()}")
            else:
                self._due_s[member.name] = now_s + pause_s
                self._say(f"{member.name} ended with exit code {code}; starting it again")

    def _start(self, member: Member) -> None:
        try:
            member.start()
        except (BatonError, OSError) as error:
            self.given_up.add(member.name)
            self._say(f"{member.name} could not be started again: {error}")
        if self._stopping.is_set():
            member.after_death()
