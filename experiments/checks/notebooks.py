"""Run the notebooks on the real model and store their outputs: `make notebooks`."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent.parent / "notebooks"


def refresh(path: Path) -> None:
    """Execute one notebook in its own folder and write it back with its outputs alone.

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


if __name__ == "__main__":
    # tqdm asks for widgets that nothing here needs.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    for name in sys.argv[1:] or sorted(p.name for p in FOLDER.glob("*.ipynb")):
        refresh(FOLDER / name)
        print(name)
