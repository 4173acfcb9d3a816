"""The notebook, from top to bottom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_shows_what_it_says(tmp_path: Path) -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # The value of a cell is that of its last line, as a notebook shows it.
    program = f"""
import ast
scope = {{}}
for cell in {code!r}:
    *rest, last = ast.parse(cell).body
    exec(compile(ast.Module(rest, []), "cell", "exec"), scope)
    if isinstance(last, ast.Expr):
        print(repr(eval(compile(ast.Expression(last.value), "cell", "eval"), scope)), flush=True)
    else:
        exec(compile(ast.Module([last], []), "cell", "exec"), scope)
"""
    file = tmp_path / "cells.py"
    file.write_text(program)
    end = subprocess.run(
        [sys.executable, str(file)],
        cwd=DOCS,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert end.returncode == 0, end.stderr
    assert "plug_in" in end.stdout and "weight" in end.stdout and end.stdout.count("<Figure size") == 2
    assert "Comment on the result." in end.stdout.splitlines()[-1]
