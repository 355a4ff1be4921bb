"""Where heads lie in a block of vLLM's CPU attention, on this processor: what codecs with a scale per head rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SCRIPT = """
import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

current_platform.import_kernels()
heads, tokens, size = 2, 128, 64
for dtype in (torch.float32, torch.bfloat16):
    cache = torch.zeros(1, heads, 2 * tokens, size, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    numbers = torch.zeros(tokens, heads, size, dtype=dtype) + torch.arange(1, heads + 1).view(1, heads, 1)
    isa = _get_attn_isa(dtype, tokens, size)
    ops.cpu_attn_reshape_and_cache(numbers, -numbers, keys, values, torch.arange(tokens), isa)
    halves = cache.float().flatten().view(heads, 2, tokens * size)
    for head in range(heads):
        for side, number in enumerate((head + 1, -head - 1)):
            assert (halves[head, side] == number).all(), (dtype, isa, head, side)
    print(dtype, isa)
"""


def test_each_heads_keys_of_a_block_lie_in_one_piece_and_its_values_behind_them() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) >= 2
