"""The `baton` command: reads the command line, calls, and turns expected errors into one line. Imports lazily.

Exit codes: 0 done, 1 failed, 2 asked for something that cannot be, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from core.errors import BatonError, ConfigError

if TYPE_CHECKING:
    from client import AsyncBatonClient as AsyncBatonClient
    from client import BatonClient as BatonClient

_PASSED = ("--prefill-args", "--decode-args")
_CLEAR = "\r\033[K"
_BENCHMARKS = ("handoff", "transfer", "cache", "codecs")
_CACHE_WORDS = (
    "disk=/FOLDER:SIZE, redis://HOST:PORT, s3://BUCKET/PREFIX, peer=HOST:PORT with listen=HOST:PORT; codec=zstd behind "
    "a tier; policy=lru, ttl=1h, quota=2GiB, write=back, admit=second"
)
_KEYS = "encrypt what goes between instances, and let in holders of this file alone (baton keys PATH makes it)"
_CACHE = {
    "serve": "Starts the cache server of this host and stays up until stopped.",
    "stats": "Shows what the cache server holds and did.",
    "ls": "Lists the labels: the blocks that each names, whether they are pinned, and when they expire.",
    "pin": "Keeps a label's blocks from being evicted.",
    "unpin": "Lets a label's blocks be evicted again.",
    "drop": "Makes the cache server forget a label and its blocks, or every block.",
    "warm": "Computes contexts ahead of time: texts and messages of files.",
}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours, and name the nearest known option."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown argument {unknown[0]!r}; {hint}")
        return options


def __getattr__(name: str) -> object:
    """`from baton import BatonClient`, without httpx for those who only want the command."""
    if name in ("AsyncBatonClient", "BatonClient"):
        return getattr(importlib.import_module("client"), name)
    raise AttributeError(f"module 'baton' has no attribute {name!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script's entry."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "serve": _serve,
        "instance": _instance,
        "keys": _keys,
        "cache": _cache,
        "demo": _demo,
        "doctor": _doctor,
        "bench": _bench,
    }
    if not given or given[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if given else 2
    _listen_to_signals()
    try:
        if given[0] not in commands:
            near = difflib.get_close_matches(given[0], commands, n=1, cutoff=0.5)
            raise ConfigError(f"unknown command {given[0]!r}; {_did_you_mean(near, list(commands))}")
        return commands[given[0]](given[1:])
    except BatonError as error:
        with suppress(BrokenPipeError):
            print(f"{_CLEAR if sys.stderr.isatty() else ''}baton: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except (KeyboardInterrupt, BrokenPipeError):
        print(_CLEAR if sys.stderr.isatty() else "", end="", file=sys.stderr)
        return 130


_USAGE = """usage: baton COMMAND ...

  serve xPyD   start x prefill and y decode instances behind one OpenAI endpoint, and stay up
  instance     start one instance that joins a proxy, here or on another host
  keys PATH    make the key file by which a cluster encrypts, and knows who belongs to it
  cache        serve, stats, ls, pin, unpin, drop, warm: the host's shared KV cache by hand
  demo         start 1P1D with the bundled model, ask a question, show its timeline, stop
  doctor       which transports work here, how fast, and which limits stand in the way
  bench NAME   measure; NAME is one of: handoff, transfer, cache, codecs

