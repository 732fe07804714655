"""How much memory saves take: the peak during saves over the peak before them, by the size of the state.

    python tests/benchmarks/memory.py [--rounds 5]

256 MB of weights in 200 tensors. A fresh process trains without saving, notes the peak of that (VmHWM), and
trains on with saves; what the peak has grown by is divided by the state. "apart": each file is written before
the next save, so that one snapshot lives at a time. "at once": a save after every step, so that a second
snapshot is always in flight (asynccb alone: its peers queue without a bound, or wait). Every figure is a
process of its own, so that rounds are few. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Contender, Result, Scale, main
from savers import PEERS, Job, trains

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = Job(256, 200, 2)
SMALL = Job(40, 10, 2)
MOST_ROUNDS = 2
STEPS = 5
"""Without a save."""
WAYS = {"apart": (20, 3), "at once": (1, 8)}
"""Steps from one save to the next, enough to write a file or as few as can be, and how many saves."""


def peak() -> int:
    """The most memory that this process has held since the last reset, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmHWM")


def forget_peak() -> None:
    """What was freed goes back to the system, so that it is neither in the peak nor taken from unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def watched(name: str, job: Job, folder: str) -> Callable[[int, int], float]:
    """Call it once, with the steps from one save to the next and the number of saves; it answers bytes."""
    train = trains(name, job, folder)

    def run(every: int, saves: int) -> float:
        train(2, 0)  # what is made once is made
        forget_peak()
        train(STEPS, 0)
        before = peak()
        forget_peak()
        train(saves * every, every)
        return peak() - before

    return run


def measure(scale: Scale) -> Result:
    job = SMALL if scale.quick else STATE
    result = Result("memory", notes=[f"{job}; growth of the peak / size of the state; one BLAS thread"])
    growth: dict[str, list[float]] = {}
    for _ in range(min(scale.rounds, MOST_ROUNDS)):
        for name in ("asynccb", "copyto", "h5py inline", *(PEERS if scale.peers else ())):
            for way, asked in WAYS.items():
                if way == "apart" or name == "asynccb":
                    found = _growth(result, name, job, asked)
                    growth.setdefault(f"{name}, {way}", []).extend(found)
    for what, values in growth.items():
        if values:
            target = {"asynccb, apart": 1.1, "asynccb, at once": 2.1}.get(what)
            result.claim(f"peak during saves: {what}", values, "x state", target)
    return result


def _growth(result: Result, name: str, job: Job, asked: tuple[int, int]) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        contender = Contender(name, watched, name, job, folder)
        try:
            if contender.missing is None:
                return [contender(*asked) / (job.megabytes * 2**20)]
        finally:
            contender.close()
    if f"{name} ({contender.missing})" not in result.left_out:
        result.left_out.append(f"{name} ({contender.missing})")
    return []


if __name__ == "__main__":
    main(measure, __doc__)
