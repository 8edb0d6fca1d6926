"""The notebook of the documentation runs from its first cell to its last."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook-first-run.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert book["nbformat"] == 4
    return book["cells"]


def carried_out(source: str, scope: dict[str, Any]) -> Any:
    """Runs a cell as a notebook does; the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), scope)
    return last and eval(compile(ast.Expression(last.value), "cell", "eval"), scope)


def test_it_is_kept_without_outputs(cells: list[dict[str, Any]]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_every_cell_runs_and_shows_something(
    cells: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    shown = [
        carried_out("".join(cell["source"]), scope) for cell in cells if cell["cell_type"] == "code"
    ]
    run = scope["run"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list("012")
    assert run.summary["clients"] == 3
    _, table, figure, frame, predicted, accuracies = shown
    assert "zero-shot accuracy" in table._repr_html_()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert list(frame["server_round"]) == [0, 1, 2]
    assert [one["image"] for one in predicted] == [0, 1]
    assert accuracies == (scope["other"].summary["accuracy"], run.summary["accuracy"])
    assert run.summary["accuracy"] > 0.8
