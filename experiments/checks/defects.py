"""Put known defects into a copy of the code, one at a time: each must fail one of its tests.

`make defects` does so with the list in tests/defects.toml, whose edits no operator of a mutation
tool makes. Libraries are imported once; each defect has a process of its own.
"""

import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from experiments.record.command import command
from shl.utils.errors import require

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "transformer_lens",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
    "scipy.stats",
    "matplotlib.pyplot",
    "pydantic",
    "pytest",
)

WARNINGS = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"


@dataclass(frozen=True)
class Defect:
    """An edit: `old` occurs once in `file` and becomes `new`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def put_into(self, tree: Path) -> None:
        """Edit the file in a copy of the code."""
        text = (tree / self.file).read_text("utf-8")
        count = text.count(self.old)
        require(count == 1, f"{self.file} has {self.old!r} {count} times, it must have it once.")
        (tree / self.file).write_text(text.replace(self.old, self.new), "utf-8")


@dataclass(frozen=True)
class DefectsConfig:
    """Which defects, and how many at a time."""

    list: Path = ROOT / "tests" / "defects.toml"
    """The defects."""
    only: str = ""
    """Part of the names of those to try."""
    processes: int = 2
    """Defects tried at a time [count]."""


def defects(config: DefectsConfig) -> None:
    """Try every defect; exits with status 1 if one survives or cannot be tried."""
    rows = tomllib.loads(config.list.read_text("utf-8"))["defect"]
    listed = [Defect(**row | {"tests": tuple(row["tests"])}) for row in rows]
    listed = [defect for defect in listed if config.only in defect.name]
    require(bool(listed), f"no defect's name holds {config.only!r}.")
    tests = tuple(sorted({test for defect in listed for test in defect.tests}))
    # Every test must pass where there is no defect.
    waiting = [Defect("no defect", "", "", "", tests), *listed]
    for name in LIBRARIES:
        importlib.import_module(name)
    began, unnoticed = time.monotonic(), list[str]()
    running: Running = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, defect in enumerate(waiting):
            if len(running) == config.processes:
                unnoticed += _ended(running)
            tree = Path(scratch) / str(number)
            running[_start(defect, tree)] = defect, tree
        while running:
            unnoticed += _ended(running)
    seconds = time.monotonic() - began
    print(f"{len(waiting)} tried in {seconds:.0f} s, not as they must be: {unnoticed or 'none'}")
    sys.exit(bool(unnoticed))


Running = dict[int, tuple[Defect, Path]]
"""Defects that are being tried, with their copies of the code, by process id."""


def _start(defect: Defect, tree: Path) -> int:
    """Start the tests of a defect in a process of their own; its id."""
    for name in ("shl", "experiments", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    if defect.old:
        defect.put_into(tree)
    if (process := os.fork()) == 0:
        try:
            os._exit(_test(defect, tree))
        finally:
            os._exit(70)
    return process


def _test(defect: Defect, tree: Path) -> int:
    """Run tests on a copy of the code, as which `shl` and `experiments` are imported anew."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("shl", "experiments")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = True
    os.chdir(tree)
    import pytest

    with (tree / "output").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            options = ["-x", "-p", "no:cacheprovider", "-W", WARNINGS]
            return int(pytest.main([*options, *defect.tests]))


def _ended(running: Running) -> list[str]:
    """Wait for a process; the name of its defect unless that was noticed."""
    process, status = os.wait()
    (defect, tree), code = running.pop(process), os.waitstatus_to_exitcode(status)
    if code == bool(defect.old):
        print(f"{'noticed' if code else 'passed':9} {defect.name}", flush=True)
        return []
    print(f"status {code}  {defect.name}; its tests:\n{(tree / 'output').read_text()}", flush=True)
    return [defect.name]


def main() -> None:
    """The command line."""
    command(defects, DefectsConfig, __doc__)


if __name__ == "__main__":
    main()
