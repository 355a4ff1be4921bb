"""The life of a hand-off is a table: every state reaches `released`, and the drawing in the docs is the table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from core.errors import ProtocolError
from transport.handoff import RECEIVING, SENDING, Event, Receiving, Sending, advance_receiving, advance_sending, allows

ROOT = Path(__file__).parents[2]


Table = dict[Any, dict[Event, Any]]


def _reachable(table: Table, start: Any) -> set[Any]:
    seen, todo = {start}, [start]
    while todo:
        for after in table[todo.pop()].values():
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return seen


@pytest.mark.parametrize("table", [SENDING, RECEIVING], ids=["sending", "receiving"])
def test_every_state_is_reached_from_new_and_reaches_released(table: Table) -> None:
    states: Any = type(next(iter(table)))
    assert _reachable(table, states.NEW) == set(states)
    for state in states:
        assert states.RELEASED in _reachable(table, state), f"{state} never ends"


@pytest.mark.parametrize("table", [SENDING, RECEIVING], ids=["sending", "receiving"])
def test_no_state_is_left_twice_on_one_path(table: Table) -> None:
    """No cycles: a hand-off ends after finitely many events, whatever they are."""
    states = type(next(iter(table)))
    for state in states:
        for after in table[state].values():
            assert state not in _reachable(table, after)


def test_a_state_that_holds_blocks_can_always_end_without_the_peer() -> None:
    """Deadline or the peer's death is seen in every state in which the engine waits for a peer."""
    for state in (Sending.ASKED, Sending.OFFERED, Sending.ACCEPTED, Sending.MOVING):
        assert allows(state, Event.DEADLINE)
        assert allows(state, Event.PEER_LOST)
    assert allows(Receiving.RESERVED, Event.DEADLINE)
    assert allows(Receiving.RESERVED, Event.PEER_LOST)
    assert allows(Receiving.REVOKING, Event.FENCED)


def test_blocks_go_back_only_behind_the_fence() -> None:
    """From RESERVED or REVOKING there is no way to released but through CHECKED or a promise that no write follows."""
    before_report = {state for state, moves in RECEIVING.items() if Event.REPORTED in moves}
    assert before_report == {Receiving.RECEIVED, Receiving.LOST}
    ways_into_lost = {e for moves in RECEIVING.values() for e, after in moves.items() if after is Receiving.LOST}
    promises = {Event.REFUSE, Event.ABORT, Event.CANCELLED, Event.LANDED, Event.FENCED, Event.BAD}
    assert ways_into_lost == promises


def test_an_impossible_move_names_state_and_event() -> None:
    with pytest.raises(ProtocolError, match="released cannot see accept"):
        advance_sending(Sending.RELEASED, Event.ACCEPT)
    with pytest.raises(ProtocolError, match="new cannot see landed"):
        advance_receiving(Receiving.NEW, Event.LANDED)


def draw() -> str:
    """docs/handoff.md, from the tables."""
    lines = [
        "# The life of a hand-off",
        "",
        "Drawn from `transport/handoff.py` by `tests/handoff/test_table.py`; do not edit. `BATON_DRAW=1` renews it.",
    ]
    tables: tuple[tuple[str, Table], ...] = (
        ("The prefill side sends", SENDING),
        ("The decode side receives", RECEIVING),
    )
    for title, table in tables:
        lines += ["", f"## {title}", "", "```mermaid", "stateDiagram-v2"]
        for state, moves in table.items():
            by_target: dict[str, list[str]] = {}
            for event, after in moves.items():
                by_target.setdefault(after.value, []).append(event.value)
            lines += [f"    {state.value} --> {after}: {', '.join(events)}" for after, events in by_target.items()]
        lines.append("```")
    return "\n".join(lines) + "\n"


def test_the_drawing_in_the_docs_is_the_table() -> None:
    path = ROOT / "docs" / "handoff.md"
    if os.environ.get("BATON_DRAW"):
        path.write_text(draw())
    assert path.read_text() == draw()
