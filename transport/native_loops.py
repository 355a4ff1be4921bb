"""What numba compiles: a loop over memcpy, and a queue of memcpys that threads share outside of the interpreter's lock.

Imported by transport/native.py alone, and only where numba may be.

    rows: from, to, bytes │ oldest that is not copied ... head: next to be taken ... tail: next to be filled │ a ring
    state: mutex, two conditions, head, tail, is closed, bytes and ns copied, then per batch under way: first, last

A position counts rows since the beginning; its row lies at the position modulo the number of rows. A batch is taken
whole by one thread, some BATCH_BYTES. Everything before `oldest` is copied, so one number says who is done.

Memory model: addresses are raw; state and rows stay mapped while anybody uses them. pthread's mutex and conditions are
all zeros at first, on Linux with glibc and musl.
Threading: every function may be called from any thread. Those that wait or copy run without the interpreter's lock;
under the mutex nobody copies, so those that keep the interpreter's lock wait for a few microseconds at most.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numba
import numpy
from numba.core import types

Array = Any
"""A numpy array of int64, contiguous."""

NUM_ROWS = 1 << 14
BATCH_BYTES = 256 << 10
"""Some 40 us, after which a thread looks for more: small, so that all threads end at about the same time."""

MAX_BATCHES = 16
"""Under way at a time: more threads than that wait."""

_MUTEX, _WORK, _RESTED = 0, 64, 128
"""Where they lie, in bytes: each is smaller than 64."""
_HEAD, _TAIL, _CLOSED = 24, 25, 26
NUM_BYTES, NUM_NS = 27, 28
"""Copied by all threads, and how long they took."""
_BATCHES = 32
_BATCH = 8
"""Numbers per batch: first, last, and times in whole seconds and ns when it began and ended."""
_FREE = -1
STATE_LENGTH = _BATCHES + MAX_BATCHES * _BATCH
_MONOTONIC = 1
_IS_KEPT = os.access(Path(__file__).parent, os.W_OK)
"""Machine code is kept beside Python's own, in __pycache__, where that can be written: 0.3 instead of 1.7 s the next
time. numba compares the source's age and the CPU."""

_memcpy = types.ExternalFunction("memcpy", types.voidptr(types.uintp, types.uintp, types.uintp))
_lock = types.ExternalFunction("pthread_mutex_lock", types.int32(types.uintp))
_unlock = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.uintp))
_wait = types.ExternalFunction("pthread_cond_wait", types.int32(types.uintp, types.uintp))
_signal = types.ExternalFunction("pthread_cond_signal", types.int32(types.uintp))
_broadcast = types.ExternalFunction("pthread_cond_broadcast", types.int32(types.uintp))
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))


