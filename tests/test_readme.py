"""README's code runs, and what it says about the files is so.

Each ```` ```python ```` block is a program of its own: it runs in a fresh namespace, may ``await`` at
its top level as in a notebook, and finds what the blocks above it have written, since all run in one
folder. ``__name__`` is not ``"__main__"``, so that a block can end in a line that serves for ever.
``<!-- not run: reason -->`` on the line before a block lets it out; ``<!-- needs: keras, jax -->`` has it
run in a process of its own where these are installed.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""


class Block(NamedTuple):
    language: str
    line: int
    source: str
    not_run: str
    needs: tuple[str, ...] = ()


def _blocks(text: str) -> list[Block]:
    """The fenced blocks, each with the number of its first line."""
    found, lines = [], text.splitlines()
    opening = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opening is None:
            opening = number
            continue
        said = re.fullmatch(r"<!-- (not run|needs): (.+) -->", lines[opening - 1]) if opening else None
        excuse, needs = ("", "") if said is None else (said[2], "") if said[1] == "not run" else ("", said[2])
        source = "\n".join(lines[opening + 1 : number]) + "\n"
        found.append(
            Block(
                lines[opening][3:].strip(),
                opening + 2,
                source,
                excuse,
                tuple(needs.split(", ") if needs else ()),
            )
        )
        opening = None
    return found


BLOCKS = _blocks(TEXT)


def _run(source: str, line: int, filename: str) -> None:
    padded = "\n" * (line - 1) + source  # so that a traceback names README's own lines
    code = compile(padded, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, {"__name__": "readme"})
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(result)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


RUNNABLE = [block for block in BLOCKS if block.language == "python" and not (block.not_run or block.needs)]
HEAVY = [block for block in BLOCKS if block.needs]


@pytest.mark.parametrize("block", RUNNABLE, ids=[f"line {block.line}" for block in RUNNABLE])
def test_the_code_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    _run(block.source, block.line, str(README))


@pytest.mark.heavy
@pytest.mark.timeout(150)
@pytest.mark.parametrize("block", HEAVY, ids=[f"line {block.line}" for block in HEAVY])
def test_the_code_for_a_framework_runs(block: Block, tmp_path: Path) -> None:
    for name in block.needs:
        if importlib.util.find_spec(name) is None:  # not imported: Keras' backend is another process's affair
            pytest.skip(f"needs {name}")
    subprocess.run(
        [sys.executable, __file__, str(block.line)],
        cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=140,
    )


def test_there_is_code_and_all_of_it_is_closed() -> None:
    assert RUNNABLE
    assert TEXT.count("\n```") == 2 * len(BLOCKS)


# ---------------------------------------------------------------- the tree of files


def _tree(source: str) -> dict[str, str]:
    """``{path: description}`` of an indented tree; names that end in a slash are folders."""
    entries: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in source.splitlines():
        if not (entry := re.match(r"([\s│├└─]*)(\S+)\s*(.*)", line)):
            continue
        column, name, words = len(entry[1]), entry[2], entry[3]
        above = [(left, folder) for left, folder in above if left < column]
        path = "".join(folder for _, folder in above) + name
        assert path not in entries, f"{path} stands there twice"
        entries[path] = words
        if name.endswith("/"):
            above.append((column, name))
    return entries


TREE = next(
    (_tree(block.source) for block in BLOCKS if re.search(r"^asynccb/", block.source, re.MULTILINE)), {}
)


def _modules() -> set[str]:
    """Every module; a package's ``__init__.py`` stands in the line of its folder."""
    files = {path.relative_to(ROOT) for path in (ROOT / "asynccb").rglob("*.py")}
    return {f"{file.parent}/" if file.name == "__init__.py" else str(file) for file in files}


def test_the_tree_names_every_module() -> None:
    assert sorted(_modules() - set(TREE)) == []


def test_the_tree_names_nothing_that_is_not_there() -> None:
    assert [path for path in TREE if not (ROOT / path).exists()] == []


def test_every_line_of_the_tree_says_something() -> None:
    assert [path for path, words in TREE.items() if not words] == []


# ---------------------------------------------------------------- links and commands


def test_relative_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", TEXT)
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("command", ["asynccb demo", "&& pytest"])
def test_the_commands_that_the_check_runs_stand_there_once(command: str) -> None:
    shells = [block for block in BLOCKS if block.language in {"console", "bash", "sh", "shell"}]
    lines = [line.removeprefix("$ ") for block in shells for line in block.source.splitlines()]
    assert len([line for line in lines if line.startswith("pip install -e") and command in line]) == 1


# ---------------------------------------------------------------- negative controls

SAMPLE = """
```python
import asyncio
await asyncio.sleep(0)
print(__name__)
```
<!-- not run: it serves for ever -->
```python
raise SystemExit
```
```text
asynccb/       all of it
├── bus/       delivery
│   └── a.py   one
└── b.py
```
"""


def test_blocks_and_trees_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    code, excused, tree = _blocks(SAMPLE)
    assert (code.language, code.line, code.not_run) == ("python", 3, "")
    assert excused.not_run == "it serves for ever"
    assert _tree(tree.source) == {
        "asynccb/": "all of it",
        "asynccb/bus/": "delivery",
        "asynccb/bus/a.py": "one",
        "asynccb/b.py": "",
    }
    _run(code.source, code.line, "sample")
    assert capsys.readouterr().out == "readme\n"


def test_a_block_that_raises_fails_at_its_own_line() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        _run("await __import__('asyncio').sleep(0)\n1 / 0\n", 7, "sample")
    assert caught.traceback[-1].lineno + 1 == 8


if __name__ == "__main__":
    for chosen in HEAVY:
        if chosen.line == int(sys.argv[1]):
            _run(chosen.source, chosen.line, str(README))
