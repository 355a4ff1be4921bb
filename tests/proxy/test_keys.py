"""With keys only their holders may register an instance; without, nobody is asked. Both sides say what is wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from core.errors import ConfigError, ProtocolError
from core.handoff import Role
from core.topology import Heartbeat, InstanceInfo
from proxy.settings import Settings
from tests.proxy.fleet import Fleet, running, until
from transport import join
from transport.join import JoinThread, check_keys
from transport.keys import Keys, make_keys, read_keys
from transport.signature import HEADER, MAX_AGE_S, check_signature, sign

INFO = InstanceInfo("decode-0", Role.DECODE, "http://127.0.0.1:1", boot_id="b")
BODY = msgspec.json.encode(Heartbeat(INFO))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    make_keys(tmp_path / "keys")
    return read_keys(tmp_path / "keys")


@pytest.fixture
def guarded(keys: Keys, tmp_path: Path) -> Iterator[Fleet]:
    with running(Settings(keys=str(tmp_path / "keys"))) as fleet:
        yield fleet


@pytest.fixture
def other_keys(tmp_path: Path) -> Keys:
    make_keys(tmp_path / "other")
    return read_keys(tmp_path / "other")


def test_an_instance_with_the_keys_joins_and_others_do_not_and_are_told_why(
    guarded: Fleet, keys: Keys, other_keys: Keys, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "HEARTBEAT_INTERVAL_S", 0.05)
    url = str(guarded.client.base_url)
    for used, said in ((None, "the instance has none"), (other_keys, "other keys than the proxy")):
        with caplog.at_level(logging.WARNING):
            thread = JoinThread(url, lambda: INFO, used)
            until(lambda said=said: said in caplog.text, "the instance says why")  # type: ignore[misc]
            thread.close(leaving=False)
        assert "--keys" in caplog.text
        assert "refused an instance at 127.0.0.1: " in caplog.text, "the proxy says so as well"
        assert guarded.client.get("/instances").json()["instances"] == []
        caplog.clear()
        with pytest.raises(ConfigError, match=f"refuses this instance: .*{said}"):
            check_keys(url, used)
    check_keys(url, keys)
    thread = JoinThread(url, lambda: INFO, keys)
    until(lambda: guarded.client.get("/instances").json()["instances"], "it has joined")
    thread.close()


def test_a_proxy_without_keys_refuses_an_instance_that_has_some(fleet: Fleet, keys: Keys) -> None:
    answer = fleet.client.post("/instances", content=BODY, headers={HEADER: sign(keys, BODY, time.time())})
    assert answer.status_code == 403
    assert "the proxy has none: start the proxy with the same --keys" in answer.json()["error"]["message"]


def test_a_signature_is_for_one_body_and_not_for_ever(keys: Keys) -> None:
    now_s = 1_800_000_000.0
    header = sign(keys, BODY, now_s)
    check_signature(keys, header, BODY, now_s + MAX_AGE_S - 1)
    for bad, body, at_s, why in (
        (header, BODY + b" ", now_s, "other keys"),
        (header, BODY, now_s + MAX_AGE_S + 2, "set both hosts' clocks"),
        (header, BODY, now_s - MAX_AGE_S - 2, "set both hosts' clocks"),
        (f"{now_s + 9:.0f}.{header.partition('.')[2]}", BODY, now_s, "other keys"),
        ("", BODY, now_s, "other keys"),
        ("nan.", BODY, now_s, "other keys"),
        ("é.é", BODY, now_s, "other keys"),
        (None, BODY, now_s, "the instance has none"),
    ):
        with pytest.raises(ProtocolError, match=why):
            check_signature(keys, bad, body, at_s)


def test_a_key_file_that_others_may_read_ends_the_start(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "keys").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"), running(Settings(keys=str(tmp_path / "keys"))):
        pass
