"""What died is started again, with growing pauses and an end to patience."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.members import Member
from cluster.ports import free_ports
from cluster.processes import start_child, stop_groups
from cluster.supervisor import RestartBudget, Supervisor
from tests.poll import until


def test_pauses_grow_and_the_sixth_start_in_a_minute_is_refused() -> None:
    budget = RestartBudget(most=5, window_s=60.0, first_pause_s=0.2)
    pauses = [budget.pause_s(float(now)) for now in range(6)]
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, None]
    assert budget.pause_s(100.0) == 0.2


def test_a_killed_member_comes_back_and_one_that_cannot_live_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    steady = _member(tmp_path / "steady", "import time; time.sleep(600)")
    broken = _member(tmp_path / "broken", "raise SystemExit('ValueError: no luck')")
    supervisor = Supervisor([steady, broken], said.append)
    supervisor.budget = lambda: RestartBudget(most=2, first_pause_s=0.01)
    steady.start()
    broken.start()
    supervisor.start()
    try:
        first = steady.pid
        steady.kill()
        until(lambda: steady.pid != first and steady.exit_code() is None)
        until(lambda: supervisor.given_up == {"broken"})
        assert any("steady ended with exit code -9" in line for line in said)
        assert any("broken: ValueError: no luck" in line for line in said)
    finally:
        supervisor.stop()
        stop_groups([member.child for member in (steady, broken) if member.child])
        supervisor.release()
    assert steady.pids() == []


def test_what_outlives_its_head_is_gone_before_the_next_start(tmp_path: Path) -> None:
    """The second process of the group shares the head's listening socket and has two gigabytes to give back."""
    (port,) = free_ports(1, "127.0.0.1")
    code = (
        "import mmap, os, socket, time; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1);"
        f"s.bind(('127.0.0.1', {port})); s.listen(); print('listens', flush=True);"
        "m = os.fork() or mmap.mmap(-1, 2 << 30, flags=mmap.MAP_PRIVATE);"
        "m and hasattr(m, 'write') and [m.write(b'x' * (1 << 20)) for _ in range(2048)];"
        "print('has it', flush=True); time.sleep(600)"
    )
    member = _member(tmp_path / "member", code)
    for start in (1, 2, 3):
        member.start()
        until(lambda count=2 * start: member.log.read_text().count("has it") == count)  # type: ignore[misc]
        member.kill_group()
        member.after_death()
        assert member.pids() == []
    assert "in use" not in member.log.read_text()


def test_a_child_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from cluster.processes import start_child;"
        "child = start_child([sys.executable, '-c', 'import time; time.sleep(600)'], {}, Path(sys.argv[1]));"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: "sleep(600)" in _command(child))
        parent.kill()
    until(lambda: not _lives(child))


def _member(log: Path, code: str) -> Member:
    return Member(log.name, log, lambda: start_child([sys.executable, "-c", code], {}, log))


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
