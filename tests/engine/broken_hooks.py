"""A process of a test: one half of the connector fails in a step that has somebody on trial. Prints what vLLM is told.

A process of its own, since importing vLLM changes the one that does.
"""

from __future__ import annotations

import json
from typing import Any

from core.layout import KVLayout
from engine.connector import BatonConnector
from engine.settings import ConnectorSettings
from engine.steps import StepOrders
from engine.worker_side import WorkerSide
from kvcache.arena import WHOLE
from kvcache.orders import CacheOrders, Load, Piece

LAYOUT = KVLayout("model", "float32", 2, 1, 16, 16, 2048, "LBHNC", "vec")


class BrokenScheduler:
    """Its orders cannot be made."""

    def orders(self, scheduled: object) -> None:
        raise RuntimeError("a mistake of ours")

    def blocks_on_trial(self) -> list[int]:
        return [3, 4]


class BrokenHalf:
    """It fails before the cache's half has begun."""

    def begin_step(self, orders: object) -> None:
        raise RuntimeError("a mistake of ours")


def hooks(**halves: Any) -> BatonConnector:
    """The connector as vLLM calls it, with one of its halves."""
    made = BatonConnector.__new__(BatonConnector)
    for name, half in halves.items():
        setattr(made, name, half)
    return made


def main() -> None:
    worker = WorkerSide(ConnectorSettings(transport="zmq"), LAYOUT, WHOLE)
    beside = hooks(_worker=worker)
    told: dict[str, list[int]] = {}

    beside.bind_connector_metadata(hooks(_scheduler=BrokenScheduler()).build_connector_meta(object()))
    beside.get_transfer_results(set())
    told["no orders"] = sorted(beside.get_block_ids_with_load_errors())

    beside.bind_connector_metadata(StepOrders())
    told["the step after it"] = sorted(beside.get_block_ids_with_load_errors())

    vars(worker)["_pusher"] = vars(worker)["_lander"] = BrokenHalf()
    load = Load("r", "arena", [Piece(7, 0, b"key"), Piece(9, 0, b"key")], in_step=True)
    beside.bind_connector_metadata(StepOrders(cache=CacheOrders(loads=[load])))
    told["not begun"] = sorted(beside.get_block_ids_with_load_errors())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
