"""The floors of the house, read from the source: imports go down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "shl"

FLOORS = {
    "errors": 0,
    "shapes": 0,
    "seeds": 0,
    "config": 0.5,
    "linear": 0.5,
    "joint": 1.6,
    "shared": 1.6,
    "spectra": 0.75,
    "chunks": 0.6,
    "sweep": 0.75,
    "kl_triton": 0.9,
    "kl_plain": 0.9,
    "divergence": 0.95,
    "axes": 1,
    "convert": 1,
    "dose": 1,
    "files": 1,
    "kl": 1,
    "sites": 1,
    "stats": 1,
    "evaluation": 1.25,
    "hooks": 1.5,
    "adapter_meta": 1.5,
    "vector_meta": 1.5,
    "rules": 1.5,
    "fingerprint": 1.75,
    "scope": 1.75,
    "weights": 1.5,
    "cache": 1.5,
    "steering": 2,
    "low_rank": 2,
    "attention": 1.75,
    "components": 1.9,
    "hf_cache": 1.75,
    "hf_view": 3,
    "shortlist": 1.75,
    "sampling": 1.9,
    "models": 2,
    "tokens": 2,
    "tiny": 2.5,
    "prefill": 2.75,
    "recorder": 2.5,
    "activations": 2.75,
    "directions": 2.75,
    "adapter": 2.75,
    "vector": 3,
    "lora": 3.5,
    "bake": 4,
    "nulls": 1,
    "students": 4.25,
    "updates": 4,
    "cosines": 4.5,
    "ledger": 6.5,
    "lens": 4,
    "response": 4.5,
    "canvas": 1,
    "word_pictures": 6.75,
    "pictures": 7,
    "generate": 4,
    "random_vector": 4.5,
    "scores": 4.25,
    "export": 4.5,
    "trust": 4.75,
    "filters": 4.5,
    "probes": 4.5,
    "vignettes": 5,
    "halving": 0.5,
    "finite": 1.6,
    "heal_step": 4.6,
    "training": 4.7,
    "heal": 5,
    "stages": 5.5,
    "rounds": 5.7,
    "study": 5.75,
    "loop": 6,
}
ROOMS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def tree_of(room):
    return ast.parse((ROOT / f"{room}.py").read_text("utf-8"))


def imports_of(tree):
    """(module, name) of every import, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def upward(room, tree):
    """Imports of this package that do not go down."""
    for module, _ in imports_of(tree):
        parts = module.split(".")
        if parts[0] != "shl":
            continue
        if len(parts) == 1:
            yield module  # the package's face is for users
        elif FLOORS.get(parts[1], 99) >= FLOORS[room]:
            yield module


def test_there_are_no_folders_of_code_beside_the_rooms():
    assert not list(ROOT.glob("*/**/*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_floor(room):
    assert room in FLOORS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_lower_floors_only(room):
    assert list(upward(room, tree_of(room))) == []


def test_the_rule_would_see_a_wrong_import():
    wrong = "def f():\n    from shl.loop import love\n    import shl.kl\n    from shl import x\n"
    assert list(upward("kl", ast.parse(wrong))) == ["shl.loop", "shl.kl", "shl"]


@pytest.mark.parametrize("room", [*ROOMS, "__init__"])
def test_the_library_keeps_to_itself(room):
    tree = tree_of(room)
    forbidden = {"experiments", "tests", "rich", "tyro", "matplotlib", "peft"}
    # Pictures of a run are for notebooks too, where `experiments` is not installed.
    forbidden -= {"matplotlib"} if room in ("canvas", "pictures", "word_pictures") else set()
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


def test_the_face_of_the_package_only_re_exports():
    allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, allowed) for node in tree_of("__init__").body)


def test_the_package_can_be_imported_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import shl; print(len(shl.__all__))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
