"""The key file: made once, for its owner alone; what is wrong with one is said with the remedy, never its content."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
import zmq

from core.errors import ConfigError
from transport.keys import Keys, make_keys, read_keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_a_new_file_is_its_owners_alone_and_no_two_are_equal(path: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    make_keys(tmp_path / "other")
    first, second = read_keys(path), read_keys(tmp_path / "other")
    secrets = {pair.secret for keys in (first, second) for pair in (keys.listener, keys.caller)}
    assert len(secrets) == 4
    assert first.signing_key() != second.signing_key()
    assert read_keys(path) == first


def test_no_umask_makes_it_readable_by_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def test_keys_are_shown_nowhere(path: Path) -> None:
    keys = read_keys(path)
    for shown in (repr(keys), str(keys), f"{keys.listener} {keys.caller}", repr([keys])):
        assert keys.listener.secret not in shown
        assert keys.caller.secret not in shown


def test_a_file_that_is_there_is_kept(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="is there already and is kept"):
        make_keys(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606, 0o660])
def test_a_file_that_others_may_use_is_refused_with_the_remedy(path: Path, mode: int) -> None:
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*: chmod 600 {path}"):
        read_keys(path)


def test_no_file_and_no_readable_file_are_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"make one with: baton keys "):
        read_keys(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot read the key file"):
        read_keys(tmp_path)
    with pytest.raises(ConfigError, match="cannot make the key file"):
        make_keys(tmp_path / "no" / "such" / "folder")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_keys(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_an_unreadable_file_is_said(path: Path) -> None:
    path.chmod(0o000)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_keys(path)


def test_another_file_and_a_damaged_one_are_refused_without_their_words(path: Path) -> None:
    keys = read_keys(path)
    swapped = Keys(msgspec.structs.replace(keys.listener, public=keys.caller.public), keys.caller)
    short = Keys(msgspec.structs.replace(keys.listener, secret="hunter2"), keys.caller)
    for content in (b"", b"-----BEGIN hunter2", b'{"listener": "hunter2"}', b"\xff\xfe", b"[" * 5000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is no key file of Baton's") as caught:
            read_keys(path)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None
    for damaged in (swapped, short):
        path.write_bytes(msgspec.json.encode(damaged))
        with pytest.raises(ConfigError, match="is damaged") as caught:
            read_keys(path)
        assert "hunter2" not in str(caught.value)


def test_a_libzmq_without_curve_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda feature: False)
    for use in (lambda: read_keys(path), lambda: make_keys(path.parent / "new")):
        with pytest.raises(ConfigError, match="built without CURVE"):
            use()
