"""`baton bench transfer --inside`: the hand-off of a running 1P1D over each transport, from the last layer to Landed.

It is `baton bench handoff` with one topology per transport that can run here and without plain vLLM: the same model,
prompts, memcpy and tables.
"""

from __future__ import annotations

import sys

from benchmarks import handoff
from benchmarks.machine import has_fast_bfloat16, read_cpuinfo, this_machine
from benchmarks.options import HandoffOptions, dtype_of
from benchmarks.publish import write_raw
from benchmarks.report import file_name, markdown
from benchmarks.shapes import SHAPES, shape_of
from benchmarks.systems import Recipe, System, running
from benchmarks.transfer_options import TransferOptions
from cluster.progress import Progress
from cluster.zygote import Zygote
from core.errors import ConfigError

_SHAPE = "qwen2.5-0.5b"
_PROMPTS = 512, 2048
_REPEATS = 5
_QUICK_PROMPTS = (256,)
_QUICK_REPEATS = 2


def run_inside(options: TransferOptions, command: str, zygote: Zygote | None = None) -> int:
    """0 when it was measured; 1 when a hand-off was not what it claims to be. zygote: to share, left running."""
    plan = hand_off_options(options)
    started = running(plan.systems, plan.recipe, Progress(sys.stderr), zygote)
    result = handoff.measured(plan, command, this_machine(), started)
    handoff.show(result)
    write_raw(result, options.out)
    if options.markdown is not None:
        path = file_name(result, options.markdown)
        path.write_text(markdown(result), encoding="utf-8")
        print(f"results file: {path}")
    return 1 if any(sample.problem for sample in result.samples) else 0


def hand_off_options(options: TransferOptions) -> HandoffOptions:
    """Raises ConfigError if no transport is left, or a model has no shape that an engine can be started with."""
    schemes = [system.name for system in options.systems if system.is_baton and not system.why_not]
    if not schemes:
        raise ConfigError("--inside measures Baton's transports, and --systems names none that can run here")
    names = [model.name for model in options.models if model.name in SHAPES]
    dtype = dtype_of("auto", has_fast_bfloat16(read_cpuinfo()))
    return HandoffOptions(
        recipe=Recipe(shape_of(names[0] if names else _SHAPE), dtype),
        prompts=_QUICK_PROMPTS if options.quick else _PROMPTS,
        repeats=options.sweep.repeats or (_QUICK_REPEATS if options.quick else _REPEATS),
        systems=tuple(System(scheme, "1P1D", scheme) for scheme in schemes),
    )
