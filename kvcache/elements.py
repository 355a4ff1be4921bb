"""Numbers of a block as float32 and back. numpy has no bfloat16: it is the upper half of a float32.

Memory model: each call returns a new array; `write_floats` writes into the bytes it is given.
Threading: pure functions for any thread.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcache.shape import Dtype

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

_LARGEST_FLOAT16 = 65504.0


def read_floats(numbers: memoryview, dtype: Dtype) -> Floats:
    """Numbers of a dtype, exactly."""
    if dtype == "bfloat16":
        return (np.frombuffer(numbers, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.frombuffer(numbers, "<f2" if dtype == "float16" else "<f4").astype(np.float32)


def write_floats(values: Floats, dtype: Dtype, into: memoryview) -> None:
    """Finite values, rounded to the nearest number of the dtype; what is just beyond float16's largest becomes that."""
    if dtype == "bfloat16":
        np.frombuffer(into, "<u2")[:] = _upper_halves(values)
    elif dtype == "float16":
        np.frombuffer(into, "<f2")[:] = np.clip(values, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    else:
        np.frombuffer(into, "<f4")[:] = values


def rounded_down(values: Floats) -> Floats:
    """The largest numbers of bfloat16 that are not above the values."""
    return _truncated(values, np.less(values, 0))


def rounded_up(values: Floats) -> Floats:
    """The smallest numbers of bfloat16 that are not below the values."""
    return _truncated(values, np.greater(values, 0))


def _upper_halves(values: Floats) -> Words:
    """The nearest numbers of bfloat16, ties to even, as their bits."""
    bits = values.view(np.uint32)
    result: Words = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return result


def _truncated(values: Floats, away_from_zero: npt.NDArray[np.bool_]) -> Floats:
    """To bfloat16 towards zero, or away from it where said."""
    bits = values.view(np.uint32)
    cut = bits & np.uint32(0xFFFF0000)
    result: Floats = (cut + ((cut != bits) & away_from_zero) * np.uint32(0x10000)).view(np.float32)
    return result
