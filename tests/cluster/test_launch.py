"""Real vLLM servers start fast, answer, come back when killed, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from cluster.bundled import BUNDLED_NAME
from cluster.launcher import Cluster
from cluster.ports import free_ports
from cluster.processes import living_groups
from cluster.runfolder import remove_stale
from core.errors import BatonError
from tests.conftest import MakeCluster
from tests.poll import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]
READY_TIMEOUT_S = 60.0


def chat(cluster: Cluster) -> str:
    """The text of a short streamed chat by the official client."""
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        messages = [{"role": "user", "content": "Speak, good sir."}]
        stream = client.chat.completions.create(
            model=BUNDLED_NAME, messages=messages, max_tokens=16, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_a_plain_instance_behind_the_proxy_streams_a_chat_and_stops_without_a_trace(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("0P1D")
    assert [member.name for member in cluster.instances] == ["decode-0"]
    assert chat(cluster)
    groups = {member.pid for member in cluster.members}
    folder = cluster.instances[0].log.parent
    assert len(cluster.instances[0].pids()) >= 2, "API server and engine core"
    cluster.stop()
    assert not living_groups(groups)
    assert not folder.exists()


def test_an_instance_whose_api_server_is_killed_goes_as_a_whole_and_comes_back(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("0P1D")
    instance = cluster.instance("decode-0")
    first = instance.pid
    instance.kill(signal.SIGKILL)
    until(lambda: not living_groups({first}), what="the engine core to go with its API server")
    until(lambda: instance.pid != first, what="a new start")
    cluster.wait_ready(READY_TIMEOUT_S)
    assert chat(cluster)


def test_a_killed_proxy_comes_back_on_its_port_and_knows_its_instances(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("0P1D")
    first = cluster.proxy.pid
    cluster.proxy.kill(signal.SIGKILL)
    until(lambda: cluster.proxy.pid != first)
    cluster.wait_ready(READY_TIMEOUT_S)
    assert chat(cluster)


def test_an_instance_that_dies_at_start_takes_the_cluster_down_with_its_last_words(make_cluster: MakeCluster) -> None:
    with pytest.raises(BatonError) as caught:
        make_cluster("0P1D", arguments_decode=("--max-model-len", "99999999"))
    text = str(caught.value)
    assert text.startswith("decode-0 ended during start with exit code 1")
    assert "decode-0: " in text
    assert "max_model_len" in text
    assert len(text.splitlines()) <= 16


def test_a_killed_launcher_leaves_no_process_and_the_next_start_removes_its_folder(tmp_path: Path) -> None:
    port, folder = _free_port(), Path("/tmp") / f"bt{tmp_path.stat().st_ino}"
    folder.mkdir()
    with _launcher(port, folder) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline().strip() == f"ready http://127.0.0.1:{port}"
        descendants = _descendants(launcher.pid)
        assert len(descendants) >= 4, "proxy, zygote, API server, engine core"
        launcher.kill()
    until(lambda: not any(_lives(pid) for pid in descendants), what="the launcher's processes to go")
    left = next(folder.glob("baton-*"))
    assert len(list(left.iterdir())) == 1
    remove_stale(left)
    assert list(left.iterdir()) == []
    left.rmdir()
    folder.rmdir()


def test_an_interrupted_start_leaves_no_process(tmp_path: Path) -> None:
    port, folder = _free_port(), Path("/tmp") / f"bi{tmp_path.stat().st_ino}"
    folder.mkdir()
    with _launcher(port, folder) as launcher:
        until(lambda: len(_descendants(launcher.pid)) >= 2, what="proxy and zygote")
        descendants = _descendants(launcher.pid)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(15) == 130
    assert not any(_lives(pid) for pid in descendants)
    assert list(next(folder.glob("baton-*")).iterdir()) == []
    shutil.rmtree(folder)


def _launcher(port: int, folder: Path) -> subprocess.Popen[str]:
    """`baton serve 0P1D` with its run folder under `folder`."""
    command = [sys.executable, "-m", "baton", "serve", "0P1D", "--port", str(port)]
    environment = dict(os.environ, TMPDIR=str(folder), PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )


def _free_port() -> int:
    return free_ports(1, "127.0.0.1")[0]


def _descendants(pid: int) -> list[int]:
    parents = {int(path.name): _fields(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found, queue = [], [pid]
    while queue:
        parent = queue.pop()
        children = [child for child, fields in parents.items() if fields[1:2] == [str(parent)]]
        found += children
        queue += children
    return found


def _lives(pid: int) -> bool:
    return _fields(pid)[:1] not in ([], ["Z"])


def _fields(pid: int) -> list[str]:
    """State, parent, ... of a process; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
