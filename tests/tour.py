"""Executes examples/tour.ipynb. As a program it stores the results in the notebook: python -m tests.tour"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(folder: Path) -> Any:
    """The notebook after its cells ran in a folder. Raises CellExecutionError for a cell that fails."""
    notebook: Any = nbformat.read(TOUR, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, resources=resources, record_timing=False).execute()
    return notebook


def trimmed(notebook: Any) -> Any:
    """The notebook with each image in the smaller of the two formats that Pillow gives, and no word on the machine."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        images = sorted(
            (key for key in output.get("data", {}) if key.startswith("image/")), key=lambda key: len(output.data[key])
        )
        for larger in images[1:]:
            del output.data[larger]
        if images:
            output.data["text/plain"] = "<an image>"  # Pillow's line has an address in memory
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(trimmed(execute(Path(folder))), TOUR)
