"""The cluster's key file: who holds it may take part, who does not is neither answered nor understood.

    listener pair   every listening socket has the secret, every caller knows the public half: whom it calls is ours
    caller pair     every caller has the secret, every listener lets in this public half alone: who calls is ours

Memory model: read once at start; the secrets stay in this process, and in no message, log or command line.
Threading: pure functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from core.errors import ConfigError

FILE_MODE = 0o600
_OTHERS_MODE = 0o077
_MAX_FILE_BYTES = 4096
_KEY_BYTES = 32
_PERSON = b"baton-heartbeat"


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CURVE key pair, both halves in Z85 (40 characters)."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"<Pair {self.public}>"


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a key file holds."""

    listener: Pair
    caller: Pair
    version: int = 1

    def __repr__(self) -> str:
        return "<Keys>"

    def signing_key(self) -> bytes:
        """For what is signed and not encrypted: the heartbeats (transport/signature.py)."""
        secrets = f"{self.listener.secret}{self.caller.secret}".encode()
        return hashlib.blake2b(secrets, digest_size=32, person=_PERSON).digest()


def check_curve() -> None:
    """Raises ConfigError where libzmq cannot encrypt."""
    if not zmq.has("curve"):
        raise ConfigError(
            f"this libzmq ({zmq.zmq_version()}) was built without CURVE, so nothing can be encrypted: install PyZMQ's "
            "own wheel (pip install --force-reinstall --only-binary :all: pyzmq), or leave out --keys"
        )


def make_keys(path: Path) -> None:
    """Writes a new key file, readable by this user alone. Raises ConfigError if that cannot be, or one is there."""
    check_curve()
    listener, caller = (Pair(*(half.decode() for half in zmq.curve_keypair())) for _ in range(2))
    text = msgspec.json.format(msgspec.json.encode(Keys(listener, caller)), indent=2)
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already and is kept: name another path, or delete it first and copy the new one to every "
            "host of the cluster"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot make the key file {path}: {error.strerror or error}; name another path") from error
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), FILE_MODE)
            file.write(text + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise ConfigError(f"cannot write the key file {path}: {error.strerror or error}; name another path") from error


def read_keys(path: str | Path) -> Keys:
    """Raises ConfigError, naming cause and remedy, if it is no key file, cannot be read, or others can read it."""
    check_curve()
    try:
        content, mode = _read(Path(path))
    except FileNotFoundError:
        raise ConfigError(f"there is no key file {path}: make one with: baton keys {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror or error}") from error
    if mode & _OTHERS_MODE:
        raise ConfigError(f"others may use the key file {path} (mode {mode:04o}): chmod 600 {path}")
    remedy = f"give the file that `baton keys` made, the same one to every instance, not {path}"
    try:
        keys = msgspec.json.decode(content, type=Keys)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no key file of Baton's ({_without_content(error)}); {remedy}") from None
    for pair in (keys.listener, keys.caller):
        if not _is_pair(pair):
            raise ConfigError(f"{path} is damaged: a public key and its secret key do not belong together; {remedy}")
    return keys


def _read(path: Path) -> tuple[bytes, int]:
    """Content and mode of the same file, whatever happens to its name meanwhile."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "it is not a regular file")
        return file.read(_MAX_FILE_BYTES), stat.S_IMODE(status.st_mode)


def _without_content(error: Exception) -> str:
    """What is wrong, without the file's own words: they may be secret."""
    return "it is not JSON" if not isinstance(error, msgspec.ValidationError) else str(error)


def _is_pair(pair: Pair) -> bool:
    try:
        secret = z85.decode(pair.secret.encode())
        return len(secret) == _KEY_BYTES and zmq.curve_public(pair.secret.encode()).decode() == pair.public
    except (ValueError, KeyError, UnicodeError, zmq.ZMQError):
        return False
