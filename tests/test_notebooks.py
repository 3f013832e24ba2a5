"""The notebooks run from beginning to end, with settings that take seconds."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
SMALL = {
    "mnist": "EPOCHS, SAMPLES, MEMORISE_EPOCHS = 1, 500, 5",
    "kmnist": "DATA, EPOCHS, SAMPLES, VALID = 'mnist', 1, 300, 100",
    "fashion": "DATA, EPOCHS, SAMPLES = 'mnist', 1, 500",
}


def test_every_notebook_is_run():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@pytest.mark.filterwarnings("default")  # of the machinery that runs them
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    [parameters] = tagged
    parameters.source = SMALL[name]
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if cell.source)
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
