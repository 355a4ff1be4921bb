"""What a measurement was made on: without it a number means nothing."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import msgspec

from engine.build import installed_build

QUIET_LOAD = 0.3
"""Above this one-minute load average before a run, somebody else computes."""

_EMPTY_WORDS = ("cpu", "processor")


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
        name = re.sub(r"\d+-core|\(.*?\)|@.*", "", self.cpu.lower())
        words = re.findall(r"[a-z0-9]+", name)
        return f"{'-'.join(word for word in words if word not in _EMPTY_WORDS)}-{self.num_cores}-cores"

    def warnings(self) -> list[str]:
        """Why the figures should not be believed too much."""
        if self.load > QUIET_LOAD:
            return [f"the machine was not quiet: load average {self.load:.2f} when the run began"]
        return []


def this_machine() -> Machine:
    """Read from /proc, /sys and the installed packages."""
    cpuinfo = read_cpuinfo()
    return Machine(
        cpu=cpu_model(cpuinfo),
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


def read_cpuinfo() -> str:
    """What the kernel says about the processors."""
    return Path("/proc/cpuinfo").read_text()


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


def has_fast_bfloat16(cpuinfo: str) -> bool:
    """Whether products of bfloat16 are not slower than those of float32."""
    return " avx512f" in cpuinfo or " amx_bf16" in cpuinfo


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
