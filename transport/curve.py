"""CURVE for ZMQ sockets: mutual, by the cluster's keys (transport/keys.py); nothing changes where there are none.

    caller ── knows the listener's public key: nobody else can answer ──▶ listener
    listener ── asks the Doorkeeper: only the cluster's caller key gets in (ZAP, RFC 27) ── no message before that

libzmq asks on inproc://zeromq.zap.01 of the socket's own context, and waits for the answer without holding up others.

Memory and threading: the Doorkeeper's socket belongs to the thread that polls it; questions are small and come from
libzmq alone.
"""

from __future__ import annotations

import hmac

import zmq
from zmq.utils import z85

from transport.keys import Keys

ZAP_ADDRESS = "inproc://zeromq.zap.01"
_DOMAIN = b"baton"
_VERSION = b"1.0"
_MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
_NUM_PARTS = 9


def secure_listener(socket: zmq.Socket[bytes], keys: Keys | None) -> None:
    """Before it is bound, and behind a Doorkeeper of the same context: without one libzmq lets everybody in."""
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.listener.secret.encode())
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)


def secure_caller(socket: zmq.Socket[bytes], keys: Keys | None) -> None:
    """Before it is connected."""
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.listener.public.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.caller.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.caller.secret.encode())


def why_refused(kind: int, value: int, keys: Keys | None) -> str:
    """Cause and remedy of a handshake that failed, as its monitor tells it (transport/monitor.py)."""
    if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MISMATCH:
        if keys is None:
            return "it is encrypted and this process is not: give both the same --keys"
        return "it is not encrypted and this process is: give both the same --keys"
    if kind == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:  # its own refusal may overtake its greeting
        state = "is not" if keys is None else "is"
        return f"it hung up in the handshake, and this process {state} encrypted: give both the same --keys, or neither"
    if keys is not None:
        return "it has other keys than this process: give both the same --keys"
    return "it does not speak ZMQ's protocol"


class Doorkeeper:
    """Answers libzmq's questions about who may come in, for one context. `socket` is to be polled."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        self._admitted = z85.decode(keys.caller.public.encode())
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ADDRESS)

    def answer(self) -> None:
        """Every question that waits."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) >= 4:
                self._reply(parts)

    def close(self) -> None:
        """After the sockets that it stands before."""
        self.socket.close(0)

    def _reply(self, parts: list[bytes]) -> None:
        """[asker, empty, version, question, domain, address, identity, mechanism, public key]"""
        is_known = (
            len(parts) == _NUM_PARTS
            and parts[2] == _VERSION
            and parts[7] == b"CURVE"
            and hmac.compare_digest(parts[8], self._admitted)
        )
        status = [b"200", b"", b"cluster", b""] if is_known else [b"400", b"not of this cluster", b"", b""]
        self.socket.send_multipart([parts[0], b"", _VERSION, parts[3], *status], zmq.NOBLOCK)
