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
    """A function itself; of a class its own public methods, and what checks it when it is made."""
    if not inspect.isclass(thing):
        return {"": thing}
    found = {}
    for name, member in vars(thing).items():
        raw = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        raw = raw.fget if isinstance(raw, property) else raw
        if inspect.isfunction(raw) and raw.__module__ == thing.__module__:
            found[name] = raw
    return found


def refuses(function):
    """Whether its own body raises, directly or through `require`."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError:  # what a dataclass generates has none
        return False
    return any(
        isinstance(node, ast.Raise)
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "require"
        )
        for node in ast.walk(ast.parse(source))
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_running_example(name):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "")
    assert examples
    assert not any(doctest.SKIP in example.options for example in examples)


@pytest.mark.parametrize("name", PUBLIC)
def test_what_can_be_refused_is_said(name):
    thing = PUBLIC[name]
    for key, function in members(thing).items():
        if key.startswith("_") and key not in ("__init__", "__post_init__"):
            continue
        own = thing if key in ("", "__init__", "__post_init__") else function
        if refuses(function):
            assert "Raises:" in (inspect.getdoc(own) or ""), f"{name}.{key}"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_member_is_described(name):
    for key, function in members(PUBLIC[name]).items():
        if not key.startswith("_"):
            assert (inspect.getdoc(function) or "").strip(), f"{name}.{key}"


def test_the_rule_would_see_a_refusal():
    assert refuses(shl.aggregate)
    assert refuses(shl.Axis.__post_init__)
    assert not refuses(shl.keep_coherent)


def test_the_reference_is_made_without_a_warning(tmp_path):
    dry = ["make", "--dry-run", "docs"]
    recipe = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in recipe.splitlines() if "-m pdoc" in line]
    words = line.replace("runs/docs", str(tmp_path)).split()
    assert words[1:3] == ["-W", "error"]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "shl.html").read_text("utf-8")
    assert all(f'id="{name}"' in page for name in shl.__all__)
    assert "tok d_model" in page  # shapes are part of the signatures
    modules = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "shl").rglob("*.py")}
    pages = {p.relative_to(tmp_path).with_suffix("") for p in tmp_path.rglob("*.html")}
    left_out = {path.as_posix() for path in modules - pages if path.name != "__init__"}
    assert left_out == {"shl/kl/triton", "shl/utils/shapes"}
