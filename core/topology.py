"""xPyD, and what an instance says about itself when it joins."""

from __future__ import annotations

import re

import msgspec

from core.errors import ConfigError
from core.handoff import Peer, Role
from core.path import Path
from core.report import Report


class Topology(msgspec.Struct, frozen=True):
    """How many instances of each role: `2P1D`. `0P1D` is one plain vLLM behind the proxy."""

    num_prefill: int
    num_decode: int

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads `xPyD`. Raises ConfigError if it is anything else, or has no decode instance."""
        match = re.fullmatch(r"(\d{1,3})[Pp](\d{1,3})[Dd]", text)
        if match is None:
            raise ConfigError(f"topology {text!r} is not of the form xPyD, for example 1P1D, 2P1D or 0P1D")
        topology = cls(int(match[1]), int(match[2]))
        if topology.num_decode < 1:
            raise ConfigError(f"topology {text!r} has no decode instance: at least one is needed, for example 1P1D")
        return topology

    def __str__(self) -> str:
        return f"{self.num_prefill}P{self.num_decode}D"


class InstanceInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One running vLLM server, as it presents itself to the proxy.

    url: base address of its OpenAI server.
    control: address of its control socket; empty for a plain vLLM, which can neither send nor receive.
    fingerprint: of its KVLayout; only instances with the same one are paired. num_ranks: tensor-parallel workers.
    silent_peers: boot ids of instances that were asked to stop writing into its memory and do not answer: only their
        end makes the blocks safe to use again, so whoever started them must end them.
    paths: what it knows of its ways to the instances that it sends to.
    """

    name: str
    role: Role
    url: str
    boot_id: str
    control: str = ""
    fingerprint: str = ""
    transports: list[str] = []
    block_size: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    pid: int = 0
    silent_peers: list[str] = []
    paths: list[Path] = []
    num_ranks: int = 1


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an instance posts to the proxy's `/instances`, every second and whenever it has reports."""

    instance: InstanceInfo
    reports: list[Report] = []
    leaving: bool = False


class Welcome(msgspec.Struct, frozen=True):
    """What the proxy answers to a heartbeat. peers: instances that may send to this one."""

    known: bool = True
    peers: list[Peer] = []
