"""The last words of a log are the reason, without vLLM's prefixes and tracebacks."""

from __future__ import annotations

from pathlib import Path

from cluster.logs import last_lines

_CRASH = """\
(APIServer pid=11) INFO 11-25 01:18:54 [api_utils.py:286] non-default args: {}
(EngineCore pid=12) ERROR 11-25 01:18:55 [core.py:1000] EngineCore failed to start.
(EngineCore pid=12) ERROR 11-25 01:18:55 [core.py:1000] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-25 01:18:55 [core.py:1000]   File "/somewhere/core.py", line 10, in run
(EngineCore pid=12) ERROR 11-25 01:18:55 [core.py:1000]     engine = make()
(EngineCore pid=12) ERROR 11-25 01:18:55 [core.py:1000] ValueError: the weights are missing
(EngineCore pid=12) ValueError: the weights are missing
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_shows_the_named_error_once_and_not_its_echo(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(_CRASH)
    assert last_lines(tmp_path / "log") == ["ValueError: the weights are missing"]


def test_shows_the_last_lines_where_no_error_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(40)))
    assert last_lines(tmp_path / "log", 3) == ["line 37", "line 38", "line 39"]


def test_shows_what_stands_below_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "usage\n(APIServer pid=1) x.ValidationError: 1 error\n(APIServer pid=1)   Value error, 5\nend"
    )
    assert last_lines(tmp_path / "log") == ["x.ValidationError: 1 error", "  Value error, 5"]


def test_a_missing_log_has_no_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none") == []
