"""`baton cache warm`: files in, contexts made, a line each, and an exit code that says if one failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton import main
from tests.proxy.place import Place

A, B = "alpha. " * 10, "beta, " * 10


def warm(place: Place, *arguments: object) -> int:
    return main(["cache", "warm", *map(str, arguments), "--url", place.fleet.url])


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton._listen_to_signals", lambda: None)


def test_each_file_and_each_line_becomes_a_context(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, lines, key = tmp_path / "alpha.txt", tmp_path / "more.jsonl", tmp_path / "key"
    text.write_text(A)
    messages = [{"role": "user", "content": B}]
    lines.write_text(f"{json.dumps({'messages': messages, 'name': 'b', 'ttl_s': 60})}\n\n{json.dumps({'text': B})}\n")
    key.write_text("sk-one\n")
    assert warm(place, text, lines, "--ttl-s", 600, "--pin", "--endpoint", "chat", "--api-key-file", key) == 0
    headers = {"Authorization": "Bearer sk-one"}
    first, second, third = place.fleet.client.get("/v1/contexts", headers=headers).json()["data"]
    assert (first["name"], first["endpoint"], first["pinned"]) == ("alpha.txt", "chat", True)
    assert (second["name"], second["kind"]) == ("b", "messages")
    assert (first["expires_at"] - first["created_at"], second["expires_at"] - second["created_at"]) == (600, 60)
    assert (third["name"], third["endpoint"]) == (None, "completion")
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"[1/3] alpha.txt {first['id']}: {first['tokens']:,} tokens, {first['blocks']} blocks")
    assert [line.split()[0] for line in shown] == ["[1/3]", "[2/3]", "[3/3]"]


def test_one_that_fails_is_said_and_does_not_stop_the_others(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    asked = [{"text": A, "name": "n"}, {"text": B, "name": "n"}, {"text": B, "ttl": 3}, {"text": B, "name": "m"}]
    lines.write_text("\n".join(map(json.dumps, asked)))
    assert warm(place, lines) == 1
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert "[2/4] n failed: ctx-" in shown.err
    assert "[3/4] failed: unknown field 'ttl'; did you mean ttl_s?" in shown.err
    assert [context["name"] for context in place.fleet.client.get("/v1/contexts").json()["data"]] == ["n", "m"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "cannot read"),
        ("empty.txt", " \n", "is empty"),
        ("bad.jsonl", '{"text": "a"}\n{"text": }\n', "bad.jsonl, line 2 is not JSON"),
        ("list.jsonl", "[1]\n", "line 1 must be an object"),
        ("latin.txt", b"\xe9", "cannot read"),
    ],
)
def test_a_file_that_is_no_good_is_one_line_before_anything_is_sent(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, said: str
) -> None:
    good = tmp_path / "good.txt"
    good.write_text(A)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert warm(place, good, path) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) == 1
    assert place.prefill.generations() == []


def test_without_a_file_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "warm"]) == 2
    assert "FILE" in capsys.readouterr().err
