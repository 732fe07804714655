"""The test's side of the server of trials."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

SERVER = Path(__file__).with_name("server.py")
EPOCHS = 4


class Trial(NamedTuple):
    """How a child ended.

    Attributes:
        status: 0, or minus the signal that killed it.
        answer: what ``trainings.train`` answered, if it came to its end.
        said: what it wrote to the standard streams.
    """

    status: int
    answer: Any
    said: str


class Server:
    """A process that forks trials.

    Args:
        root: of the checkout, for the children's imports.
    """

    def __init__(self, root: Path) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(root),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "error,ignore:Inline hooks have cost",  # those of the tests, on a busy host
        }
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def trial(
        self,
        name: str,
        folder: Path,
        reference: list[str],
        *,
        kill_at: int | None = None,
        kill_after: float | None = None,
        naive: str | None = None,
        epochs: int = EPOCHS,
    ) -> Trial:
        """One training, to its end or to its death."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "name": name,
            "folder": str(folder),
            "epochs": epochs,
            "reference": reference,
            "kill_at": kill_at,
            "kill_after": kill_after,
            "patient": kill_after is None,
            "naive": naive,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Trial(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def reference(self, name: str, folder: Path, epochs: int = EPOCHS) -> Any:
        """The training that nobody interrupts."""
        fresh(folder)
        trial = self.trial(name, folder, [], epochs=epochs)
        assert trial.status == 0, trial.said
        return trial.answer


def fresh(folder: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
