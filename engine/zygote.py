"""A process that has imported vLLM once and forks a server per request: 2 seconds an instance instead of 20.

    launcher ──{"start": ...}──> zygote ──fork──> API server ──fork──> engine core
             <──{"pid": 123}────        (own session)         (same process group)

`python -m engine.zygote SOCKET`, CPU only. One JSON line in, one JSON line out, over a Unix socket:
`{"start": ServerSpec}` answers `{"pid": N}`, `{"exits": [N, ...]}` answers the exit code of those that ended, by pid.

One thread, and no torch operation before a fork: a forked child of a process that has used its OpenMP pool hangs.
libgomp reads OMP_NUM_THREADS when it is loaded, so the zygote runs with 1 and the number of threads is set in the
engine core, after the last fork. Everyone dies with its parent: zygote with launcher, server with zygote, engine core
with server; each forks in its main thread, which is the one that the kernel watches.
"""

from __future__ import annotations

import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from core.errors import BatonError
from engine import patches, plugin
from engine.instance import ENV_NO_COMPILE
from transport.parent import adopt_orphans, die_with_parent

_PRELOADED = (
    "engine.connector",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.collect_env",
    "vllm.entrypoints.cli.download_kernels",
    "vllm.entrypoints.cli.launch",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.openai",
    "vllm.entrypoints.cli.preload",
    "vllm.entrypoints.cli.run_batch",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.cli.snapshot",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.v1.worker.cpu_worker",
)


class ServerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to fork: arguments of `vllm serve`, variables beyond the zygote's own, and the file for its output."""

    arguments: list[str]
    environment: dict[str, str]
    log: str


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line from the launcher."""

    start: ServerSpec | None = None
    exits: list[int] = []


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line back. exits holds those of the asked that have ended; negative: by that signal."""

    pid: int = 0
    exits: dict[int, int] = {}
    error: str = ""


def preload() -> None:
    """Imports what a server imports, as far as this vLLM has it: what is missing here only costs time there."""
    for name in _PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu":
        raise BatonError(f"only CPU servers can be forked, this vLLM runs on {current_platform.device_type}")


class Zygote:
    """The loop. Its children are the API servers, and orphaned engine cores for the short time until they die."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._exits: dict[int, int] = {}
        self._reaping, wake = socket.socketpair()
        for end in (self._reaping, wake):
            end.setblocking(False)
        self._wake = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def serve_forever(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._reaping, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                self._reap()
                if self._listener in ready:
                    connection, _ = self._listener.accept()
                    with connection, suppress(OSError):
                        connection.settimeout(2.0)
                        self._answer(connection)

    def _reap(self) -> None:
        with suppress(BlockingIOError):
            self._reaping.recv(4096)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._exits[ended[0]] = os.waitstatus_to_exitcode(ended[1])

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as stream:
                request = msgspec.json.decode(stream.readline(), type=Request)
            pid = self._fork(request.start, connection) if request.start else 0
            answer = Answer(pid, {asked: self._exits[asked] for asked in request.exits if asked in self._exits})
        except (msgspec.MsgspecError, OSError) as error:
            answer = Answer(error=str(error))
        connection.sendall(msgspec.json.encode(answer) + b"\n")

    def _fork(self, spec: ServerSpec, connection: socket.socket) -> int:
        zygote_pid = os.getpid()
        pid = os.fork()
        if pid:
            self._exits.pop(pid, None)
            return pid
        code = 1
        try:
            os.setsid()
            die_with_parent(zygote_pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._listener, self._reaping, self._wake, connection):
                end.close()
            run_server(spec)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001 - the child must never return into the zygote's loop
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def run_server(spec: ServerSpec) -> None:
    """Becomes `vllm serve` in the forked child."""
    output = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.update(spec.environment)
    tempfile.tempdir = None
    if os.environ.get(ENV_NO_COMPILE) == "1":  # torch has read it when it was imported
        importlib.import_module("torch._dynamo.config").disable = True  # type: ignore[attr-defined]
    fork = _EngineFork()
    os.register_at_fork(before=fork.before, after_in_child=fork.after_in_child)
    sys.argv = ["vllm", "serve", *spec.arguments]
    from vllm.entrypoints.cli.main import main

    main()


class _EngineFork:
    """What happens in every process that a server forks: its engine core, and that one's workers."""

    def __init__(self) -> None:
        self._parent_pid = os.getpid()

    def before(self) -> None:
        self._parent_pid = os.getpid()

    def after_in_child(self) -> None:
        import torch

        die_with_parent(self._parent_pid)
        plugin.bind_engine(os.environ)
        cores = plugin.engine_cores(os.environ)
        if cores:
            torch.set_num_threads(len(cores))


def main() -> int:
    """Announces itself by listening; a launcher that finds no vLLM to patch reads why in the log."""
    path = Path(sys.argv[1])
    adopt_orphans()
    try:
        preload()
        patches.fork_engines()
        patches.keep_seeds_on_cpu()
    except BatonError as error:
        print(f"zygote: {error}", file=sys.stderr)
        return 2
    plugin.allow_amx()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    gc.collect()
    gc.freeze()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path) + ".new")
        listener.listen(64)
        os.rename(str(path) + ".new", path)
        Zygote(listener).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