baton COMMAND --help says more."""


def _serve(arguments: Sequence[str]) -> int:
    parser = _Parser("baton serve", description="Starts a topology and stays up until stopped.", allow_abbrev=False)
    parser.add_argument("topology", metavar="xPyD", help="for example 1P1D; 0P1D is one plain vLLM behind the proxy")
    parser.add_argument("--model", help="a folder or a hub's name; the bundled model if left out")
    parser.add_argument("--host", default="127.0.0.1", help="the proxy's interface (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="the proxy's port (8000)")
    parser.add_argument(
        "--open-control", action="store_true", help="instances of other hosts may join; closed networks only"
    )
    parser.add_argument(
        "--share-between-keys", action="store_true", help="one KV cache for all API keys: only cache_salt separates"
    )
    parser.add_argument("--prefill-args", type=_words, default=(), metavar='"..."', help="for vLLM, prefill instances")
    parser.add_argument("--decode-args", type=_words, default=(), metavar='"..."', help="for vLLM, decode instances")
    _add_transport(parser)
    parser.add_argument(
        "--cache",
        metavar="8GiB[,TIER...][,RULE...]",
        help=f"a KV cache that all instances share: {_CACHE_WORDS}",
    )
    parser.add_argument("--keys", metavar="PATH", help=_KEYS)
    parser.add_argument("--start", choices=("fork", "plain"), help="how instances start (fork on CPUs, else plain)")
    return _call("cluster.serve", parser.parse(_joined(arguments)))


def _instance(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "baton instance",
        description="Starts one instance that joins a proxy. What follows -- goes to vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument("--join", required=True, metavar="http://HOST:PORT", help="the proxy")
    parser.add_argument("--model", help="a folder or a hub's name; the bundled model if left out")
    parser.add_argument("--host", default="127.0.0.1", help="this host's address as the others reach it (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="of its OpenAI server (a free one)")
    parser.add_argument("--name", help="unique behind one proxy")
    parser.add_argument("--cache", metavar="unix:PATH", help="the host's cache server, if there is one")
    _add_transport(parser)
    parser.add_argument("--keys", metavar="PATH", help=_KEYS)
    own, _, passed = _split(arguments)
    options = parser.parse(own)
    options.passed = tuple(passed)
    return _call("cluster.single", options)


def _add_transport(parser: _Parser) -> None:
    choices = importlib.import_module("transport.schemes").choices()
    parser.add_argument(
        "--transport", choices=choices, default="auto", help="how KV moves: the fastest, or this (auto)"
    )


def _doctor(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "baton doctor",
        description="Shows which transports work here and how fast, and the limits that matter, with what to do about "
        "each. Exit code 0: all that `--transport auto` takes works; 1: something must be put right, marked FIX.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return _call("cluster.doctor", parser.parse(arguments))


def _keys(arguments: Sequence[str]) -> int:
    parser = _Parser(
        "baton keys", description="Makes a key file, for --keys of every instance and proxy of one cluster."
    )
    parser.add_argument("path", metavar="PATH", help="a new file, which this user alone can read")
    return _call("cluster.keys", parser.parse(arguments))


def _cache(arguments: Sequence[str]) -> int:
    """`baton cache serve SIZE`, `stats`, `ls`, `pin LABEL`, `unpin LABEL`, `drop [LABEL]`, `warm FILE`."""
    if not arguments or arguments[0] not in _CACHE:
        raise ConfigError(f"baton cache needs one of: {', '.join(_CACHE)}")
    name = arguments[0]
    parser = _Parser(f"baton cache {name}", description=_CACHE[name], allow_abbrev=False)
    if name == "warm":
        return _warm(parser, arguments[1:])
    if name == "serve":
        parser.add_argument(
            "size", metavar="8GiB[,TIER...][,RULE...]", help=f"memory, tiers below it, rules: {_CACHE_WORDS}"
        )
    if name in ("pin", "unpin", "drop"):
        parser.add_argument("label", metavar="LABEL", nargs="?" if name == "drop" else None, help="as `ls` shows it")
    parser.add_argument("--socket", help="where it listens (one per user and host)")
    options = parser.parse(arguments[1:])
    return int(getattr(importlib.import_module("cluster.cache_command"), name)(options))


def _warm(parser: _Parser, arguments: Sequence[str]) -> int:
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="JSON lines (.jsonl) of contexts, or one text per file"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the proxy (http://127.0.0.1:8000)")
    parser.add_argument("--endpoint", choices=("chat", "completion"), help="of texts in plain files (completion)")
    parser.add_argument("--ttl-s", type=float, help="how long those that say nothing else are kept (no limit)")
    parser.add_argument("--pin", action="store_true", help="keep those that say nothing else from being evicted")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="holds the API key of the tenant whose contexts they are"
    )
    return _call("client.warm", parser.parse(arguments))


def _demo(arguments: Sequence[str]) -> int:
    parser = _Parser("baton demo", description="1P1D with the bundled model on free ports, one chat, its timeline.")
    _add_transport(parser)
    return _call("cluster.demo", parser.parse(arguments))


def _bench(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in _BENCHMARKS:
        raise ConfigError(f"baton bench needs a name: {', '.join(_BENCHMARKS)}")
    return int(importlib.import_module(f"benchmarks.{arguments[0]}").run(list(arguments[1:])))


def _call(module: str, options: argparse.Namespace) -> int:
    return int(importlib.import_module(module).run(options))


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--prefill-args "--x"` as `--prefill-args=--x`: argparse takes a value that starts with a dash for an option."""
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in _PASSED:
            result[-1] += "=" + argument
        else:
            result.append(argument)
    return result


def _split(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    given = list(arguments)
    if "--" not in given:
        return given, "", []
    index = given.index("--")
    return given[:index], "--", given[index + 1 :]


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} in {text!r}") from error


def _did_you_mean(near: list[str], known: list[str]) -> str:
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _listen_to_signals() -> None:
    """Also to Ctrl-C where a shell has started us with it ignored, as it does for `&`; SIGHUP unless under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
