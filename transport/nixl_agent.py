"""The edge to the NIXL library: one agent with one back end, its registered regions, and the agents of peers.

Memory model: a region's blocks are described to NIXL once (`_prepared`, one strided line per region, on this side and
once per peer), so that a write of n blocks hands over n numbers and no descriptors. Byte ranges inside blocks get a
descriptor list of their own. Everything is released in `close`, before the library's own object goes.
Threading: peers belong to the transport's thread. NIXL's own progress thread is off (it spins at 100 % for ever, also
when idle); whoever owns an agent calls `progress`. The library is told that one thread at a time calls it, and `_lock`
keeps it so; it gives up the interpreter's lock while it copies.
"""

from __future__ import annotations

import collections
import importlib
import importlib.metadata
import importlib.util
import ipaddress
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from core.errors import ConfigError, TransferError
from transport.base import Region, TransferState
from transport.regions import Span

_BUILDS = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
_REMEDY = "`scripts/setup transports` installs it, or: pip install nixl-cu13 && pip install --no-deps nixl"
_OWN_SIDE = ""
MAX_IDLE_PEERS = 64


class NixlOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `transport_options` may say for "nixl".

    backend: NIXL's name for it. parameters: for the back end as NIXL's plug-in reads them (UCX:
    ucx_error_handling_mode, num_workers, num_threads, engine_config). ucx: UCX's own variables without their prefix,
    for this agent alone; on a loopback host NET_DEVICES is lo unless this says otherwise. secret: equal on all
    instances that may join; descriptions that were made without it are refused.
    """

    backend: str = "UCX"
    parameters: dict[str, str] = {}
    ucx: dict[str, str] = {}
    secret: str = ""

    @classmethod
    def parse(cls, options: dict[str, Any]) -> NixlOptions:
        """Raises ConfigError naming the option that is wrong."""
        try:
            return msgspec.convert(options, cls)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise ConfigError(f"transport_options for nixl: {error}; known options: {known}") from error

    def of_backend(self, host: str) -> dict[str, str]:
        """The back end's parameters. Raises ConfigError for a value that cannot be passed on."""
        if self.backend != "UCX":
            return dict(self.parameters)
        ucx = ({"NET_DEVICES": "lo"} if _is_loopback(host) else {}) | self.ucx
        for name, value in ucx.items():
            if "," in value:
                raise ConfigError(
                    f"transport_options for nixl: NIXL cannot pass on a comma as in {name}={value}; "
                    f"set UCX_{name}={value} in the environment instead"
                )
        config = [f"{name}={value}" for name, value in ucx.items()]
        own = self.parameters.get("engine_config")
        return self.parameters | ({"engine_config": ",".join([own, *config] if own else config)} if config else {})


def why_missing() -> str:
    """Why the library cannot be used; empty if it is installed."""
    if importlib.util.find_spec("nixl") is None:
        return f"the package nixl is not installed: {_REMEDY}"
    if not any(importlib.util.find_spec(build) for build in _BUILDS):
        return f"the package nixl is installed, but none of its builds ({', '.join(_BUILDS)}): {_REMEDY}"
    return ""


def library_version() -> str:
    """As it is installed."""
    return importlib.metadata.version("nixl")


