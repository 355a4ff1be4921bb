"""Whether Baton's modules are Baton's: its folders are import names, and others have a `core` or a `proxy` too."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from core.finding import Finding, Verdict

OURS = ("core", "transport", "kvcache", "prefill", "decode", "engine", "proxy", "client", "cluster", "benchmarks")
DISTRIBUTION = "baton-serve"
_ROOT = Path(__file__).resolve().parent.parent


def findings(
    root: Path = _ROOT, installed: Mapping[str, Sequence[str]] | None = None, names: Sequence[str] = OURS
) -> list[Finding]:
    """A module of ours that was found elsewhere, and packages that bring one of the same name.

    installed: distributions by the top-level modules that they bring.
    """
    if installed is None:
        installed = metadata.packages_distributions()
    found = [_elsewhere(name, root) for name in names] + [_brought(name, installed) for name in names]
    return [each for each in found if each is not None] or [Finding("modules", "all are Baton's own")]


def _elsewhere(name: str, root: Path) -> Finding | None:
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if origin is not None and origin.is_relative_to(root):
        return None
    advice = "another package shadows it: install Baton in an environment of its own, and look at PYTHONPATH"
    return Finding(f"module {name}", f"found in {origin}" if origin else "not found", Verdict.FIX, advice)


def _brought(name: str, installed: Mapping[str, Sequence[str]]) -> Finding | None:
    others = sorted({other for other in installed.get(name, ()) if other.lower().replace("_", "-") != DISTRIBUTION})
    if not others:
        return None
    advice = f"{', '.join(others)} brings a module of this name: whichever is found first wins; separate environments"
    return Finding(f"module {name}", f"also in {', '.join(others)}", Verdict.FIX, advice)
