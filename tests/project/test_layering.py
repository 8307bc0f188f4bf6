"""The layout of the source: packages import downward, folders stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "shl": ["utils", "config", "fast", "hooks", "kl", "models", "measure", "method", "analysis"],
    "experiments": ["record", "questions", "report", "run", "arms", "checks", "bench"],
}
"""Lowest first; a package imports only from itself and from those before it."""
MODULES = [path for top in PACKAGES for path in sorted((ROOT / top).rglob("*.py"))]
IDS = [path.relative_to(ROOT).as_posix() for path in MODULES]


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree):
    """(module, name) of every import, also inside functions; a name may be a module too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def upward(module, tree):
    """Imports of the same top-level package that do not go downward."""
    top, *rest = module.split(".")
    order = PACKAGES[top]
    for name, what in imports_of(tree):
        parts = name.split(".")
        if parts[0] != top or not rest:
            continue
        inner = parts[1] if len(parts) > 1 else what
        if inner not in order or (rest[0] in order and order.index(inner) > order.index(rest[0])):
            yield name


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_packages_import_from_lower_packages_only(path):
    assert list(upward(dotted(path), ast.parse(path.read_text("utf-8")))) == []


def test_upward_detects_wrong_imports():
    wrong = ast.parse("def f():\n  from shl.method.loop import love\n  import shl.kl.sweep, shl")
    assert list(upward("shl.kl.divergence", wrong)) == ["shl.method.loop", "shl"]
    wrong = ast.parse("from shl.hooks import Handle")
    assert list(upward("shl.fast.linear", wrong)) == ["shl.hooks"]


@pytest.mark.parametrize("top", PACKAGES)
def test_imports_have_no_cycle(top):
    known = {dotted(path): path for path in MODULES if dotted(path).startswith(top)}
    below = {}
    for module, path in known.items():
        below[module] = set()
        for name, what in imports_of(ast.parse(path.read_text("utf-8"))):
            inner = f"{name}.{what}"
            below[module] |= {inner if inner in known else name} & (known.keys() - {module})
    while below:
        free = [m for m, needs in below.items() if not needs & below.keys()]
        assert free, f"a cycle among {sorted(below)}"
        for module in free:
            del below[module]


def entries(folder):
    hidden = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    return [path for path in folder.iterdir() if path.name not in hidden]


@pytest.mark.parametrize("top", PACKAGES)
def test_folders_have_at_most_ten_entries(top):
    folders = [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]
    crowded = {p.name: len(entries(p)) for p in folders if p.name != "__pycache__"}
    assert {name: n for name, n in crowded.items() if n > 10} == {}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[len(ROOT.parts)] == "shl"], ids=str)
def test_library_has_no_forbidden_imports_prints_or_broad_excepts(path):
    tree = ast.parse(path.read_text("utf-8"))
    forbidden = {"experiments", "tests", "rich", "tyro", "matplotlib", "peft"}
    if path.name == "plots.py":  # used in notebooks, without `experiments`
        forbidden.remove("matplotlib")
    for module, name in imports_of(tree):
        assert module.split(".")[0] not in forbidden
        assert (module, name) != ("__future__", "annotations")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "a bare except"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not caught & {"Exception", "BaseException"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


IMPORTS = """
import sys; sys.modules["matplotlib"] = None; import shl; shl.__all__
del sys.modules["matplotlib"]
from shl.tiny import tiny_gemma; from shl.lens import logit_lens; import shl.lens
from shl import pictures, tiny; from shl.kl import aggregate, fused
from shl.models import load_model; import shl
assert pictures.cosines and shl.pictures is pictures
assert shl.models.load_model is load_model
"""


def test_imports_of_the_package_succeed_without_matplotlib_and_by_short_names():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
