"""The server of trials as the tests see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import asynccb

HERE = Path(__file__).resolve().parent.parent
DEADLINE = 20.0
"""Seconds of silence after which a child hangs."""


class Answer(NamedTuple):
    """How a trial ended.

    Attributes:
        signal: what killed the child; 0 for nothing.
        hangs: whether it was killed because it was silent for too long.
        said: the lines of its job.
    """

    signal: int
    hangs: bool
    said: list[str]


def environment(shim: Path | None = None) -> dict[str, str]:
    """For a Python process that finds this folder and the package, and starts no thread by itself."""
    package = Path(str(asynccb.__file__)).parent.parent
    more = {"PYTHONPATH": f"{HERE}{os.pathsep}{package}", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | more | ({} if shim is None else {"LD_PRELOAD": str(shim)})


class Server:
    """A running server; ``close`` it."""

    def __init__(self, shim: Path) -> None:
        self._shim = shim
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "disk_faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(self._shim),
        )

    def ask(
        self,
        job: str,
        *,
        kill_after: float | None = None,
        deadline: float = DEADLINE,
        from_first_word: bool = False,
        **rest: Any,
    ) -> Answer:
        """Runs a job in a child of its own.

        Args:
            job: the name of a function in ``disk_faults.jobs``.
            kill_after: milliseconds to the child's SIGKILL, from the fork; None: it is left to itself.
            from_first_word: the time runs from the first line that the job says.
            deadline: seconds of silence after which it is killed as one that hangs.
            rest: for the job.

        Raises:
            RuntimeError: the job is broken.
        """
        request = {
            "job": job,
            "kill_after": kill_after,
            "from_first_word": from_first_word,
            "deadline": deadline,
            **rest,
        }
        try:
            answer = self._answer(json.dumps(request, default=str).encode())
        except BaseException:
            # The test was given up while the server was at work: its answer would be taken for the next one.
            self.close()
            self._start()
            raise
        if answer.said and answer.said[-1].startswith('{"broken"'):
            raise RuntimeError(json.loads(answer.said[-1])["broken"])
        return answer

    def _answer(self, request: bytes) -> Answer:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request + b"\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the server, behind the trial that runs."""
        self._process.communicate()
