"""How long ``import asynccb`` takes, beside ``import numpy`` and beside the peers.

    python tests/benchmarks/imports.py [--rounds 5]

Each import happens in a fresh interpreter; what is said is its wall time less that of an interpreter that
imports nothing. Files are in the page cache and compiled, into a folder of this run's own: the first round
does not count. Where asynccb misses its target, the modules that take longest are named, as ``python -X
importtime`` tells them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

from harness import Result, Scale, alternate, environment, main, minus

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET = 80.0  # ms over numpy
OURS = ("numpy", "asynccb")
PEERS = ("ignite.engine", "keras", "torch", "lightning")


def _environment(folder: str) -> dict[str, str]:
    """Every module is compiled once, wherever it lies and whatever this shell says about that."""
    own = {**os.environ, **environment(1), "PYTHONPYCACHEPREFIX": folder}
    own.pop("PYTHONDONTWRITEBYTECODE", None)
    return own


def _import(module: str, env: dict[str, str]) -> Callable[[], float]:
    code = f"import {module}" if module else "pass"

    def run() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
        return (time.perf_counter() - began) * 1e3

    return run


def _there(module: str, env: dict[str, str]) -> bool:
    code = f"import {module}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).returncode == 0


def _longest(env: dict[str, str], count: int = 8) -> list[str]:
    """The modules that take longest themselves, without what they import."""
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import asynccb"],
        check=True,
        capture_output=True,
        text=True,
        env=env,
    ).stderr
    times = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", told)
    worst = sorted(((int(own), name) for own, name in times), reverse=True)[:count]
    return [f"{name}: {own / 1e3:.1f} ms" for own, name in worst]


def measure(scale: Scale) -> Result:
    result = Result("imports", notes=["fresh interpreters, less one that imports nothing"])
    asked = [*OURS, *(PEERS if scale.peers and not scale.quick else ())]
    with tempfile.TemporaryDirectory(prefix="imports-") as folder:
        env = _environment(folder)
        modules = [module for module in asked if module in OURS or _there(module, env)]
        figures = alternate({module: _import(module, env) for module in ("", *modules)}, scale.rounds)
        longest = _longest(env)
    result.left_out = [module for module in asked if module not in modules]
    bare = figures.pop("")
    times = {module: minus(values, bare) for module, values in figures.items()}
    for module, values in times.items():
        result.detail(f"import {module}", values, "ms")
    beyond = minus(times["asynccb"], times["numpy"])
    result.claim("import asynccb, beyond import numpy", beyond, "ms", TARGET)
    if result.claims[0].median > TARGET:
        result.notes += ["what takes longest itself:", *longest]
    return result


if __name__ == "__main__":
    main(measure, __doc__)
