"""Who a request belongs to, as the salt of its KV cache: two tenants' caches never meet.

    body has cache_salt     it stays as the client wrote it (`proxy/body.py`)
    else, an API key        a keyed hash of the key: the same for the same key, and says nothing about it
    neither                 no salt: all such requests share one cache

The hash's secret comes from a file, so that a proxy that starts again, or a second one, gives the same salts. Nothing
here changes after the start; no threads, no locks.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

from core.errors import ConfigError
from proxy.settings import Settings

_SECRET_BYTES = 32
_SALT_BYTES = 16
_OTHERS_MODE = 0o077


class Tenants:
    """Salts by API key."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def salt(self, authorization: str | None) -> str | None:
        """22 characters that vLLM takes as a cache_salt; None without a credential in the header's value."""
        credential = _credential(authorization or "")
        if not credential:
            return None
        digest = hmac.digest(self._secret, credential.encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest[:_SALT_BYTES]).rstrip(b"=").decode()


def _credential(authorization: str) -> str:
    """What stands behind the scheme. A lone word that is no scheme is a credential too: better one tenant too many."""
    first, _, rest = authorization.strip(" ").partition(" ")
    return rest.strip(" ") or ("" if first.lower() == "bearer" else first)


def make_tenants(settings: Settings) -> Tenants | None:
    """None where API keys are no tenants. Raises ConfigError as `load_secret` does."""
    if settings.share_between_keys:
        return None
    if not settings.tenant_key:
        return Tenants(secrets.token_bytes(_SECRET_BYTES))
    return Tenants(load_secret(Path(settings.tenant_key)))


def load_secret(path: Path) -> bytes:
    """The file's 32 bytes; makes the file (mode 0600) if there is none.

    Whoever else makes it at the same time, all get the same secret. Raises ConfigError, naming cause and remedy, if the
    file does not hold 32 bytes, if others may read or change it, or if it can be neither read nor made.
    """
    try:
        if not path.exists():
            _create(path)
        return _read(path)
    except OSError as error:
        cause = error.strerror or str(error)
        raise ConfigError(
            f"cannot use the tenant key {path}: {cause}; name a file in a folder that this user may write to"
        ) from error


def _create(path: Path) -> None:
    """Written under a name of its own, then linked: the first link wins, and nobody sees half a file."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        secret = file.read(_SECRET_BYTES + 1)
    if mode & _OTHERS_MODE:
        raise ConfigError(f"others may use the tenant key {path} (mode {mode:03o}): chmod 600 {path}")
    if len(secret) != _SECRET_BYTES:
        # a longer one may be a text with a beginning that anyone can guess, such as a PEM file
        held = f"{len(secret)}" if len(secret) < _SECRET_BYTES else f"more than {_SECRET_BYTES}"
        raise ConfigError(
            f"the tenant key {path} must hold {_SECRET_BYTES} random bytes, not {held}: delete it for a new one, "
            f"or write one with: head -c {_SECRET_BYTES} /dev/urandom > {path}"
        )
    return secret
