"""What a measurement was made on: without it a number means nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import msgspec

from engine.build import installed_build

QUIET_LOAD = 0.3
"""Above this one-minute load average before a run, somebody else computes."""


class Machine(msgspec.Struct, frozen=True):
    """load: the one-minute average when the run began. cache_bytes: the last-level cache, 0 where it is not told."""

    cpu: str
    num_cores: int
    cache_bytes: int
    memory_bytes: int
    kernel: str
    python: str
    torch: str
    vllm: str
    baton: str
    load: float

    @property
    def hardware(self) -> str:
        """For a file's name."""
        return f"{'-'.join(word.lower() for word in self.cpu.split() if word.isalnum())}-{self.num_cores}c"

    def warnings(self, kv_cache_bytes: int) -> list[str]:
        """Why the figures should not be believed too much."""
        found = []
        if self.load > QUIET_LOAD:
            found.append(f"the machine was not quiet: load average {self.load:.2f} when the run began")
        if self.cache_bytes >= kv_cache_bytes:
            found.append("the last-level cache is as large as a KV cache: the cold memcpy was not cold")
        return found


def this_machine() -> Machine:
    return Machine(
        cpu=cpu_model(Path("/proc/cpuinfo").read_text()),
        num_cores=len(os.sched_getaffinity(0)),
        cache_bytes=_cache_bytes(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        python=platform.python_version(),
        torch=_version("torch"),
        vllm=installed_build().version,
        baton=_version("baton-serve"),
        load=os.getloadavg()[0],
    )


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in /proc/cpuinfo, with family and model where the name does not say much."""
    fields = dict(
        (key.strip(), value.strip())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if value
    )
    name = fields.get("model name", platform.machine())
    if any(letter.isdigit() for letter in name):
        return name
    return f"{name} (family {fields.get('cpu family', '?')} model {fields.get('model', '?')})"


def _cache_bytes() -> int:
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            largest = max(largest, int(text[:-1]) << 10)
    return largest


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
