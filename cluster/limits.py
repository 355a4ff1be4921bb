"""The limits of this machine that decide how KV can move, and what to do about each. Reads; changes nothing."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path

from core.finding import Finding, Verdict
from engine.preflight import free_memory_bytes

FEW_FILES = 4096
SMALL_SHM_BYTES = 1 << 30
SCRAPE_TIMEOUT_S = 15.0
_PTRACE = {
    "0": "",
    "1": "UCX and NIXL copy between processes only with CAP_SYS_PTRACE",
    "2": "UCX and NIXL copy between processes only as root",
    "3": "UCX and NIXL cannot copy between processes at all",
}


def findings(root: Path = Path("/")) -> list[Finding]:
    """All of them. `root`: where /proc, /sys and /dev are looked for."""
    devices = rdma_devices(root)
    return [
        _free_memory(),
        _locked_memory(bool(devices)),
        _shared_memory(root),
        _open_files(),
        _ptrace(root),
        _rdma(devices),
        *_gpus(root),
    ]


def rdma_devices(root: Path = Path("/")) -> list[str]:
    """By name, with what each port is connected to."""
    found = []
    for device in sorted((root / "sys/class/infiniband").glob("*")):
        ports = [
            f"port {port.name} {_word(port / 'state')} {_word(port / 'link_layer')}"
            for port in sorted((device / "ports").glob("*"))
        ]
        found.append(f"{device.name} ({', '.join(ports) or 'no ports'})")
    return found


def _free_memory() -> Finding:
    return Finding("free memory", _size(free_memory_bytes()), advice="KV caches live in it: --kv-cache-memory-bytes")


def _locked_memory(has_rdma: bool) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    if not has_rdma:
        return Finding("locked memory", _size(soft), advice="matters only with RDMA, which pins the whole KV cache")
    how = "ulimit -l unlimited; containers: --ulimit memlock=-1"
    return Finding("locked memory", _size(soft), Verdict.FIX, f"RDMA pins the whole KV cache: {how}")


def _shared_memory(root: Path) -> Finding:
    path = root / "dev/shm"
    if not path.is_dir():
        return Finding("/dev/shm", "missing", Verdict.NOTE, "vLLM and UCX want it; containers: --shm-size=8g")
    usage = shutil.disk_usage(path)
    value = f"{_size(usage.free)} free of {_size(usage.total)}"
    if usage.total < SMALL_SHM_BYTES:
        advice = "Baton's shm does not use it (memfd), but vLLM with several workers and UCX do: --shm-size=8g"
        return Finding("/dev/shm", value, Verdict.NOTE, advice)
    return Finding("/dev/shm", value, advice="for vLLM's workers and UCX; Baton's shm uses memfds instead")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Finding("open files", value, Verdict.FIX, f"each client takes two: ulimit -n 65536 (allowed: {hard:,})")
    return Finding("open files", value)


def _ptrace(root: Path) -> Finding:
    scope = _word(root / "proc/sys/kernel/yama/ptrace_scope")
    if not scope:
        return Finding("ptrace scope", "not restricted by Yama")
    why = _PTRACE.get(scope, "unknown to Baton")
    if not why:
        return Finding("ptrace scope", scope)
    advice = f"{why}, else by a slower way: sysctl kernel.yama.ptrace_scope=0; shm and zmq do not need it"
    return Finding("ptrace scope", scope, Verdict.NOTE, advice)


def _rdma(devices: list[str]) -> Finding:
    if not devices:
        return Finding("RDMA devices", "none", advice="between hosts KV goes over TCP")
    down = [device for device in devices if "ACTIVE" not in device]
    if down:
        return Finding("RDMA devices", "; ".join(devices), Verdict.NOTE, f"no active port: {'; '.join(down)}")
    return Finding("RDMA devices", "; ".join(devices))


def _gpus(root: Path) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        if any((root / "dev").glob("nvidia[0-9]*")):
            advice = "there is a device but no nvidia-smi: is the driver's tool package installed?"
            return [Finding("GPUs", "unknown", Verdict.NOTE, advice)]
        return [Finding("GPUs", "none", advice="no nvidia-smi")]
    listed, topology = _said("nvidia-smi", "-L"), _said("nvidia-smi", "topo", "-m")
    if not listed:
        return [Finding("GPUs", "unknown", Verdict.NOTE, "nvidia-smi does not answer: is the driver loaded?")]
    links = [line.rstrip() for line in topology if line.startswith("GPU")]
    return [
        Finding("GPUs", "; ".join(line.split(" (UUID")[0] for line in listed)),
        *[Finding("GPU topology", " ".join(line.split()), advice="NV#: NVLink") for line in links],
    ]


def _said(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCRAPE_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def _word(path: Path) -> str:
    """The last word of a one-line file; empty if there is none."""
    try:
        return (path.read_text().split() or [""])[-1]
    except OSError:
        return ""


def _size(num_bytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
