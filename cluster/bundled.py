"""The model that comes with Baton, and the choice between it, a folder and a hub's name."""

from __future__ import annotations

from pathlib import Path

from engine.instance import ServedModel

BUNDLED_FOLDER = Path(__file__).resolve().parent / "demo_model"
BUNDLED_NAME = "baton-demo"
BUNDLED_KV_CACHE_BYTES = 256 << 20


def bundled_model() -> ServedModel:
    return ServedModel(str(BUNDLED_FOLDER), BUNDLED_NAME, BUNDLED_KV_CACHE_BYTES)


def served_model(text: str | None) -> ServedModel:
    """The bundled model where none is named."""
    if text is None or Path(text).expanduser().resolve() == BUNDLED_FOLDER:
        return bundled_model()
    folder = Path(text).expanduser()
    return ServedModel(str(folder.resolve()) if folder.is_dir() else text)
