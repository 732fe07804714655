"""The process that forks one child for each trial. It imports everything once and starts no thread; only the
children train, and may be killed.

Reads requests from standard input and answers on standard output, a line of JSON each::

    {"name": ..., "folder": ..., "epochs": 4, "reference": [...], "kill_at": 17, "kill_after": null,
     "patient": true, "naive": null}
    {"status": 0, "answer": {...}, "said": ""}         it came to its end
    {"status": -9, "answer": null, "said": ""}         it was killed

``patient``: each step waits until the backup before it is written. ``kill_after``: seconds after which the
child is killed from outside.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resume_faults import trainings


def _child(request: dict[str, Any], answer: int, said: int) -> None:
    os.dup2(said, 2)
    os.dup2(said, 1)
    code = 1
    if request["naive"]:
        trainings.forget(request["naive"])
    try:
        result = asyncio.run(
            trainings.train(
                request["name"],
                Path(request["folder"]),
                request["epochs"],
                request["reference"],
                request["kill_at"],
                patient=request["patient"],
            )
        )
        with os.fdopen(answer, "w") as stream:
            json.dump(result, stream)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def _trial(request: dict[str, Any]) -> dict[str, Any]:
    out, answer = os.pipe()
    heard = os.memfd_create("said") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
    child = os.fork()
    if child == 0:
        os.close(out)
        _child(request, answer, heard)
    os.close(answer)
    if request["kill_after"] is not None:
        time.sleep(request["kill_after"])
        os.kill(child, signal.SIGKILL)
    with os.fdopen(out, "rb") as stream:
        result = stream.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os.lseek(heard, 0, os.SEEK_SET)
    said = os.read(heard, 1 << 16).decode(errors="replace")
    os.close(heard)
    return {"status": code, "answer": json.loads(result) if code == 0 else None, "said": said}


def main() -> None:
    import h5py  # noqa: F401 once, for all children

    for line in sys.stdin:
        print(json.dumps(_trial(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
