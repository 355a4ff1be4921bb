"""What counts as alive: whatever may still hold a port or memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from cluster.processes import living_groups, wait_for_end
from tests.poll import until

_HEADLESS = """
import ctypes, socket, threading
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
threading.Thread(target=threading.Event().wait, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_zombie_whose_other_threads_still_live_is_not_dead() -> None:
    """A killed server's head goes first; its port is free when the last thread has gone."""
    with subprocess.Popen(
        [sys.executable, "-c", _HEADLESS], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        try:
            port = int(child.stdout.readline())
            stat = Path(f"/proc/{child.pid}/stat")
            until(lambda: b") Z" in stat.read_bytes(), what="the head's end")
            with socket.create_connection(("127.0.0.1", port), timeout=5.0):
                assert living_groups({child.pid}) == {child.pid}
        finally:
            os.killpg(child.pid, signal.SIGKILL)
        wait_for_end({child.pid}, 5.0)
        assert living_groups({child.pid}) == set()
        socket.create_server(("127.0.0.1", port)).close()
