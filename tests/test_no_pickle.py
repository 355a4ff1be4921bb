"""Nothing that comes from outside a process is ever unpickled, nor run in any other way."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

from tests.readme import ROOT

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle"}
CALLS = {"recv_pyobj", "send_pyobj", "recv_serialized", "read_pickle", "to_pickle", "eval", "exec"}
LOADS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load")}


def test_no_pickle_anywhere() -> None:
    files = [path for path in _sources() if path != Path(__file__).resolve()]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in files for line, what in _suspects(path)]
    assert not found, found


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    for line in ("import pickle", "from cloudpickle import loads", "s.recv_pyobj()", "torch.load(f)", "eval(text)"):
        path.write_text(line)
        assert list(_suspects(path)), line


def _sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    names = [name for name in listed if name.endswith(".py")] or [str(path) for path in ROOT.glob("*/*.py")]
    return [(ROOT / name).resolve() for name in names if (ROOT / name).exists()]


def _suspects(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found += [(node.lineno, each.name) for each in names if each.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in MODULES:
                found.append((node.lineno, module))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append((node.lineno, name))
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if (owner, name) in LOADS:
                found.append((node.lineno, f"{owner}.{name}"))
            case ast.Call(func=ast.Attribute(attr=name)) if name in CALLS - {"eval", "exec"}:
                found.append((node.lineno, name))
    return found
