"""Mutation testing with mutmut, and a table of its verdicts by file.

`make mutants` tries every mutant without a verdict, so a stopped run goes on where it was;
`ARGS="shl.method.barrier*"` tries those of one module again, `ARGS="--table"` only prints the
table, and `ARGS="--survivors shl.method"` the changes that no test notices. Once the mutants are
made, `ARGS="--sample 300"` tries that many of them, drawn at random and the same each time, and
prints what their score says about all.
tests/equivalent_mutants.toml lists what no test can or should notice, with the reasons.

mutmut starts pytest many times in one process, where jaxtyping's option may be given once only: so
its hook is installed here. This is a script, because nothing of `experiments` may be imported
before the mutated copy is on the path.
"""

import re
import sys
import tomllib
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path

from jaxtyping import install_import_hook
from mutmut.__main__ import cli
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from scipy.stats import binomtest

CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
COLUMNS = ("killed", "timeout", "survived", "equivalent", "no tests", "other", "not checked")


def main() -> None:
    """Run mutmut on what the command line names, and print the table."""
    option, *rest = sys.argv[1:] or [""]
    if option == "--survivors":
        _print_survivors(rest[0] if rest else "")
        return
    drawn, names, run = set[str](), sys.argv[1:], option != "--table"
    if option == "--sample":
        if len(rest) != 1 or not rest[0].isdecimal():
            sys.exit(f"--sample is followed by {rest}, it needs one number of mutants.")
        drawn = _drawn(int(rest[0]))
        unchecked = (name for name, verdict, _ in _all_mutants() if verdict == "not checked")
        names = [name for name in unchecked if name in drawn]
        run = bool(names)
    if run:
        install_import_hook(["shl"], CHECKER)
        cli(["run", *names], standalone_mode=False)
    _print_table()
    if drawn:
        counts = Counter(verdict for name, verdict, _ in _all_mutants() if name in drawn)
        noticed, missed = _noticed(counts)
        line = f"{f'a sample of {len(drawn)}':40}{_row(counts)}"
        # The quickest tests are run first, so that a part of the sample is no sample.
        if noticed + missed and not counts["not checked"]:
            low, high = binomtest(noticed, noticed + missed).proportion_ci(method="wilson")
            line += f", 95 % {low:.1%} to {high:.1%}"
        print(line)


def _drawn(count: int) -> set[str]:
    """The first mutants in an order that is random and depends on their names alone."""
    names = [name for name, _, _ in _all_mutants()]
    if not names:
        sys.exit("there are no mutants to draw from, run `make mutants` until they are made.")
    return set(sorted(names, key=lambda name: sha256(name.encode()).digest())[:count])


def _all_mutants() -> list[tuple[str, str, str]]:
    return [mutant for path in walk_mutatable_files() for mutant in _mutants(path)]


def _noticed(counts: Counter[str]) -> tuple[int, int]:
    """How many of the mutants that could be noticed were, and how many were not."""
    return (
        counts["killed"] + counts["timeout"],
        counts["survived"] + counts["no tests"] + counts["other"],
    )


def _print_table() -> None:
    """How many mutants of each file have which verdict."""
    print(f"{'file':40}" + "".join(f"{name:>12}" for name in (*COLUMNS, "score")))
    total = Counter[str]()
    for path in sorted(walk_mutatable_files()):
        counts = Counter(verdict for _, verdict, _ in _mutants(path))
        if counts:
            print(f"{path!s:40}{_row(counts)}")
        total += counts
    print(f"{'all':40}{_row(total)}")


def _row(counts: Counter[str]) -> str:
    """The counts, and the share of those that are noticed among those that could be."""
    noticed, missed = _noticed(counts)
    score = f"{noticed / (noticed + missed):12.1%}" if noticed + missed else ""
    return "".join(f"{counts[name]:12}" for name in COLUMNS) + score


def _print_survivors(prefix: str) -> None:
    """The changes that no test notices and no list explains."""
    for path in sorted(walk_mutatable_files()):
        for name, verdict, change in _mutants(path):
            if name.startswith(prefix) and verdict in ("survived", "no tests", "other"):
                print(f"# {name}: {verdict}\n{change}")


def _mutants(path: Path) -> list[tuple[str, str, str]]:
    """Name, verdict and change of every mutant of a file; the change of those unnoticed only."""
    data = SourceFileMutationData(path=path)
    data.load()
    found = []
    for name, code in data.exit_code_by_key.items():
        verdict, change = status_by_exit_code[code], ""
        if verdict not in COLUMNS:
            verdict = "other"
        if verdict in ("survived", "no tests", "other"):
            change = _change(name, path)
            if any(re.search(pattern, change, re.M) for pattern in _equivalent()):
                verdict = "equivalent"
        found.append((name, verdict, change))
    return found


def _change(name: str, path: Path) -> str:
    """The lines that a mutant takes away and puts in, under the name of its function."""
    lines = get_diff_for_mutant(name, path=path).splitlines()
    edits = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "\n".join([name.partition("__mutmut_")[0], *edits])


@cache
def _equivalent() -> list[str]:
    """Patterns of the changes in the list of equivalent mutants."""
    text = Path("tests/equivalent_mutants.toml").read_text("utf-8")
    return [row["change"] for row in tomllib.loads(text)["equivalent"]]


if __name__ == "__main__":
    main()
