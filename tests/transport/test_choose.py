"""Which transport joins two instances."""

from __future__ import annotations

import msgspec
import pytest

from core.errors import ConfigError, TransferError
from transport import schemes
from transport.choose import choose
from transport.schemes import make_transport
from transport.shm_wire import decode_description, encode_description


def test_an_unknown_scheme_is_a_config_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'smoke' is unknown; known are shm, zmq"):
        make_transport("smoke", "127.0.0.1")


def test_the_first_offer_that_reaches_us_is_chosen() -> None:
    shm, zmq = make_transport("shm", ""), make_transport("zmq", "127.0.0.1")
    own = {"shm": shm, "zmq": zmq}
    here = shm.describe()
    elsewhere = encode_description(msgspec.structs.replace(decode_description(here), host_id="other"))
    assert choose([("shm", here), ("zmq", b"z")], own) == ("shm", here)
    assert choose([("shm", elsewhere), ("zmq", b"z")], own) == ("zmq", b"z")
    assert choose([("shm", b"garbage"), ("zmq", b"z")], own) == ("zmq", b"z")
    assert choose([("shm", here), ("zmq", b"z")], own, pinned="zmq") == ("zmq", b"z")
    assert choose([("ucx", b"u"), ("zmq", b"z")], own) == ("zmq", b"z")
    with pytest.raises(TransferError, match="offered ucx, shm; ours zmq"):
        choose([("ucx", b"u"), ("shm", here)], {"zmq": zmq})
    with pytest.raises(TransferError, match="only shm is wanted"):
        choose([("zmq", b"z")], own, pinned="shm")
    for transport in (shm, zmq):
        transport.close()


def test_two_copies_of_ucx_never_come_into_one_process_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL has one of its own. Beside it, in the process of a whole test run, UCX has crashed."""
    monkeypatch.setattr(schemes, "has_fast_hardware", lambda: True)
    wanted = schemes.wanted_schemes("auto")
    assert not {"nixl", "ucx"} <= set(wanted)
    if not schemes.unavailable("nixl"):
        assert "nixl" in wanted
