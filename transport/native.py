"""A list of copies as one foreign call, outside the interpreter's lock: a loop over memcpy, compiled by numba.

    pieces: from, to, bytes ┐
    addresses: from, to     ├──▶ pieces first .. last-1 of each pair of addresses: 1 us around nothing but memcpy
    first, last             ┘

numba comes with vLLM. Importing it and compiling take most of a second, so a thread does both, once per process, where
there is enough to copy; until then, and where there is no numba, Python copies piece by piece.

Memory model: addresses are raw; the caller has checked them.
Threading: anything from any thread.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

Table = Any
"""A numpy array of int64, contiguous, of two dimensions."""

CopyPieces = Callable[[Table, int, int, Table], None]
"""(pieces: from, to and bytes, counting from a pair of addresses; first; last; addresses: pairs of from and to)"""

WORTH_COMPILING_BYTES = 384 << 20
"""Of a KV cache."""

_lock = threading.Lock()
_is_tried = False
_copy_pieces: CopyPieces | None = None


def copy_pieces() -> CopyPieces | None:
    """The compiled loop; None where there is none, or not yet."""
    return _copy_pieces


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
    global _is_tried, _copy_pieces
    with _lock:
        if not _is_tried:
            _copy_pieces = _compiled()
            _is_tried = True
            gc.freeze()  # as vLLM does: numba's objects stay, and to look through them stops everything for 40 ms


def _compiled() -> CopyPieces | None:
    try:
        copy = _compile()
        return copy if _works(copy) else None
    except Exception:  # noqa: BLE001 - whatever is wrong with numba here (missing, disabled, broken): Python copies
        return None


def _works(copy: CopyPieces) -> bool:
    source, target = ctypes.create_string_buffer(b"..abc"), ctypes.create_string_buffer(b".......")
    pieces, addresses = [(2, 4, 1), (3, 0, 2)], [(ctypes.addressof(source), ctypes.addressof(target))]
    copy(table_of(pieces), 0, len(pieces), table_of(addresses))
    return target.value == b"bc..a.."


def _compile() -> CopyPieces:
    import numba
    from numba.core import types

    memcpy = types.ExternalFunction("memcpy", types.voidptr(types.uintp, types.uintp, types.uintp))

    @numba.njit("void(int64[:, ::1], int64, int64, int64[:, ::1])", nogil=True)  # type: ignore[untyped-decorator]
    def copy(pieces: Table, first: int, last: int, addresses: Table) -> None:
        for pair in range(addresses.shape[0]):
            for piece in range(first, last):
                memcpy(
                    types.uintp(addresses[pair, 1] + pieces[piece, 1]),
                    types.uintp(addresses[pair, 0] + pieces[piece, 0]),
                    types.uintp(pieces[piece, 2]),
                )

    return copy  # type: ignore[no-any-return]
