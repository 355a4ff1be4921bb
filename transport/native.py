"""Copies in compiled code (transport/native_loops.py), where there is numba, and enough to copy.

    not yet, or no numba ──▶ compiled() is None: Python copies piece by piece
    compiled             ──▶ a list of copies is one foreign call, or is put into a queue for other threads

numba comes with vLLM. Importing it and compiling take two seconds, so a thread does both, once per process.

Memory model: addresses are raw; the caller has checked them.
Threading: anything from any thread.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Table = Any
"""A numpy array of int64, contiguous, of two dimensions."""

WORTH_COMPILING_BYTES = 384 << 20
"""Of a KV cache."""

_compiling = threading.Lock()
_lock = threading.Lock()
_is_tried = False
_compiled: ModuleType | None = None
_waiting: list[Callable[[], None]] = []


def compiled() -> ModuleType | None:
    """transport.native_loops; None where there is no numba, or not yet."""
    return _compiled


def when_compiled(call: Callable[[], None]) -> None:
    """Calls at once, or from the thread that compiles, or never."""
    with _lock:
        if not _is_tried:
            _waiting.append(call)
            return
    if _compiled is not None:
        call()


def table_of(rows: Sequence[tuple[int, ...]]) -> Table:
    """What the compiled loop reads. Only where there is one: then numpy is there, too. Rows: at least one."""
    import numpy

    return numpy.array(rows, dtype=numpy.int64)


def prepare(num_bytes: int) -> None:
    """Has it compiled, by a thread, where a KV cache of so many bytes is worth it. Does not wait."""
    if num_bytes >= WORTH_COMPILING_BYTES and not _is_tried:
        threading.Thread(target=compile_now, name="baton-compile", daemon=True).start()


def compile_now() -> None:
    """Has it compiled, and waits. Does nothing the second time."""
    global _is_tried, _compiled
    with _compiling:
        if _is_tried:
            return
        loops = _working_loops()
        with _lock:
            _compiled, _is_tried = loops, True
            calls = _waiting.copy()
            _waiting.clear()
        if loops is not None:
            for call in calls:
                call()
        gc.freeze()  # as vLLM does: numba's objects stay, and to look through them stops everything for 40 ms


def _working_loops() -> ModuleType | None:
    try:
        from transport import native_loops

        return native_loops if _works(native_loops) else None
    except Exception:  # noqa: BLE001 - whatever is wrong with numba here (missing, disabled, broken): Python copies
        return None


def _works(loops: ModuleType) -> bool:
    source, target = ctypes.create_string_buffer(b"..abc"), ctypes.create_string_buffer(b".......")
    pieces, addresses = table_of([(2, 4, 1), (3, 0, 2)]), [(ctypes.addressof(source), ctypes.addressof(target))]
    loops.copy_pieces(pieces[:1], table_of(addresses))
    state, rows = loops.new_state(), loops.new_rows()
    loops.finish(state, rows, loops.put(state, rows, pieces[1:], *addresses[0]))
    return target.value == b"bc..a.."
