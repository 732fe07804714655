"""A training in a real notebook kernel: cells await at their top level."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# In a process of its own: the client of a kernel has threads and sockets, which are its own affair.
CLIENT = """
import json, sys, nbclient, nbformat.v4 as v4
notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in json.load(sys.stdin)])
nbclient.NotebookClient(notebook, timeout=45, kernel_name="python3", allow_errors=True).execute()
json.dump([cell.outputs for cell in notebook.cells], sys.stdout)
"""

BEGIN = """
import numpy as np
from asynccb import Trainer
from asynccb.models import Dense, Sequential
x = np.random.default_rng(7).random((320, 4), dtype="float32")
model = Sequential([Dense(1, input_dim=4)], seed=7)
model.compile("sgd", "mse")
"""


def _run(folder: Path, *cells: str) -> list[list[dict[str, Any]]]:
    """The outputs of each cell."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps([BEGIN, *cells]),
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    begin, *outputs = json.loads(done.stdout)
    assert begin == []
    return [list(cell) for cell in outputs]


def _text(outputs: list[dict[str, Any]]) -> str:
    assert {output["output_type"] for output in outputs} <= {"stream"}, outputs
    assert {output["name"] for output in outputs} <= {"stdout"}, outputs
    return "".join(output["text"] for output in outputs)


def test_a_cell_awaits_fit_and_shows_a_line_for_each_epoch(tmp_path: Path) -> None:
    [cell] = _run(
        tmp_path,
        "history = await Trainer(model).fit(x, x[:, :1], epochs=3, validation_split=0.5, verbose=1)\n"
        "print(history.outcome)",
    )
    shown = re.sub(r"\d+\.\d+", "#", _text(cell))
    shown = re.sub(r" - \d+s - ", " - ", shown)
    lines = [f"Epoch {epoch}/3 - loss: # - val_loss: #" for epoch in (1, 2, 3)]
    assert shown.splitlines() == [*lines, "completed"]


def test_a_training_goes_on_while_other_cells_look_at_it(tmp_path: Path) -> None:
    started, watched, copied, stopped = _run(
        tmp_path,
        "run = Trainer(model).start(x, x[:, :1], epochs=10**6, verbose=0)\nprint(run.outcome)",
        "async for event in run:\n"
        "    if event.hook == 'on_epoch_end':\n"
        "        break\n"
        "print(event.epoch < 10**6, run.state)",
        "copy = (await run.snapshot()).to_model()\nprint(copy.predict(x).shape)",
        "run.stop('seen enough')\nhistory = await run\nprint(history.outcome, history.reason)",
    )
    shown = [_text(cell) for cell in (started, watched, copied, stopped)]
    assert shown == ["None\n", "True running\n", "(320, 1)\n", "stopped seen enough\n"]


def test_to_interrupt_the_kernel_cancels_the_training_and_leaves_the_kernel_alive(tmp_path: Path) -> None:
    interrupted, after, again = _run(
        tmp_path,
        "import os, signal\n"
        "from asynccb.callbacks import CSVLogger, LambdaCallback\n"
        "def press(epoch, logs):\n"
        "    if epoch == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "trainer = Trainer(model)\n"
        "await trainer.fit(x, x[:, :1], epochs=10**6, verbose=0,\n"
        "                  callbacks=[LambdaCallback(on_epoch_end=press), CSVLogger('log.csv')])",
        "print(trainer.last_run.state)",
        "print((await trainer.fit(x, x[:, :1], epochs=2, verbose=0)).outcome)",
    )
    assert [output["output_type"] for output in interrupted] == ["error"], interrupted
    assert interrupted[0]["ename"] in {"CancelledError", "KeyboardInterrupt"}
    assert _text(after) == "cancelled\n"
    assert _text(again) == "completed\n"
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert rows[0] == "epoch,loss"
    assert [row.split(",")[0] for row in rows[1:4]] == ["0", "1", "2"]
    assert rows[-1].count(",") == 1
