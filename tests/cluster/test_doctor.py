"""`baton doctor` says what works here, how fast, what stands in the way, and what to do about it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import doctor, limits, modules
from core.errors import ConfigError, TransferError
from core.finding import Finding, Verdict
from engine.instance import source_path
from tests.readme import ROOT, replace_section, section
from transport import schemes, zmq_tcp
from transport.probe_pair import process_pairs
from transport.schemes import choices, wanted_schemes, why_not_auto


def run_doctor(*arguments: str, before: str = "true") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'{before}; exec "$@"', "-", sys.executable, "-m", "baton", "doctor", *arguments]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)


def labels(text: str) -> list[str]:
    """What each row is about."""
    rows = [line for line in text.splitlines() if line[:8].strip() in ("ok", "note", "FIX")]
    return [row[8:].split("  ")[0].strip() for row in rows]


def test_it_measures_every_transport_that_works_here_and_the_readme_shows_it() -> None:
    result = run_doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    shm = next(line for line in result.stdout.splitlines() if "  shm " in line)
    assert shm.count("GB/s") == 2
    assert " us" in shm
    assert result.stdout.rstrip().splitlines()[-1].startswith("Well: between instances of this host, KV goes by ")
    told = f"```\n{result.stdout}```\n"
    if os.environ.get("BATON_DRAW"):
        replace_section("doctor", told)
    ignored = {"GPU topology"}
    assert set(labels(section("doctor"))) - ignored == set(labels(told)) - ignored, "BATON_DRAW=1 renews it"


def test_a_limit_that_is_too_low_is_marked_and_exit_code_1() -> None:
    result = run_doctor("--json", before="ulimit -n 1000")
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert report["is_well"] is False
    assert {"name": "open files", "value": "1,000", "verdict": "FIX"}.items() <= report["limits"][3].items()
    assert "ulimit -n" in report["limits"][3]["advice"]
    by_name = {each["transport"]: each for each in report["transports"]}
    assert by_name.keys() == set(choices()[1:])
    assert by_name["shm"]["write_gb_per_s"] > 0
    assert by_name["zmq"]["latency_us"] > 0


def test_a_transport_that_cannot_be_made_costs_its_row_and_says_why() -> None:
    environment = {"PYTHONPATH": source_path()}
    with process_pairs(["smoke"], environment) as pairs, pytest.raises(TransferError, match="'smoke' is unknown"):
        pairs["smoke"].measure()


def test_what_auto_takes_decides_the_verdict() -> None:
    broken = doctor.Checkup("shm", failure="nothing arrived within 5 s")
    assert broken.verdict is Verdict.FIX
    assert doctor.Checkup("ucx", why_not_auto="no RDMA device", failure="crashed").verdict is Verdict.NOTE
    assert doctor.Checkup("nixl", why_unavailable="nixl is not installed", why_not_auto="x").verdict is Verdict.NOTE
    well = doctor.Report("here", [doctor.Checkup("zmq")], "zmq", [], [])
    assert well.is_well
    assert not doctor.Report("here", [broken, doctor.Checkup("zmq")], "zmq", [], []).is_well
    assert not doctor.Report("here", [doctor.Checkup("zmq")], "", [], []).is_well, "nothing works"


def by_name(root: Path) -> dict[str, Finding]:
    return {found.name: found for found in limits.findings(root)}


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_limits_are_read_and_each_has_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with RDMA, on paper."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8 << 20, 8 << 20))
    bare = by_name(tmp_path)
    assert bare["locked memory"].verdict is Verdict.OK, "without RDMA nothing is pinned"
    assert bare["RDMA devices"].value == "none"
    assert bare["/dev/shm"].verdict is Verdict.NOTE
    put(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")
    put(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/link_layer", "InfiniBand\n")
    put(tmp_path, "proc/sys/kernel/yama/ptrace_scope", "2\n")
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = by_name(tmp_path)
    assert found["RDMA devices"].value == "mlx5_0 (port 1 ACTIVE InfiniBand)"
    assert (found["locked memory"].value, found["locked memory"].verdict) == ("8.0 MiB", Verdict.FIX)
    assert "memlock=-1" in found["locked memory"].advice
    assert (found["ptrace scope"].value, found["ptrace scope"].verdict) == ("2", Verdict.NOTE)
    assert "sysctl kernel.yama.ptrace_scope=0" in found["ptrace scope"].advice
    put(tmp_path, "sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN\n")
    assert "mlx5_1" in by_name(tmp_path)["RDMA devices"].advice


def test_gpus_and_how_they_are_joined_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name that prints what NVIDIA's prints."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nif [ "$1" = -L ]; then\n'
        '  echo "GPU 0: NVIDIA H200 (UUID: a)"; echo "GPU 1: NVIDIA H200 (UUID: b)"\n'
        'else printf "\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n"; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    found = [each for each in limits.findings(tmp_path) if each.name.startswith("GPU")]
    assert [each.value for each in found] == [
        "GPU 0: NVIDIA H200; GPU 1: NVIDIA H200",
        "GPU0 X NV18",
        "GPU1 NV18 X",
    ]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert by_name(tmp_path)["GPUs"].advice == "nvidia-smi does not answer: is the driver loaded?"


def test_a_package_that_shadows_a_module_of_ours_is_named() -> None:
    assert [each.verdict for each in modules.findings(installed={"core": ["baton_serve"]})] == [Verdict.OK]
    both = modules.findings(installed={"core": ["baton-serve", "corelib"], "proxy": ["proxy.py"]})
    assert [(each.name, each.value, each.verdict) for each in both] == [
        ("module core", "also in corelib", Verdict.FIX),
        ("module proxy", "also in proxy.py", Verdict.FIX),
    ]
    elsewhere = modules.findings(names=["json", "no_such_module"], installed={})
    assert [each.verdict for each in elsewhere] == [Verdict.FIX, Verdict.FIX]
    assert elsewhere[0].value.endswith("json/__init__.py")


def test_a_pinned_transport_that_cannot_run_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schemes._MODULES, "absent", "tests.transport.absent")
    monkeypatch.setattr(schemes, "SCHEMES", tuple(schemes._MODULES))
    with pytest.raises(
        ConfigError, match="--transport absent cannot run here: libabsent is not installed: pip install"
    ):
        wanted_schemes("absent")
    assert wanted_schemes("zmq") == ["zmq"]
    assert "absent" not in wanted_schemes("auto"), "auto goes without it"
    assert {"shm", "zmq"} <= set(wanted_schemes("auto"))
    with pytest.raises(ConfigError, match="'smoke' is unknown"):
        wanted_schemes("smoke")


def test_what_was_never_measured_on_its_hardware_is_never_taken_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuda_ipc" not in wanted_schemes("auto")
    assert "never measured" in why_not_auto("cuda_ipc")
    monkeypatch.setattr(zmq_tcp, "MEASURED", False, raising=False)
    assert "zmq" not in wanted_schemes("auto")
    assert "never measured" in why_not_auto("zmq")
    assert wanted_schemes("zmq") == ["zmq"], "but by hand"


def test_fast_hardware_is_an_rdma_device_or_a_gpu(tmp_path: Path) -> None:
    assert not schemes.has_fast_hardware(tmp_path)
    put(tmp_path, "dev/nvidia-uvm", "")
    assert not schemes.has_fast_hardware(tmp_path)
    put(tmp_path, "dev/nvidia0", "")
    assert schemes.has_fast_hardware(tmp_path)
    put(tmp_path / "other", "sys/class/infiniband/mlx5_0/node_type", "")
    assert schemes.has_fast_hardware(tmp_path / "other")
