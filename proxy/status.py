"""`/status`: the instances in short, and by which measured path each prefill instance reaches each decode instance.
Tensor-parallel ranks have paths of their own: a pair is one of each side's ranks.

The instances say it in their heartbeats (core/path.py). A path to an instance that has been started anew is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from core.path import Path, PathState
from proxy.registry import Instance, Registry


def status(registry: Registry, queue_length: int) -> dict[str, Any]:
    """As JSON."""
    instances = registry.all()
    return {
        "queue": queue_length,
        "instances": [
            {
                "name": each.name,
                "role": each.role.value,
                "state": each.state.value,
                "transports": each.info.transports,
                "serving": each.serving,
                "handoffs": each.handoffs,
            }
            for each in instances
        ],
        "pairs": [_pair(sender, paths) for sender, paths in _pairs(instances)],
    }


def _pairs(instances: Sequence[Instance]) -> Iterator[tuple[Instance, list[Path]]]:
    boot_ids = {each.info.boot_id for each in instances}
    for sender in instances:
        by_ranks: dict[tuple[str, int, int], list[Path]] = {}
        for path in sender.info.paths:
            if path.boot_id in boot_ids:
                by_ranks.setdefault((path.boot_id, path.sender_rank, path.receiver_rank), []).append(path)
        for paths in by_ranks.values():
            yield sender, paths


def _pair(sender: Instance, paths: list[Path]) -> dict[str, Any]:
    chosen = next((path for path in paths if path.state is PathState.CHOSEN), None)
    return {
        "prefill": sender.name,
        "decode": paths[0].peer,
        "ranks": [paths[0].sender_rank, paths[0].receiver_rank],
        "transport": chosen.transport if chosen else None,
        "why": chosen.why if chosen else "",
        "paths": [
            {
                "transport": path.transport,
                "state": path.state.value,
                "write_gb_per_s": round(path.write_gb_per_s, 3),
                "read_gb_per_s": round(path.read_gb_per_s, 3),
                "latency_us": round(path.latency_us, 1),
                "failures": path.num_failures,
                "why": path.why,
            }
            for path in paths
        ],
    }


class PathMetrics:
    """Gauges that are set when someone asks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        pair = ["prefill", "decode", "ranks", "transport"]
        self._chosen = Gauge("baton_path_chosen", "1 for the transport that hand-offs take", pair, registry=registry)
        self._gb_per_s = Gauge(
            "baton_path_gb_per_s", "Measured by the last probe", [*pair, "direction"], registry=registry
        )
        self._failures = Gauge(
            "baton_path_failures", "Times that a path has failed since the pair is known", pair, registry=registry
        )

    def set(self, instances: Sequence[Instance]) -> None:
        """What the instances said last."""
        for gauge in (self._chosen, self._gb_per_s, self._failures):
            gauge.clear()
        for sender, paths in _pairs(instances):
            for path in paths:
                labels = (sender.name, path.peer, f"{path.sender_rank}-{path.receiver_rank}", path.transport)
                self._chosen.labels(*labels).set(path.state is PathState.CHOSEN)
                self._failures.labels(*labels).set(path.num_failures)
                self._gb_per_s.labels(*labels, "write").set(path.write_gb_per_s)
                self._gb_per_s.labels(*labels, "read").set(path.read_gb_per_s)