class Posting:
    """Copies that NIXL was asked for. Belongs to the agent that made it, and which its handle keeps in memory."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.state = TransferState.RUNNING


class NixlAgent:
    """Raises ConfigError if the library or the back end cannot be started."""

    def __init__(self, options: NixlOptions, host: str) -> None:
        self.name = secrets.token_hex(16)
        self._backend = options.backend
        self._lock = threading.Lock()
        self._library = _load()
        self._agent = self._make(options, options.of_backend(host))
        self._registered: list[Any] = []
        self._prepared: dict[int, Any] = {}
        self._peers: collections.OrderedDict[str, NixlPeer] = collections.OrderedDict()

    def register(self, region: Region) -> None:
        """Raises TransferError if the back end cannot take this memory."""
        num_bytes = (region.num_blocks - 1) * region.stride + region.block_bytes
        lines = [(region.address, num_bytes, region.device or 0, "")]
        with self._calling("register memory"):
            self._registered.append(self._agent.register_memory(lines, _kind(region), [self._backend]))

    def metadata(self) -> bytes:
        """What a peer's agent needs to write into the regions registered so far."""
        with self._calling("describe the agent"):
            return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes, name: str) -> NixlPeer | None:
        """Shared by all who ask for the same peer; None while a broken one is still being closed.

        Raises TransferError if NIXL refuses it. Only for metadata whose digest was checked.
        """
        peer = self._peers.get(name)
        if peer is not None:
            self._peers.move_to_end(name)
            return None if peer.is_broken else peer.shared()
        with self._calling("load the peer's agent"):
            try:
                loaded = self._agent.add_remote_agent(metadata)
            except self._library.errors:
                with suppress(*self._library.errors):  # what was loaded before the error would stay
                    self._agent.remove_remote_agent(name)
                raise
        found = loaded.decode() if isinstance(loaded, bytes) else str(loaded)
        peer = NixlPeer(self, found)
        if found != name:
            self.remove_peer(peer)
            raise TransferError(f"the peer's agent is {found!r}, described was {name!r}")
        self._peers[name] = peer
        idle = [each for each in self._peers.values() if each.is_idle()]
        for each in idle[: max(len(idle) - MAX_IDLE_PEERS, 0)]:
            self.remove_peer(each)
        return peer

    def remove_peer(self, peer: NixlPeer) -> None:
        """Disconnects. Its postings are done or abandoned before."""
        self._peers.pop(peer.name, None)
        for handle in peer.prepared.values():
            with suppress(TransferError), self._calling("release"):
                handle.release()
        peer.prepared.clear()
        with suppress(TransferError), self._calling("disconnect"):
            self._agent.remove_remote_agent(peer.name)

    def progress(self) -> list[bytes]:
        """Lets the back end work; notifications that came."""
        with self._calling("drive progress"):
            arrived = self._agent.get_new_notifs([self._backend])
        return [bytes(notice) for notices in arrived.values() for notice in notices]

    def advance(self, posting: Posting) -> TransferState:
        """Its state now; a DONE one is released. Raises TransferError if it failed."""
        if posting.state is TransferState.RUNNING:
            with self._calling("copy"):
                self._settle(posting, self._agent.check_xfer_state(posting.handle))
        return posting.state

    def abandon(self, posting: Posting) -> None:
        """Cancels it as far as the back end can; bytes under way may still arrive."""
        if posting.state is TransferState.RUNNING:
            posting.state = TransferState.FAILED
            with suppress(TransferError), self._calling("cancel"):
                self._agent.release_xfer_handle(posting.handle)
            posting.handle = None

    def close(self) -> None:
        """Releases everything."""
        for peer in list(self._peers.values()):
            self.remove_peer(peer)
        with self._lock:
            for handle in self._prepared.values():
                with suppress(*self._library.errors):
                    handle.release()
            self._prepared.clear()
            for registered in self._registered:
                with suppress(*self._library.errors):
                    self._agent.deregister_memory(registered, [self._backend])
            self._registered.clear()
            self._agent = None

    def _make(self, options: NixlOptions, parameters: dict[str, str]) -> Any:
        library = self._library
        try:
            config = library.api.nixl_agent_config(enable_prog_thread=False, backends=[])
            agent = library.api.nixl_agent(self.name, config)
            known = agent.get_plugin_list()
            if options.backend not in known:
                raise ConfigError(f"NIXL has no back end {options.backend!r} here; it has {', '.join(sorted(known))}")
            agent.create_backend(options.backend, parameters)
        except library.errors as error:
            raise ConfigError(
                f"NIXL cannot start its back end {options.backend} with {parameters or 'no parameters'}: {error}; "
                "what it printed above says more"
            ) from error
        return agent

    def _settle(self, posting: Posting, answer: str) -> None:
        if answer == "PROC":
            return
        posting.state = TransferState.DONE if answer == "DONE" else TransferState.FAILED
        self._agent.release_xfer_handle(posting.handle)
        posting.handle = None
        if posting.state is TransferState.FAILED:
            raise TransferError("NIXL could not copy: the transfer ended in an error")

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """One call at a time, with the library's errors translated."""
        with self._lock:
            if self._agent is None:
                raise TransferError("the NIXL agent is closed")
            try:
                yield
            except self._library.errors as error:
                raise TransferError(f"NIXL cannot {what}: {type(error).__name__} {error}") from error

    def _start(self, operation: str, peer: str, sides: list[Any]) -> Posting:
        """Under the lock. sides: prepared lists with numbers, or two descriptor lists."""
        make = self._agent.make_prepped_xfer if len(sides) == 4 else self._agent.initialize_xfer
        handle = make(operation, *sides, b"", [self._backend]) if len(sides) == 4 else make(operation, *sides, peer)
        posting = Posting(handle)
        self._settle(posting, self._agent.transfer(handle))
        return posting

    def _prepare(self, table: dict[int, Any], peer: str, region: Region) -> Any:
        """The region's blocks as NIXL knows them, described once. Under the lock."""
        if region.id not in table:
            line = [[region.address, region.block_bytes, region.device or 0, region.stride, region.num_blocks]]
            strided = self._library.numpy.array(line, dtype=self._library.numpy.uint64)
            table[region.id] = self._agent.prep_xfer_dlist(peer, strided, _kind(region), [self._backend])
        return table[region.id]

    def _descriptors(self, span: Span, ids: Sequence[int]) -> Any:
        """A list for one transfer. Under the lock."""
        numpy = self._library.numpy
        lines = numpy.empty((len(ids), 3), dtype=numpy.uint64)
        lines[:, 0] = numpy.asarray(ids, dtype=numpy.uint64) * span.region.stride + span.address(0)
        lines[:, 1], lines[:, 2] = span.num_bytes, span.region.device or 0
        return self._agent.get_xfer_descs(lines, _kind(span.region))


