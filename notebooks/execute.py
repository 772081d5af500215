"""Runs notebooks from top to bottom and writes their outputs back: python notebooks/execute.py [NOTEBOOK ...]

Without arguments, all that lie here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs the cells as Jupyter would in that folder.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell does.
    """
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def main(paths: list[Path]) -> None:
    for path in paths or sorted(Path(__file__).parent.glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = nbformat.read(path, 4)
        execute(notebook, path.parent)
        # Not which Python ran it: that would change every file.
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
