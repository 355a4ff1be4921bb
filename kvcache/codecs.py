"""From a codec's name to the codec. Its library is imported only where it is used."""

from __future__ import annotations

from collections.abc import Callable

from core.errors import ConfigError
from kvcache.codec import Codec

CODECS = ("raw", "zstd", "lz4", "fp8", "int8", "int4")
LOSSY = ("fp8", "int8", "int4")
"""These change what is stored, within a bound: only where somebody asks for one by name."""


def check_name(name: str) -> str:
    """The name. Raises ConfigError naming the codecs there are."""
    if name not in CODECS:
        raise ConfigError(
            f"--cache: unknown codec {name!r}; known: {', '.join(CODECS)} ({', '.join(LOSSY)}: not exact)"
        )
    return name


def make_codec(name: str) -> Codec:
    """Raises ConfigError for an unknown name or a missing library."""
    try:
        return _make(check_name(name))
    except ImportError as error:
        raise ConfigError(f"codec={name} needs a library ({error}): pip install 'baton-serve[codecs]'") from error


def _make(name: str) -> Codec:
    """Raises ImportError."""
    from kvcache import lossless, lossy

    makers: dict[str, Callable[[], Codec]] = {
        "raw": lossless.RawCodec,
        "zstd": lossless.ZstdCodec,
        "lz4": lossless.Lz4Codec,
        "fp8": lossy.Float8Codec,
        "int8": lossy.Int8Codec,
        "int4": lossy.Int4Codec,
    }
    return makers[name]()
