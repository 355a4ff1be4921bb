"""The proxy's Prometheus metrics. Label values are bounded: a reason counts by its word before the colon."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from core.handoff import Role
from core.report import FromCache, Report
from proxy.status import PathMetrics

_MAX_LABELS = 64
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,48}")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


_SOURCES = ("handed_over", "found_locally", "from_cache", "computed")


def tokens_from_cache(report: Report) -> int:
    """Of the prompt, from all tiers of the KV cache together."""
    return sum(part.tokens for part in report.from_cache)


def _by_source(report: Report) -> dict[str, int]:
    counts = (report.handed_over, report.found_locally, tokens_from_cache(report), report.computed)
    return dict(zip(_SOURCES, counts, strict=True))


class Metrics:
    """One proxy's metrics in a registry of their own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.requests = Counter(
            "baton_requests", "Requests by path and how they ended", ["path", "status"], registry=reg
        )
        self.first_token_s = Histogram(
            "baton_time_to_first_token_seconds", "Streamed requests only", buckets=_SECONDS, registry=reg
        )
        self.queue_wait_s = Histogram(
            "baton_queue_wait_seconds", "From arrival to being routed", buckets=_SECONDS, registry=reg
        )
        self.load = _Load(reg)
        self.paths = PathMetrics(reg)
        self._handoffs = _Handoffs(reg)
        self._cache = _Cache(reg)

    def not_handed_off(self, why: str) -> None:
        self._handoffs.skipped.labels(self._handoffs.word(why)).inc()

    def fell_back(self, why: str) -> None:
        self._handoffs.fallbacks.labels(self._handoffs.word(why)).inc()

    def decode_report(self, report: Report, old: Report | None) -> None:
        """Counts what the decode side says. A later report of the same request adds only what is new in it."""
        counted, before = _by_source(report), _by_source(old) if old else {}
        for source, tokens in counted.items():
            self._handoffs.tokens.labels(source).inc(max(0, tokens - before.get(source, 0)))
        for part in report.from_cache[len(old.from_cache) if old else 0 :]:
            tier = self._handoffs.word(part.tier)
            self._cache.count(tier, part)
        more_bytes = report.num_bytes - (old.num_bytes if old else 0)
        if more_bytes > 0:
            self._handoffs.num_bytes.labels(self._handoffs.word(report.transport)).inc(more_bytes)
        if report.outcome == "fell_back" and (old is None or old.outcome != "fell_back"):
            self.fell_back(report.why)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Handoffs:
    """Counters about hand-offs, and the words they are labelled with."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._words: set[str] = set()
        self.tokens = Counter(
            "baton_tokens", "Prompt tokens by where their KV cache came from", ["source"], registry=registry
        )
        self.num_bytes = Counter(
            "baton_handoff_bytes", "Bytes of KV cache that arrived", ["transport"], registry=registry
        )
        self.fallbacks = Counter(
            "baton_fallbacks", "Hand-offs after which the decode side computed the prompt", ["why"], registry=registry
        )
        self.skipped = Counter(
            "baton_not_handed_off", "Requests for which no hand-off was tried", ["why"], registry=registry
        )
        for source in _SOURCES:
            self.tokens.labels(source)

    def word(self, text: str) -> str:
        """The word before the colon if it is one, as long as there are not too many different ones."""
        word = text.partition(":")[0].strip().replace(" ", "_")
        if not _WORD.fullmatch(word) or (word not in self._words and len(self._words) >= _MAX_LABELS):
            return "other" if word else "none"
        self._words.add(word)
        return word


class _Cache:
    """What requests got from the KV cache, by tier."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tokens = Counter("baton_cache_tokens", "Prompt tokens loaded, by tier", ["tier"], registry=registry)
        self._num_bytes = Counter("baton_cache_bytes", "Bytes loaded, by tier", ["tier"], registry=registry)
        self._seconds = Histogram(
            "baton_cache_load_seconds", "One request's load", ["tier"], buckets=_SECONDS, registry=registry
        )
        self._saved_s = Counter(
            "baton_cache_saved_seconds", "Prefill not computed, less the loads", ["tier"], registry=registry
        )

    def count(self, tier: str, part: FromCache) -> None:
        self._tokens.labels(tier).inc(part.tokens)
        self._num_bytes.labels(tier).inc(part.num_bytes)
        self._seconds.labels(tier).observe(part.seconds)
        self._saved_s.labels(tier).inc(max(part.saved_s, 0.0))


class _Load:
    """Gauges that are set when someone asks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.queue = Gauge("baton_queue_length", "Requests that wait in the proxy", registry=registry)
        self.handoffs = Gauge(
            "baton_outstanding_handoffs", "Hand-offs under way, by prefill instance", ["instance"], registry=registry
        )
        self.cache = Gauge(
            "baton_cache_server",
            "Of the host's cache server, by the names of baton cache stats: bytes in use, evictions by reason, ...",
            ["figure"],
            registry=registry,
        )
        self.instances = Gauge("baton_instances", "Instances by role and state", ["role", "state"], registry=registry)

    def set_cache(self, figures: dict[str, float]) -> None:
        """What the host's cache server says of itself; nothing where it does not answer."""
        self.cache.clear()
        for name, value in figures.items():
            self.cache.labels(name).set(value)

    def set_instances(self, counts: dict[tuple[Role, str], int], handoffs: dict[str, int]) -> None:
        self.instances.clear()
        self.handoffs.clear()
        for (role, state), number in counts.items():
            self.instances.labels(role.value, state).set(number)
        for name, number in handoffs.items():
            self.handoffs.labels(name).set(number)
