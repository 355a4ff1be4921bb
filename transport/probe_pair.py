"""Measures a transport between two fresh processes of this host, so that a library that crashes costs its row alone.

    python -m transport.probe_pair own SCHEME         says its description, stays until its input ends
    python -m transport.probe_pair measure SCHEME     hears a description, connects, measures, says a `Measurement`

Memory and threads: each child owns one transport and its scratch memory; every wait of the parent has a deadline. All
children start at once, because that takes longest, and measure one after the other.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from core.clock import SystemClock
from core.errors import TransferError
from transport.probe import Measurement, measure, wait_ready
from transport.schemes import make_transport
from transport.scratch import Scratch, ScratchLandings, probe_tag

BUDGET_S = 0.5
READY_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 20.0
_US = "doctor"


class ProcessPair(NamedTuple):
    """One transport's receiver and its prober."""

    owner: subprocess.Popen[str]
    prober: subprocess.Popen[str]

    def measure(self) -> Measurement:
        """Raises TransferError with what went wrong."""
        description = _answer(self.owner)
        assert self.prober.stdin is not None
        try:
            self.prober.stdin.write(f"{description}\n")
            self.prober.stdin.flush()
            return msgspec.json.decode(_answer(self.prober), type=Measurement)
        except BrokenPipeError as error:
            raise TransferError(_last_words(self.prober)) from error
        except msgspec.DecodeError as error:
            raise TransferError(f"an odd answer: {error}") from error


@contextlib.contextmanager
def process_pairs(schemes: list[str], environment: Mapping[str, str]) -> Iterator[dict[str, ProcessPair]]:
    """One pair per scheme, ended at the end."""
    with contextlib.ExitStack() as stack:

        def start(task: str, scheme: str) -> subprocess.Popen[str]:
            child = _start([task, scheme], environment)
            stack.callback(_end, child)
            return child

        yield {scheme: ProcessPair(start("own", scheme), start("measure", scheme)) for scheme in schemes}


def _start(arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "transport.probe_pair", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment}, errors="replace"
    )


def _answer(child: subprocess.Popen[str]) -> str:
    """What it says after `answer `; libraries may print other lines. Raises TransferError with its last words."""
    assert child.stdout is not None
    deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
    said = b""
    while (left_s := deadline_s - time.monotonic()) > 0:
        readable, _, _ = select.select([child.stdout], [], [], left_s)
        piece = os.read(child.stdout.fileno(), 1 << 16) if readable else b""
        said += piece
        for line in said.decode(errors="replace").split("\n")[:-1]:
            if line.startswith("answer "):
                return line.removeprefix("answer ")
        if readable and not piece:
            raise TransferError(_last_words(child))
    raise TransferError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s")


def _last_words(child: subprocess.Popen[str]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        _, errors = child.communicate(timeout=2.0)
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {child.returncode}"
    return "ended without a word"


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _own(scheme: str) -> None:
    transport = make_transport(scheme, "127.0.0.1")
    scratch, landings = Scratch({scheme: transport}), ScratchLandings({scheme: transport})
    landings.expect(_US)
    print(f"answer {transport.describe().hex()}", flush=True)
    sys.stdin.read()
    del scratch


def _measure(scheme: str) -> None:
    transport = make_transport(scheme, "127.0.0.1")
    scratch = Scratch({scheme: transport})
    endpoint, tag, clock = transport.connect(bytes.fromhex(sys.stdin.readline())), probe_tag(_US), SystemClock()
    wait_ready(endpoint, tag, clock, READY_TIMEOUT_S)
    print(f"answer {msgspec.json.encode(measure(endpoint, tag, clock, BUDGET_S)).decode()}", flush=True)
    endpoint.close()
    transport.close()
    del scratch


if __name__ == "__main__":
    {"own": _own, "measure": _measure}[sys.argv[1]](sys.argv[2])
