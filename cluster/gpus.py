"""Which GPUs each instance computes on: its own where there are enough, shared ones otherwise.

vLLM's ranks take the first GPUs that they see. An instance sees its own first and the others behind them: CUDA maps a
peer's memory (transport/cuda_ipc.py) only from a GPU that is visible. Never run on a GPU yet.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from core.errors import ConfigError
from engine.instance import ENV_VISIBLE

_USED_SHARE = 0.9
"""Of a GPU's memory: what vLLM takes for an instance that is alone on it."""


class Gpus(msgspec.Struct, frozen=True):
    """Of one instance. visible: as CUDA names them, its own first; empty: CUDA decides. memory_share: of each of its
    own, where others have the rest; 0: it is alone."""

    visible: tuple[str, ...] = ()
    memory_share: float = 0.0


def present(environment: Mapping[str, str] | None = None, root: Path = Path("/")) -> list[str]:
    """What this process may use, as CUDA_VISIBLE_DEVICES names it."""
    environment = os.environ if environment is None else environment
    if ENV_VISIBLE in environment:
        return [name.strip() for name in environment[ENV_VISIBLE].split(",") if name.strip()]
    return [str(number) for number in range(len(list((root / "dev").glob("nvidia[0-9]*"))))]


def shares_of_instances(gpus: Sequence[str], ranks: Sequence[int]) -> list[Gpus]:
    """Of each instance, by its tensor-parallel ranks. With fewer GPUs than ranks instances wrap around, and those that
    meet on a GPU share its memory. CUDA decides where no GPU was found. Raises ConfigError if one instance needs
    more than there are."""
    if not gpus:
        return [Gpus()] * len(ranks)
    if max(ranks) > len(gpus):
        raise ConfigError(
            f"an instance of tensor parallel size {max(ranks)} needs as many GPUs, and {len(gpus)} are here "
            f"({ENV_VISIBLE}={','.join(gpus)})"
        )
    owned, first = [], 0
    for count in ranks:
        if first + count > len(gpus):
            first = 0
        owned.append(range(first, first + count))
        first += count
    users = Counter(index for own in owned for index in own)
    return [_of(gpus, own, max(users[index] for index in own)) for own in owned]


def _of(gpus: Sequence[str], own: range, num_users: int) -> Gpus:
    others = [name for index, name in enumerate(gpus) if index not in own]
    visible = tuple([*gpus[own.start : own.stop], *others])
    return Gpus(visible, round(_USED_SHARE / num_users, 3) if num_users > 1 else 0.0)
