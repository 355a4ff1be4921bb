"""Measures a transport between two fresh processes of this host, so that a library that crashes costs its row alone.

    python -m transport.probe_pair own SCHEME             says its description, stays until its input ends
    python -m transport.probe_pair measure SCHEME HEX     connects, measures, says a `Measurement`

Memory and threads: each child owns one transport and its scratch memory; every wait of the parent has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping

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


@contextlib.contextmanager
def owners(schemes: list[str], environment: Mapping[str, str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One receiving process per scheme, started at once, ended at the end."""
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for scheme in schemes:
            children[scheme] = _start(["own", scheme], environment)
        yield children
    finally:
        for child in children.values():
            _end(child)


def measured(scheme: str, owner: subprocess.Popen[str], environment: Mapping[str, str]) -> Measurement:
    """Through a second process. Raises TransferError with what went wrong."""
    description = _answer(owner)
    prober = _start(["measure", scheme, description], environment)
    try:
        return msgspec.json.decode(_answer(prober), type=Measurement)
    except msgspec.DecodeError as error:
        raise TransferError(f"an odd answer: {error}") from error
    finally:
        _end(prober)


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
            pipe.close()


def _own(scheme: str) -> None:
    transport = make_transport(scheme, "127.0.0.1")
    scratch, landings = Scratch({scheme: transport}), ScratchLandings({scheme: transport})
    landings.expect(_US)
    print(f"answer {transport.describe().hex()}", flush=True)
    sys.stdin.read()
    del scratch


def _measure(scheme: str, description: str) -> None:
    transport = make_transport(scheme, "127.0.0.1")
    scratch = Scratch({scheme: transport})
    endpoint, tag, clock = transport.connect(bytes.fromhex(description)), probe_tag(_US), SystemClock()
    wait_ready(endpoint, tag, clock, READY_TIMEOUT_S)
    print(f"answer {msgspec.json.encode(measure(endpoint, tag, clock, BUDGET_S)).decode()}", flush=True)
    endpoint.close()
    transport.close()
    del scratch


if __name__ == "__main__":
    if sys.argv[1] == "own":
        _own(sys.argv[2])
    else:
        _measure(sys.argv[2], sys.argv[3])
