"""A process without threads that forks a child for each trial: ``python -m disk_faults.server``.

Everything is imported once; HDF5 is first used in the children. A request is a line of JSON on standard
input, see :meth:`disk_faults.client.Server.ask`; so is the answer on standard output, see
:class:`disk_faults.client.Answer`.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any

from disk_faults import jobs


def main() -> None:
    gc.collect()
    gc.freeze()
    assert threading.active_count() == 1
    for line in sys.stdin.buffer:
        print(json.dumps(trial(json.loads(line))), flush=True)


def trial(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one job in a child of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _be_the_child(request, writing)
    os.close(writing)
    said = bytearray()
    if request["kill_after"] is not None:
        if request["from_first_word"]:
            said += os.read(reading, 1 << 16)
        time.sleep(request["kill_after"] / 1000)
        os.kill(child, signal.SIGKILL)
    hangs = not _take(reading, said, request["deadline"])
    if hangs:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": killed_by, "hangs": hangs, "said": said.decode().splitlines()}


def _take(reading: int, said: bytearray, deadline: float) -> bool:
    """All that is said up to the end; False if there was silence for ``deadline`` seconds."""
    while True:
        if not select.select([reading], [], [], deadline)[0]:
            return False
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            return True
        said += chunk


def _be_the_child(request: dict[str, Any], writing: int) -> None:
    try:
        getattr(jobs, request.pop("job"))(lambda line: os.write(writing, f"{line}\n".encode()), request)
    except BaseException:
        os.write(writing, json.dumps({"broken": traceback.format_exc()}).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
