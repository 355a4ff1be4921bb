"""A run's folder goes with its run, at the latest when the next one starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.runfolder import RunFolder, default_base, remove_stale
from core.errors import ConfigError

_HOLD = """
import sys
from pathlib import Path
from cluster.runfolder import RunFolder
folder = RunFolder.create(Path(sys.argv[1]))
(folder.path / "left.sock").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_living_folders_stay_and_those_of_killed_runs_go(tmp_path: Path) -> None:
    base = tmp_path / "base"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        path = Path(holder.stdout.readline().strip())
        assert (path / "left.sock").exists()
        assert remove_stale(base) == []
        holder.kill()
        holder.wait()
    mine = RunFolder.create(base)
    assert not path.exists()
    assert mine.path.exists()
    mine.remove()
    assert list(base.iterdir()) == []


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "base").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="not a folder of this user"):
        RunFolder.create(tmp_path / "base")


def test_the_folder_is_private_and_short_enough_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "long" * 20)
    base = default_base()
    assert len(str(base)) < 30
    folder = RunFolder.create(base)
    assert os.stat(base).st_mode & 0o077 == 0
    folder.remove()
