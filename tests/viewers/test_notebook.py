"""The example notebook runs from its first cell to its last, and shows its answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.viewer,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Jupyter's own libraries
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook.ipynb"


def test_the_example_notebook_runs(viewers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESSA_URL", viewers.url)
    monkeypatch.setenv("VESSA_API_KEY", viewers.api_key)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    kernels = tmp_path / "share" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
        '"display_name": "Python 3", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=280, kernel_name="python3", resources=place).execute()
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    tables = [o.data["text/html"] for o in shown if "data" in o and "text/html" in o.data]
    assert sum("disk" in table and "data:image/png" in table for table in tables) == 2
    assert any("4 of 4" in table for table in tables)
    for name in ("mask.png", "labels.nii.gz", "labels.seg.nrrd"):
        assert (tmp_path / name).stat().st_size > 0
