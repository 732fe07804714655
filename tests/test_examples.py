"""Every example runs as it stands, in an empty folder, and prints what its first words say.

An example takes no options and ends by itself within seconds. Its docstring (a notebook: its first
cell) holds, after a line that ends in ``Prints, among others::``, indented lines that must come in this
order; ``...`` stands for any text.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(file.name for ending in ("*.py", "*.ipynb") for file in EXAMPLES.glob(ending))

HEAVY = {
    "existing_keras_script.py": ("keras", "jax"),
    "existing_lightning_script.py": ("torch", "lightning"),
    "jax_optax.py": ("jax", "optax"),
    "keras_service.py": ("keras", "jax"),
    "torch_digits.py": ("torch",),
}
"""Examples of a framework that may not be there, and what each imports of it."""

# Runs a notebook with a kernel of its own and prints what its cells printed.
NOTEBOOK = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=50, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.get("outputs", ()):
        print(output.get("text") or output.get("data", {}).get("text/plain", ""))
"""


def _promised(words: str) -> list[str]:
    """The lines that an example says it prints."""
    _, found, after = words.partition("Prints, among others::\n")
    assert found, "the example does not say what it prints"
    indented = re.match(r"(?:\n| +.*\n)+", f"{after}\n")
    assert indented is not None, "nothing is indented after 'Prints, among others::'"
    return [line for line in textwrap.dedent(indented[0]).splitlines() if line.strip()]


def _words(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    first: dict[str, Any] = json.loads(text)["cells"][0]
    return "".join(first["source"])


def _missing(promised: list[str], printed: str) -> list[str]:
    """The promised lines that do not come, or not after those before them."""
    rest, missing = printed, []
    for line in promised:
        pattern = ".*".join(re.escape(part) for part in line.rstrip().split("..."))
        if found := re.search(rf"^{pattern}\s*$", rest, re.MULTILINE):
            rest = rest[found.end() :]
        else:
            missing.append(line)
    return missing


def _printed(file: Path, folder: Path) -> str:
    how = [str(file)] if file.suffix == ".py" else ["-c", NOTEBOOK, str(file)]
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *how],
        cwd=folder,
        # Lightning has torch make a folder for compiled kernels, which it does not remove.
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "TORCHINDUCTOR_CACHE_DIR": str(folder)},
        capture_output=True,
        encoding="utf-8",
        timeout=190 if file.name in HEAVY else 55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def _parameter(name: str) -> Any:
    needs = HEAVY.get(name)
    if needs is None:
        return name
    missing = any(importlib.util.find_spec(module) is None for module in needs)
    skip = pytest.mark.skipif(missing, reason=f"it needs {' and '.join(needs)}")
    # A framework takes its time to come, on a busy machine many times as long.
    return pytest.param(name, marks=[pytest.mark.heavy, pytest.mark.timeout(200), skip])


@pytest.mark.parametrize("name", [_parameter(name) for name in FILES])
def test_it_prints_what_it_says(name: str, tmp_path: Path) -> None:
    printed = _printed(EXAMPLES / name, tmp_path)
    assert _missing(_promised(_words(EXAMPLES / name)), printed) == [], printed


def test_there_are_examples() -> None:
    assert FILES


def test_a_line_that_does_not_come_is_missed() -> None:
    promised = _promised(
        "An example.\n\nPrints, among others::\n\n    epoch 0: ...\n    done (...)\n\nMore words."
    )
    assert promised == ["epoch 0: ...", "done (...)"]
    assert _missing(promised, "epoch 0: loss 0.5\nepoch 1\ndone (x)\n") == []
    assert _missing(promised, "done (x)\nepoch 0: loss 0.5\n") == ["done (...)"]
    assert _missing(promised, "epoch 0: loss 0.5\n") == ["done (...)"]
