"""Execute the notebooks on the real model and store their outputs: `make notebooks`."""

import os
from dataclasses import dataclass
from pathlib import Path

import nbformat
import tyro
from nbclient import NotebookClient

from experiments.record.command import command

FOLDER = Path(__file__).parent.parent.parent / "notebooks"


def refresh(path: Path) -> None:
    """Execute a notebook in its folder and write it back with its outputs, without metadata.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        ValueError: a cell wrote to stderr, or an output names a folder of this machine.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(f"{path.name} wrote to stderr: {output['text'][:200]}")
            if str(Path.home()) in str(output) or str(path.parent) in str(output):
                raise ValueError(f"an output of {path.name} names a folder of this machine.")
            output.metadata = {}
    nbformat.write(notebook, path)


@dataclass(frozen=True)
class NotebooksConfig:
    """Which notebooks are executed."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """File names in notebooks/; default all."""


def refresh_all(config: NotebooksConfig) -> None:
    """Execute notebooks one after the other."""
    # tqdm warns about missing widgets, which no notebook uses.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    for name in config.names or sorted(p.name for p in FOLDER.glob("*.ipynb")):
        refresh(FOLDER / name)
        print(name)


def main() -> None:
    """The command line."""
    command(refresh_all, NotebooksConfig, __doc__)


if __name__ == "__main__":
    main()
