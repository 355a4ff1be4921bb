"""Words between this instance's schedulers and its peers': who hears what, and what strangers are told.

    control plane ──▶ Accept, Decline, Cancel ──▶ Sender     Greeting ──▶ Acquaintances     the rest ──▶ Receiver

Threads: the control plane's thread delivers; `send` is for any thread.
"""

from __future__ import annotations

import uuid

from vllm.logger import init_logger

from core.errors import ProtocolError
from core.handoff import Peer
from core.layout import PROTOCOL_VERSION
from decode.receiver import Receiver
from engine.acquaintances import Acquaintances
from engine.settings import ConnectorSettings
from prefill.sender import Sender
from transport.control import Callbacks, ControlPlane, Identity
from transport.messages import Accept, Cancel, Decline, Envelope, Greeting, Message, Refused, decode_body

_log = init_logger("vllm.baton")


class Correspondence:
    """One instance's control plane. Until `introduce`, nobody knows of us, and what comes is dropped."""

    def __init__(self, settings: ConnectorSettings, fingerprint: str, num_ranks: int) -> None:
        self._fingerprint = fingerprint
        self._halves: tuple[Sender, Receiver] | None = None
        self._acquaintances: Acquaintances | None = None
        identity = Identity(settings.name, uuid.uuid4().hex, fingerprint, num_ranks)
        callbacks = Callbacks(self._on_envelope, self._on_peer_lost, self._on_tick)
        self._control = ControlPlane(settings.host, identity, callbacks, keys=settings.read_keys())
        self.me = self._control.peer

    def introduce(self, sender: Sender, receiver: Receiver, acquaintances: Acquaintances | None = None) -> None:
        """From now on these hear. Without acquaintances, greetings are not answered."""
        self._acquaintances = acquaintances
        self._halves = sender, receiver

    def send(self, peer: Peer, message: Message) -> bool:
        """Without waiting; False if it could not be queued."""
        try:
            return self._control.send(peer, message)
        except ProtocolError as error:
            _log.warning("%s", error)
            return False

    def close(self) -> None:
        """Ends the thread and every connection."""
        self._control.close()

    def _on_envelope(self, envelope: Envelope) -> None:
        if self._halves is None:
            return
        sender, receiver = self._halves
        if envelope.protocol != PROTOCOL_VERSION or envelope.fingerprint != self._fingerprint:
            self._on_stranger(envelope, sender, receiver)
            return
        message = decode_body(envelope)
        if isinstance(message, Greeting):
            if self._acquaintances is not None:
                self._acquaintances.on_greeting(envelope.sender, message)
        elif isinstance(message, Accept | Decline | Cancel):
            sender.on_message(envelope.sender, message)
        else:
            receiver.on_message(envelope.sender, message)

    def _on_stranger(self, envelope: Envelope, sender: Sender, receiver: Receiver) -> None:
        """A peer with another layout or protocol: the asking side is refused, and told why with both sides' values."""
        try:
            message = decode_body(envelope)
        except ProtocolError:
            message = None
        if isinstance(message, Refused):
            receiver.on_message(envelope.sender, message)
        elif message is None or isinstance(message, Accept):
            why = f"{self.me.name} speaks protocol {PROTOCOL_VERSION}, {envelope.sender.name} {envelope.protocol}"
            same = envelope.protocol == PROTOCOL_VERSION
            why = f"KV layouts of {self.me.name} and {envelope.sender.name} differ" if same else why
            sender.refuse(envelope.sender, envelope.handoff, why, with_layout=same)

    def _on_peer_lost(self, control: str) -> None:
        for half in self._halves or ():
            half.on_peer_lost(control)

    def _on_tick(self) -> None:
        for half in self._halves or ():
            half.tick()
        if self._acquaintances is not None:
            self._acquaintances.tick()