@numba.njit("void(int64[:, ::1], int64[:, ::1])", nogil=True, cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def copy_pieces(pieces: Array, addresses: Array) -> None:
    """Pieces (from, to and bytes, counting from a pair of addresses) of each pair of addresses."""
    for pair in range(addresses.shape[0]):
        for piece in range(pieces.shape[0]):
            _memcpy(
                types.uintp(addresses[pair, 1] + pieces[piece, 1]),
                types.uintp(addresses[pair, 0] + pieces[piece, 0]),
                types.uintp(pieces[piece, 2]),
            )


@numba.njit("int64(int64[::1])", cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def _oldest(state: Array) -> int:
    """Under the mutex: every row before this position is copied."""
    result = state[_HEAD]
    for at in range(_BATCHES, STATE_LENGTH, _BATCH):
        if state[at] != _FREE and state[at] < result:
            result = state[at]
    return result  # type: ignore[no-any-return]


@numba.njit("int64(int64[::1], int64[:, ::1])", cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def _take(state: Array, rows: Array) -> int:
    """Under the mutex: takes a batch. Returns where in the state it is, or -1 if there is nothing to take."""
    first, tail = state[_HEAD], state[_TAIL]
    if first == tail:
        return -1
    for at in range(_BATCHES, STATE_LENGTH, _BATCH):
        if state[at] == _FREE:
            last, num_bytes = first, 0
            while last < tail and num_bytes < BATCH_BYTES:
                num_bytes += rows[last % NUM_ROWS, 2]
                last += 1
            state[at], state[at + 1], state[_HEAD] = first, last, last
            return at
    return -1


@numba.njit("void(int64[::1], int64[:, ::1], int64)", cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def _copy(state: Array, rows: Array, at: int) -> None:
    """Under the mutex, which it lets go of meanwhile: copies a batch that was taken."""
    base = types.uintp(state.ctypes.data)
    if state[_HEAD] != state[_TAIL]:
        _signal(base + _WORK)
    _unlock(base + _MUTEX)
    times = types.uintp(base + 8 * (at + 2))
    _clock(types.int32(_MONOTONIC), times)
    num_bytes = 0
    for position in range(state[at], state[at + 1]):
        row = position % NUM_ROWS
        _memcpy(types.uintp(rows[row, 1]), types.uintp(rows[row, 0]), types.uintp(rows[row, 2]))
        num_bytes += rows[row, 2]
    _clock(types.int32(_MONOTONIC), times + 16)
    _lock(base + _MUTEX)
    state[NUM_BYTES] += num_bytes
    state[NUM_NS] += (state[at + 4] - state[at + 2]) * 1_000_000_000 + state[at + 5] - state[at + 3]
    state[at] = _FREE
    _broadcast(base + _RESTED)


@numba.njit("int64(int64[::1], int64[:, ::1], int64[:, ::1], int64, int64)", cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def put(state: Array, rows: Array, pieces: Array, from_address: int, to_address: int) -> int:
    """Puts all pieces into the queue. Returns the position behind them, or -1 if there is no room, or it is closed."""
    base = types.uintp(state.ctypes.data)
    _lock(base + _MUTEX)
    first, count, result = state[_TAIL], pieces.shape[0], -1
    if first + count - _oldest(state) <= NUM_ROWS and not state[_CLOSED]:
        for piece in range(count):
            row = (first + piece) % NUM_ROWS
            rows[row, 0] = from_address + pieces[piece, 0]
            rows[row, 1] = to_address + pieces[piece, 1]
            rows[row, 2] = pieces[piece, 2]
        result = state[_TAIL] = first + count
        _signal(base + _WORK)
    _unlock(base + _MUTEX)
    return result


@numba.njit("int64(int64[::1])", cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def done(state: Array) -> int:
    """Everything before this position is copied, or was struck out."""
    base = types.uintp(state.ctypes.data)
    _lock(base + _MUTEX)
    result = _oldest(state)
    _unlock(base + _MUTEX)
    return result  # type: ignore[no-any-return]


@numba.njit("void(int64[::1], int64[:, ::1])", nogil=True, cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def serve(state: Array, rows: Array) -> None:
    """Copies whatever is put into the queue, until it is closed."""
    base = types.uintp(state.ctypes.data)
    _lock(base + _MUTEX)
    while not state[_CLOSED]:
        at = _take(state, rows)
        if at >= 0:
            _copy(state, rows, at)
        else:
            _wait(base + _WORK if state[_HEAD] == state[_TAIL] else base + _RESTED, base + _MUTEX)
    _unlock(base + _MUTEX)


@numba.njit("void(int64[::1], int64[:, ::1], int64)", nogil=True, cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def finish(state: Array, rows: Array, position: int) -> None:
    """Returns when everything before this position is copied; takes part."""
    base = types.uintp(state.ctypes.data)
    _lock(base + _MUTEX)
    while _oldest(state) < position:
        at = _take(state, rows) if state[_HEAD] < position else -1
        if at >= 0:
            _copy(state, rows, at)
        else:
            _wait(base + _RESTED, base + _MUTEX)
    _unlock(base + _MUTEX)


@numba.njit("void(int64[::1], int64[:, ::1], int64, int64)", nogil=True, cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def strike(state: Array, rows: Array, first: int, last: int) -> None:
    """Positions first .. last-1 that nobody has taken will not be copied; returns when none of them is being copied."""
    base = types.uintp(state.ctypes.data)
    _lock(base + _MUTEX)
    for position in range(max(first, state[_HEAD]), min(last, state[_TAIL])):
        rows[position % NUM_ROWS, 2] = 0
    is_under_way = True
    while is_under_way:
        is_under_way = False
        for at in range(_BATCHES, STATE_LENGTH, _BATCH):
            if state[at] != _FREE and state[at] < last and state[at + 1] > first:
                is_under_way = True
        if is_under_way:
            _wait(base + _RESTED, base + _MUTEX)
    _unlock(base + _MUTEX)


@numba.njit("void(int64[::1])", cache=_IS_KEPT)  # type: ignore[untyped-decorator]
def close(state: Array) -> None:
    """Nothing more is put, and `serve` returns; `finish` and `strike` still work."""
    base = types.uintp(state.ctypes.data)
    _lock(base + _MUTEX)
    state[_CLOSED] = 1
    _broadcast(base + _WORK)
    _broadcast(base + _RESTED)
    _unlock(base + _MUTEX)


def new_state() -> Array:
    """Of an empty queue."""
    result = numpy.zeros(STATE_LENGTH, dtype=numpy.int64)
    result[_BATCHES::_BATCH] = _FREE
    return result


def new_rows() -> Array:
    """Room for NUM_ROWS pieces, some 400 kB."""
    return numpy.zeros((NUM_ROWS, 3), dtype=numpy.int64)