class NixlPeer:
    """Another process's agent, loaded here. Made by `NixlAgent.add_peer`; `close` is called by each of its users.

    A sound one stays loaded after its last user, for the next: UCX keeps its side of a closed connection in the other
    process until either process ends, so one connection per pair is made, and not one per endpoint.
    """

    def __init__(self, agent: NixlAgent, name: str) -> None:
        self._agent = agent
        self._num_users = 1
        self.name = name
        self.prepared: dict[int, Any] = {}
        self.is_broken = False

    def shared(self) -> NixlPeer:
        """For one user more."""
        self._num_users += 1
        return self

    def is_idle(self) -> bool:
        return self._num_users == 0

    def copy(
        self, operation: str, local: Span, local_ids: Sequence[int], remote: Span, remote_ids: Sequence[int]
    ) -> Posting:
        """WRITE or READ, pairwise. Raises TransferError if it cannot begin or has failed at once."""
        agent = self._agent
        with agent._calling("copy"):
            if not (_is_whole(local) and _is_whole(remote)):
                lists = [agent._descriptors(local, local_ids), agent._descriptors(remote, remote_ids)]
                return agent._start(operation, self.name, lists)
            numbers = agent._library.numpy
            here = agent._prepare(agent._prepared, _OWN_SIDE, local.region)
            there = agent._prepare(self.prepared, self.name, remote.region)
            first, second = (numbers.asarray(ids, dtype=numbers.int32) for ids in (local_ids, remote_ids))
            return agent._start(operation, self.name, [here, first, there, second])

    def notify(self, notice: bytes) -> None:
        """Sends a notification; progress must be driven until it is known to have arrived."""
        with self._agent._calling("notify"):
            self._agent._agent.send_notif(self.name, notice)

    def close(self) -> None:
        """Not used any more by this user. A broken one is disconnected by its last."""
        self._num_users -= 1
        if self.is_idle() and self.is_broken:
            self._agent.remove_peer(self)


class _Library:
    """The imported modules, and every error that they raise."""

    def __init__(self) -> None:
        self.api: Any = importlib.import_module("nixl._api")
        self.numpy: Any = importlib.import_module("numpy")
        bindings = importlib.import_module("nixl._bindings")
        own = [each for each in vars(bindings).values() if isinstance(each, type) and issubclass(each, Exception)]
        self.errors: tuple[type[Exception], ...] = (*own, RuntimeError, ValueError, TypeError)


def _load() -> _Library:
    why = why_missing()
    if why:
        raise ConfigError(why)
    try:
        library = _Library()
    except (ImportError, OSError) as error:
        raise ConfigError(f"NIXL is installed but cannot be loaded: {error}; {_REMEDY}") from error
    talkative = logging.getLogger("nixl")  # it tells everything twice, on standard output
    if talkative.level == logging.INFO:
        talkative.setLevel(logging.WARNING)
    return library


def _kind(region: Region) -> str:
    return "DRAM" if region.device is None else "VRAM"


def _is_whole(span: Span) -> bool:
    return span.start == 0 and span.num_bytes == span.region.block_bytes


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
