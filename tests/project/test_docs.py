"""Every public name documents its arguments and errors and has an example that runs."""

import ast
import doctest
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import shl
from shl import pictures

ROOT = Path(__file__).parents[2]
PUBLIC = {name: getattr(shl, name) for name in shl.__all__} | {
    f"pictures.{name}": getattr(pictures, name) for name in pictures.__all__
}


def members(thing):
    """A function itself, or a class's own methods and properties, by name."""
    if not inspect.isclass(thing):
        return {"": thing}
    found = {}
    for name, member in vars(thing).items():
        raw = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        raw = raw.fget if isinstance(raw, property) else raw
        if inspect.isfunction(raw) and raw.__module__ == thing.__module__:
            found[name] = raw
    return found


def can_raise(function):
    """Whether its own body raises, directly or through `require`."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:  # a method that a dataclass generates has no source
        return False
    return any(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require")
        for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_an_example_and_list_their_errors(name):
    thing = PUBLIC[name]
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
    assert examples
    assert not any(doctest.SKIP in example.options for example in examples)
    for key, function in members(thing).items():
        constructor = key in ("__init__", "__post_init__")
        if key.startswith("_") and not constructor:
            continue
        described = (inspect.getdoc(thing if constructor else function) or "").strip()
        assert described, f"{name}.{key}"
        assert "Raises:" in described or not can_raise(function), f"{name}.{key}"


def test_can_raise_detects_errors():
    assert can_raise(shl.aggregate)
    assert can_raise(shl.Axis.__post_init__)
    assert not can_raise(shl.keep_coherent)


def test_reference_builds_without_a_warning(tmp_path):
    dry = ["make", "--dry-run", "docs"]
    recipe = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in recipe.splitlines() if "-m pdoc" in line]
    _, *options = line.replace("runs/docs", str(tmp_path)).split()
    assert options[:2] == ["-W", "error"]
    command = [sys.executable, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "shl.html").read_text("utf-8")
    assert all(f'id="{name}"' in page for name in shl.__all__)
    assert "tok d_model" in page  # shapes are part of the signatures
    modules = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "shl").rglob("*.py")}
    pages = {p.relative_to(tmp_path).with_suffix("") for p in tmp_path.rglob("*.html")}
    left_out = {path.as_posix() for path in modules - pages if path.name != "__init__"}
    assert left_out == {"shl/kl/triton", "shl/utils/shapes"}
