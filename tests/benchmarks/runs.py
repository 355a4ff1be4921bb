"""Runs made by hand, so that tables and statistics are tested on numbers that one can check in the head."""

from __future__ import annotations

from typing import Any

from benchmarks.machine import Machine
from benchmarks.memcpy import CopyTimes
from benchmarks.results import Copy, Run, Sample, handover_of, problem_of
from benchmarks.shapes import SHAPES
from benchmarks.systems import Recipe

NUM_BYTES = 100_000_000
MACHINE = Machine(
    cpu="AMD EPYC (family 23 model 1)",
    num_cores=2,
    cache_bytes=8 << 20,
    memory_bytes=24 << 30,
    kernel="6.1.0",
    python="3.11.7",
    torch="2.13.0+cpu",
    vllm="0.32.0",
    baton="0.1.0",
    load=0.05,
)


def record(tokens: dict[str, int] | None = None, transport: str = "shm", prompt_tokens: int = 2048) -> dict[str, Any]:
    """What the proxy says of a good hand-off: 10 ms inside the writes, 2.5 ms from the last layer to Landed."""
    counted = {"prompt": prompt_tokens, "handed_over": prompt_tokens - 1, "found_locally": 0, "computed": 1}
    return {
        "status": "done",
        "outcome": "landed",
        "path": {"prefill": "prefill-0", "decode": "decode-0", "transport": transport, "why": ""},
        "tokens": counted | (tokens or {}),
        "bytes": NUM_BYTES,
        "moments_ms": {
            "queued": 0.0,
            "accepted": 4.0,
            "moving": 50.0,
            "last_layer": 1047.5,
            "landed": 1050.0,
            "first_token": 1075.0,
        },
        "prefill": {
            "chunks": 1.0,
            "write_s": 0.010,
            "copy_s": 0.010 if transport == "shm" else 0.0,
            "digest_s": 0.001,
            "moments_ms": {"landed": 1049.0},
        },
        "decode": {"check_s": 0.0005},
    }


def sample(system: str, first_token_ms: float, repeat: int = 0, **given: Any) -> Sample:
    """Decode steps of 20 ms; a hand-off as in `record` unless the system is plain."""
    said = given.get("record") or (record(transport=system) if system != "plain" else {"status": "done"})
    return Sample(
        system=system,
        prompt_tokens=2048,
        repeat=repeat,
        first_token_ms=first_token_ms,
        gaps_ms=(20.0, 20.0, 21.0),
        handover=handover_of(said),
        problem=problem_of(said, "" if system == "plain" else system, 2048),
        record=said,
    )


def run(*samples: Sample) -> Run:
    """With a memcpy of 12.5 GB/s cold and 20 GB/s warm."""
    return Run(
        command="baton bench handoff --repeats 3",
        date="2026-02-03 04:05 UTC",
        machine=MACHINE,
        recipe=Recipe(SHAPES["qwen2.5-1.5b"], "bfloat16"),
        cores={"plain/decode-0": (0,), "shm/prefill-0": (0,), "shm/decode-0": (1,)},
        block_size=128,
        samples=samples,
        copies=(Copy(2048, 0, CopyTimes(NUM_BYTES, 0.008, 0.005, 0.0078)),),
    )


def good_run() -> Run:
    """Plain at 1000 ms, shm at 1015 ms and so within one step, zmq at 1040 ms."""
    return run(
        *(sample("plain", value, repeat) for repeat, value in enumerate((1000.0, 990.0, 1300.0))),
        *(sample("shm", value, repeat) for repeat, value in enumerate((1015.0, 1010.0, 1400.0))),
        *(sample("zmq", value, repeat) for repeat, value in enumerate((1040.0, 1030.0, 1400.0))),
    )
