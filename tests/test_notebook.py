"""The notebook runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[1] / "examples" / "quick_start.ipynb"
BASE = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def test_no_outputs_are_kept() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert len(cells) > 4
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_every_cell_runs(pico_model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOK, as_version=4)
    assert BASE in book.cells[1].source
    book.cells[1].source = book.cells[1].source.replace(BASE, repr(str(pico_model_folder)))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    pages = "".join(output.data.get("text/html", "") for output in shown if output.output_type == "execute_result")
    assert all(f"<caption>{name}</caption>" in pages for name in ("Task", "AdapterZoo", "CVAELoRAGenerator"))
    assert (tmp_path / "quick-start" / "adapter" / "adapter_model.safetensors").is_file()
    assert any("ADAPTED" in output.get("text", "") for output in shown)
