"""Runs demo.ipynb. To write its outputs anew after a change (needs requirements-dev.txt):

python tests/demo_notebook.py
"""

import tempfile
from pathlib import Path

from processes import ENVIRONMENT, REPOSITORY

NOTEBOOK = REPOSITORY / "demo.ipynb"
LANGUAGE = {"name": "python"}  # without the versions that a kernel adds


def run_notebook(folder: Path, *cells: str):
    """Run demo.ipynb, and then more cells of code, in a folder; returns it with its outputs.

    The packages are imported here, because they are for developers.

    Raises nbclient.exceptions.CellExecutionError for the first error.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells += map(nbformat.v4.new_code_cell, cells)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=ENVIRONMENT)
    notebook.metadata.language_info = LANGUAGE
    return notebook


if __name__ == "__main__":
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = run_notebook(Path(folder))
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB")
