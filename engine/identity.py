"""Which model this is: equal only where the same configuration meets the same weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SAMPLES = 16
SAMPLE_BYTES = 64 << 10
_SAYS_NOTHING = ("_name_or_path", "transformers_version")
"""Where a model was found and who wrote its configuration down: the same weights may lie in two places."""


def model_identity(config: dict[str, Any], model: str, revision: str | None, extra: dict[str, str]) -> str:
    """32 hex digits over the model's configuration and its weights.

    config: the Hugging Face configuration as a dict; extra: what else decides the numbers (load format, seed of dummy
    weights, quantisation). Weights in a local folder count by name, size, head and samples of 64 KiB from 16 places of
    every file; a model from a hub counts by name and revision.
    """
    told = {key: value for key, value in config.items() if key not in _SAYS_NOTHING}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    digest.update(json.dumps(extra, sort_keys=True).encode())
    folder = Path(model)
    if folder.is_dir():
        for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
            digest.update(path.name.encode())
            _add_samples(digest, path)
    else:
        digest.update(f"{model}@{revision}".encode())
    return digest.hexdigest()[:32]


def _add_samples(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(index * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


def adapter_identity(path: str) -> bytes:
    """16 bytes over an adapter's content, by the same rule as a model's weights; by name where it is no folder."""
    digest = hashlib.sha256(path.encode() if not Path(path).is_dir() else b"")
    for file in sorted(Path(path).glob("*")) if Path(path).is_dir() else ():
        if file.is_file():
            digest.update(file.name.encode())
            _add_samples(digest, file)
    return digest.digest()[:16]
