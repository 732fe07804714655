"""``import asynccb`` starts nothing, opens nothing but its sources, and changes nothing of the process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SLOW = [
    *["torch", "keras", "tensorflow", "jax", "sklearn", "flax"],
    *["rich", "tensorboardX", "h5py", "aiohttp", "PIL", "pandas", "optuna"],
]

PROBE = """
import atexit, json, logging, os, signal, sys, threading
import numpy  # ours at module level; what it opens and starts is its own

def process():
    return {
        "threads": [thread.name for thread in threading.enumerate()],
        "handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "root handlers": [str(handler) for handler in logging.root.handlers],
        "root level": logging.root.level,
        "our handlers": [str(handler) for handler in logging.getLogger("asynccb").handlers],
        "our level": logging.getLogger("asynccb").level,
        "hooks": [str(hook) for hook in (sys.excepthook, threading.excepthook, sys.unraisablehook)],
        "streams": [str(stream) for stream in (sys.stdout, sys.stderr)],
        "switch interval": sys.getswitchinterval(),
        "environment": dict(os.environ),
        "atexit": atexit._ncallbacks(),
    }

opened, watching = [], False
def look(event, arguments):
    if not watching:
        return
    if event == "open":
        path, mode, flags = arguments
        source = isinstance(path, str) and path.endswith((".py", ".pyc", ".so", ".pth"))
        if not (source and not flags & (os.O_WRONLY | os.O_RDWR)) and not str(path).count(".pyc."):
            opened.append(["open", str(path), str(mode)])
    elif event.startswith(("socket.", "subprocess.", "os.fork", "os.exec", "_thread.start")):
        opened.append([event])
sys.addaudithook(look)

modules = set(sys.modules)
before = process()
watching = True
for name in sys.argv[1:]:
    __import__(name)
watching = False
print(json.dumps({
    "before": before, "after": process(), "opened": opened,
    "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
}))
"""


def _probe(*modules: str, cwd: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, "-c", PROBE, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    return _probe("asynccb", "asynccb.callbacks", "asynccb.models", "asynccb.testing")


def test_the_process_is_as_before(answer: dict[str, Any]) -> None:
    assert answer["after"] == answer["before"]
    assert answer["after"]["threads"] == ["MainThread"]


def test_nothing_is_opened_and_nothing_is_started(answer: dict[str, Any]) -> None:
    assert answer["opened"] == []


def test_no_framework_and_no_slow_library_is_loaded(answer: dict[str, Any]) -> None:
    assert "asynccb" in answer["loaded"]
    assert sorted(set(answer["loaded"]) & set(SLOW)) == []


def test_a_loud_import_would_be_heard(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import logging, threading, signal, socket, h5py\n"
        "logging.basicConfig()\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "socket.socket().close()\n"
        "open('loud.txt', 'w').close()\n"
    )
    answer = _probe("loud", cwd=tmp_path)
    changed = {name for name, value in answer["before"].items() if answer["after"][name] != value}
    assert {"threads", "handlers", "root handlers"} <= changed
    assert ["open", "loud.txt", "w"] in answer["opened"]
    assert ["socket.__new__"] in answer["opened"]
    assert "h5py" in answer["loaded"]
