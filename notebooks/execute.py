"""Runs notebooks from top to bottom and writes their outputs back: python notebooks/execute.py [NOTEBOOK ...]

Without arguments, all that lie here. A cell's metadata ``alt`` says in words what its picture shows; the picture of the
cell tagged ``cover`` is also written to docs/pictures, for the README.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
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


Node = nbformat.NotebookNode


def pictures(notebook: Node) -> Iterator[tuple[Node, Node]]:
    """Each cell that shows a picture, and the output that holds it."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield cell, output


def main(paths: list[Path]) -> None:
    for path in paths or sorted(Path(__file__).parent.glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = nbformat.read(path, 4)
        execute(notebook, path.parent)
        for cell, output in pictures(notebook):
            output.metadata["image/png"] = {
                "alt": cell.metadata.get("alt", "")
            }  # nbconvert's place
            if "cover" in cell.metadata.get("tags", []):
                cover = path.parent.parent / "docs" / "pictures" / f"{path.stem}.png"
                cover.write_bytes(base64.b64decode(output.data["image/png"]))
        # Not which Python ran it: that would change every file.
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
