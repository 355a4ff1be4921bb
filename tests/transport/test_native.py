"""The compiled loop is there where numba is, and whatever is wrong with numba, Python copies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.transport.peer_process import ROOT

COPY = """
from tests.transport.memory import Owned
from transport import native
from transport.conformance_pair import finish
from transport.shm import ShmTransport
native.compile_now()
sender, receiver = Owned(ShmTransport(), 64 << 10, 8, fill=3), Owned(ShmTransport(), 64 << 10, 8)
endpoint = sender.transport.connect(receiver.transport.describe())
finish(endpoint.write("t", sender.blocks(range(8)), receiver.blocks(range(8)), b"."))
assert all(receiver.block(at) == bytes([3]) * (64 << 10) for at in range(8))
print("compiled" if native.compiled() else "python")
endpoint.close()
for owned in (sender, receiver):
    owned.transport.close()
"""


def copied_by(first: str = "", **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", first + COPY],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    return done.stdout.decode().strip()


def test_it_is_compiled_where_numba_is() -> None:
    pytest.importorskip("numba")
    assert copied_by() == "compiled"


@pytest.mark.parametrize(
    ("first", "variables"),
    [
        ("import sys; sys.modules['numba'] = None", {}),
        ("", {"NUMBA_DISABLE_JIT": "1"}),
    ],
    ids=["missing", "disabled"],
)
def test_without_a_numba_that_works_python_copies(first: str, variables: dict[str, str]) -> None:
    assert copied_by(first, **variables) == "python"
