"""The notebooks run from top to bottom, and their stored outputs come from the real model.

The first is run on the real model (test_real.py), the others on the tiny one with a lenient filter.
"""

import ast
import importlib
import json
import tempfile
from pathlib import Path

import pytest
from helpers import lenient, save, tiny_llama_hf
from matplotlib.figure import Figure

import shl
from shl.models import weights
from shl.models.tiny import tiny_gemma

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name, kind="code"):
    notebook = json.loads((FOLDER / name).read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(name, monkeypatch, changes=()):
    """The namespace and the outputs (printed texts, last expressions) of all code cells, after
    replacing texts in their source."""
    space, outputs = {"__name__": "notebook"}, []
    monkeypatch.setattr(
        "builtins.print", lambda *parts, **_: outputs.append(" ".join(map(str, parts)))
    )
    changes = dict(changes)
    for cell in cells(name):
        source = "".join(cell["source"])
        for old in [old for old in changes if old in source]:
            source = source.replace(old, changes.pop(old))
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), space)
        if last is not None:
            outputs.append(eval(compile(ast.Expression(last.value), name, "eval"), space))
    assert not changes, f"not in {name}: {sorted(changes)}"
    return space, [x for x in outputs if x is not None]


@pytest.fixture
def tiny(monkeypatch):
    """`load_model` returns the tiny model, whose noise passes the filter."""
    lenient(monkeypatch)
    monkeypatch.setattr(shl, "load_model", lambda name: tiny_gemma())


@pytest.mark.usefixtures("tiny")
def test_second_notebook_makes_its_own_run(monkeypatch, tmp_path):
    changes = {
        'Path("../runs/first")': repr(tmp_path / "run").replace("PosixPath", "Path"),
        "vector=shl.VectorConfig(contexts=16)": (
            "vector=shl.VectorConfig(contexts=4), heal=shl.HealConfig(rank=2, epochs=1)"
        ),
        "GenerateConfig(max_new_tokens=32)": "GenerateConfig(max_new_tokens=8, min_new_tokens=4)",
        "max_new_tokens=40": "max_new_tokens=8, min_new_tokens=4",
    }
    space, outputs = run(NAMES[1], monkeypatch, changes)
    assert len(space["ledger"].rounds) == 2
    assert len(shl.Ledger(tmp_path / "run").rounds) == 2
    assert all(entry.to_shift for entry in space["ledger"].vectors)
    assert len([x for x in outputs if isinstance(x, Figure)]) == 5


@pytest.mark.usefixtures("tiny")
def test_third_notebook_trains_and_exports_an_adapter(monkeypatch):
    changes = {
        "max_new_tokens=32": "max_new_tokens=8, min_new_tokens=4",
        "max_new_tokens=24": "max_new_tokens=8, min_new_tokens=4",
        "epochs=2": "epochs=1",
    }
    space, outputs = run(NAMES[2], monkeypatch, changes)
    assert {site.kind for site in space["adapter"].sites} == {"o", "down"}
    assert space["vector"].rule == "median_difference"
    assert outputs[-2:] == ["['adapter_config.json', 'adapter_model.safetensors']", "True"]


def test_fourth_notebook_runs_a_qwen_on_the_bridge(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "model_folder", lambda name: save(tmp_path, tiny_llama_hf()))
    changes = {"max_new_tokens=32": "max_new_tokens=8, min_new_tokens=4"}
    space, outputs = run(NAMES[3], monkeypatch, changes)
    assert outputs[0] == ("qwen2", 3, 32)
    assert space["report"].ok
    assert outputs[-2:] == ["True", "['adapter_config.json', 'adapter_model.safetensors']"]
    assert all(norm > 0 for norm in space["adapter"].norms().values())


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_complete_small_and_without_local_paths(name):
    text = (FOLDER / name).read_text("utf-8")
    assert len(text) < 600_000
    folders = (tempfile.gettempdir(), Path.home(), FOLDER.parent, "/home")
    for trace in (*(f"{folder}/" for folder in folders), "Traceback", '"stderr"', "tiny"):
        assert trace not in text.replace("/tmp/ipykernel", ""), trace
    counts = [cell["execution_count"] for cell in cells(name)]
    assert counts == list(range(1, len(counts) + 1))
    assert all(set(cell["metadata"]) == set() for cell in cells(name))
    images = [o for c in cells(name) for o in c["outputs"] if "image/png" in o.get("data", {})]
    drawn = sum("pictures." in "".join(c["source"]) for c in cells(name))
    assert len(images) == drawn


@pytest.mark.parametrize("name", NAMES)
def test_only_public_names_are_used(name):
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in cells(name)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")
            if isinstance(node.value, ast.Name) and node.value.id == "shl":
                assert node.attr in shl.__all__
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shl"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert not alias.name.startswith("_")
                known = alias.name == "pictures" or hasattr(module, alias.name)
                assert node.module != "shl" or known
