"""From samples to rows and a verdict: medians, differences to plain vLLM, and shares of a memcpy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from benchmarks.results import Copy, Handover, Run, Sample

SHARE_OF_MEMCPY = 0.8
TAIL_MS = 3.0
STEPS_OVER_PLAIN = 1.0

_LAST_PARTS = ("computed_to_landed_ms", "sent_to_landed_ms")


class Yard(msgspec.Struct, frozen=True):
    """GB/s of the memcpys of one prompt length."""

    num_bytes: int
    cold: float
    warm: float
    run: float


class Row(msgspec.Struct, frozen=True):
    """One system at one prompt length; None: not measured, or not applicable.

    gb_per_s: of one copying thread of the prefill worker; share: of the cold memcpy, share_warm: of the warm one.
    window_gb_per_s: from the first write to Landed, with the computation in between.
    tail_ms: from P's last layer to Landed; computed_tail_ms, sent_tail_ms, check_ms: its last parts. The rest: see
        benchmarks.results.Handover.
    """

    system: str
    prompt_tokens: int
    num_valid: int
    num_samples: int
    first_token_ms: float | None = None
    first_token_min_ms: float | None = None
    step_ms: float | None = None
    over_ms: float | None = None
    over_steps: float | None = None
    num_bytes: int | None = None
    gb_per_s: float | None = None
    share: float | None = None
    share_warm: float | None = None
    window_gb_per_s: float | None = None
    tail_ms: float | None = None
    tail_p90_ms: float | None = None
    computed_tail_ms: float | None = None
    sent_tail_ms: float | None = None
    check_ms: float | None = None
    landed_to_first_ms: float | None = None
    write_ms: float | None = None
    digest_ms: float | None = None

    @property
    def is_valid(self) -> bool:
        """A row with one sample that is not what it claims does not count."""
        return self.num_samples > 0 and self.num_valid == self.num_samples


class Finding(msgspec.Struct, frozen=True):
    """One expectation and what became of it; met is None where it could not be measured."""

    text: str
    met: bool | None


def rows_of(run: Run) -> list[Row]:
    """By prompt length, then in the order in which systems were first asked."""
    systems = list(dict.fromkeys(sample.system for sample in run.samples))
    result = []
    for tokens in dict.fromkeys(sample.prompt_tokens for sample in run.samples):
        samples = [sample for sample in run.samples if sample.prompt_tokens == tokens]
        yard = yard_of(run.copies, tokens)
        plain = [sample for sample in samples if sample.system == "plain" and not sample.problem]
        result += [_row(name, [sample for sample in samples if sample.system == name], plain, yard) for name in systems]
    return result


def yard_of(copies: Iterable[Copy], prompt_tokens: int) -> Yard | None:
    """None where nothing was handed over, so nothing was compared."""
    times = [copy.times for copy in copies if copy.prompt_tokens == prompt_tokens]
    if not times:
        return None
    num_bytes = times[0].num_bytes
    cold, warm, run = ([getattr(each, kind) for each in times] for kind in ("cold_s", "warm_s", "run_s"))
    return Yard(num_bytes, *(num_bytes / statistics.median(seconds) / 1e9 for seconds in (cold, warm, run)))


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours: percentile(x, 0.5) is the median."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def findings_of(rows: Sequence[Row]) -> list[Finding]:
    """What issue 3 expects, over all prompt lengths; only shm has expectations."""
    found = [Finding(f"not valid: {row.system}, {row.prompt_tokens} tokens", False) for row in rows if not row.is_valid]
    shm = [row for row in rows if row.system == "shm"]
    if not shm:
        return found
    share = [(row.prompt_tokens, row.share) for row in shm if row.share is not None]
    tail = [(row.prompt_tokens, row.tail_ms) for row in shm if row.tail_ms is not None]
    steps = [(row.prompt_tokens, row.over_steps) for row in shm if row.over_steps is not None]
    return [
        *found,
        _finding(f"shm writes at {SHARE_OF_MEMCPY} of a memcpy or more", share, lambda value: value >= SHARE_OF_MEMCPY),
        _finding(f"under {TAIL_MS:.0f} ms from P's last layer to Landed", tail, lambda value: value < TAIL_MS),
        _finding("first token within one decode step of plain vLLM's", steps, lambda value: value <= STEPS_OVER_PLAIN),
    ]


def _finding(text: str, values: Sequence[tuple[int, float]], is_met: Callable[[float], bool]) -> Finding:
    if not values:
        return Finding(f"{text}: not measured", None)
    shown = ", ".join(f"{value:.2f} at {tokens}" for tokens, value in values)
    return Finding(f"{text}: {shown}", all(is_met(value) for _, value in values))


def _row(system: str, samples: Sequence[Sample], plain: Sequence[Sample], yard: Yard | None) -> Row:
    valid = [sample for sample in samples if not sample.problem]
    row = Row(system, samples[0].prompt_tokens, len(valid), len(samples))
    if not valid:
        return row
    first = statistics.median(sample.first_token_ms for sample in valid)
    row = msgspec.structs.replace(
        row,
        first_token_ms=first,
        first_token_min_ms=min(sample.first_token_ms for sample in valid),
        step_ms=_step_ms(valid),
    )
    if plain and system != "plain":
        over = first - statistics.median(sample.first_token_ms for sample in plain)
        row = msgspec.structs.replace(row, over_ms=over, over_steps=over / _step_ms(plain))
    handovers = [sample.handover for sample in valid if sample.handover is not None]
    return _with_handovers(row, handovers, yard) if handovers else row


def _with_handovers(row: Row, handovers: Sequence[Handover], yard: Yard | None) -> Row:
    num_bytes = handovers[0].num_bytes
    window_ms = statistics.median(each.moving_to_landed_ms for each in handovers)
    tails = [each.last_layer_to_landed_ms for each in handovers if each.last_layer_to_landed_ms is not None]
    computed, sent = ([getattr(each, name) for each in handovers] for name in _LAST_PARTS)
    row = msgspec.structs.replace(
        row,
        num_bytes=num_bytes,
        window_gb_per_s=num_bytes / window_ms / 1e6,
        tail_ms=_median(tails),
        tail_p90_ms=percentile(tails, 0.9) if tails else None,
        computed_tail_ms=_median(computed),
        sent_tail_ms=_median(sent),
        check_ms=statistics.median(each.check_ms for each in handovers),
        landed_to_first_ms=statistics.median(each.landed_to_first_ms for each in handovers),
        write_ms=statistics.median(each.write_ms for each in handovers),
        digest_ms=_median(each.digest_ms for each in handovers),
    )
    copy_ms = statistics.median(each.copy_ms for each in handovers)
    if copy_ms <= 0:
        return row
    rate = num_bytes / copy_ms / 1e6
    row = msgspec.structs.replace(row, gb_per_s=rate)
    return msgspec.structs.replace(row, share=rate / yard.cold, share_warm=rate / yard.warm) if yard else row


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _step_ms(samples: Sequence[Sample]) -> float:
    """One decode step: the median gap between two tokens."""
    return statistics.median(gap for sample in samples for gap in sample.gaps_ms)
