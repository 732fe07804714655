"""What one save costs the training: the stall, beside the peers and beside a copy in memory.

    python tests/benchmarks/stall.py [--rounds 5] [--full]

Stall per save = (wall of N steps with K saves - without) / K. The N steps with a save and the N without
alternate in one training: N batches after a save, N batches that follow them, and so on; N is long enough for
the file to be written meanwhile. So drift of the machine falls on both alike, and what a save costs later
than at its own batch counts too. The first save of a training is left out for everybody: it makes buffers,
folders and caches. "nothing" is the same reckoning on a training that does not save: the noise of the method.
"typical" takes the median over all saves for each of the N batches first, which a busy machine disturbs less,
and which leaves out what a save costs at another batch each time: it has no target.
The gate wait is what the training itself says that it waited for a copy or for memory to copy into, per save.

Limit: ``copyto`` of every tensor into warm buffers, in an inline hook of the same training at the same
batches, timed by itself. One BLAS thread: one of two cores is free for the copy and the file. Two: the
training uses both. What each contender does at a save stands in ``savers.py``. asynccb, Orbax and DCP
have the file on the disk (fsync) when a save is done, which the others do not.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from harness import Contenders, Result, Scale, alternate, main, over
from savers import ADAPTED, PEERS, SPARSE_PEERS, Job, Told, trains

if TYPE_CHECKING:
    from collections.abc import Sequence

OURS = ("asynccb", "copyto", "nothing")
BESIDE = ("h5py inline",)
SAVES = {1: 4, 40: 3, 256: 2}
"""That count, in each round."""
WINDOW = {1: 0.1, 40: 0.3, 256: 1.2}
"""Seconds between a save and what is compared with it, by megabytes: two to three times what a file takes."""
MOST_ROUNDS = 3


class Case(NamedTuple):
    job: Job
    threads: int
    peers: bool


USUAL = (
    Case(Job(1, 200, 32), 1, peers=False),
    Case(Job(40, 10, 32), 1, peers=False),
    Case(Job(40, 200, 32), 1, peers=True),
    Case(Job(40, 200, 32), 2, peers=True),
    Case(Job(40, 2_000, 32), 1, peers=False),
    Case(Job(256, 200, 16), 1, peers=True),
    Case(Job(256, 200, 16), 2, peers=False),
    Case(Job(256, 3, 64, sparse=True), 1, peers=False),
)
QUICK = (Case(Job(1, 10, 32), 1, peers=True),)


def every_case() -> list[Case]:
    """Every size with every number of tensors, and every peer, at both numbers of threads."""
    batches = {1: 32, 40: 32, 256: 16}
    jobs = [Job(size, tensors, batches[size]) for size in batches for tensors in (10, 200, 2_000)]
    jobs.append(Job(256, 3, 64, sparse=True))
    return [Case(job, threads, peers=True) for threads in (1, 2) for job in jobs]


def windows(ended: Sequence[float], window: int) -> list[tuple[list[float], list[float]]]:
    """For each save but the first, the seconds of the batches after it, and of as many that follow them; from
    when every batch had ended. Saves came after every 2 x ``window`` batches."""
    took = [late - early for early, late in itertools.pairwise(ended)]
    starts = range(4 * window - 1, len(took) - 2 * window + 1, 2 * window)
    return [(took[at : at + window], took[at + window : at + 2 * window]) for at in starts]


def stalls(ended: Sequence[float], window: int) -> list[float]:
    """Seconds that each save but the first cost."""
    return [sum(after) - sum(beside) for after, beside in windows(ended, window)]


def typical(answers: Sequence[Sequence[float]], window: int) -> float:
    """The same with each batch of a window standing for itself: the median over all saves of the first batch
    after them, of the second, and so on. Left out is what the machine did to one of them, and what a save
    costs in fewer than half of all cases."""
    pairs = [pair for ended in answers for pair in windows(ended, window)]
    after, beside = (zip(*(pair[side] for pair in pairs), strict=True) for side in (0, 1))
    return sum(map(statistics.median, after)) - sum(map(statistics.median, beside))


def steps_in(window: int, saves: int) -> int:
    """One more save than counts, and two windows after the last one."""
    return (saves + 1) * 2 * window + 2 * window


def measure(scale: Scale) -> Result:
    result = Result("stall", notes=["ms per save; files go to a folder of this machine's disk"])
    cases = QUICK if scale.quick else every_case() if scale.full else USUAL
    for case in cases:
        _measure_case(result, scale, case)
    return result


def _measure_case(result: Result, scale: Scale, case: Case) -> None:
    job, saves = case.job, 1 if scale.quick else SAVES[case.job.megabytes]
    peers = (SPARSE_PEERS if job.sparse else PEERS) if case.peers and scale.peers else ()
    with tempfile.TemporaryDirectory(prefix="stall-") as folder, Contenders() as there:
        beside = (*BESIDE, *(() if job.sparse else (ADAPTED,))) if case.peers and scale.peers else ()
        for number, name in enumerate((*OURS, *beside, *peers)):
            there.add(name, trains, name, job, f"{folder}/{number}", threads=case.threads)
        result.left_out += [name for name in there.missing if name not in result.left_out]
        window = _window(there, job)
        rows = {
            name: lambda name=name: there[name](
                steps_in(window, saves), 0 if name == "nothing" else 2 * window
            )
            for name in there
        }
        # The first save of each training, which does not count, is its warm-up.
        told = alternate(rows, min(scale.rounds, MOST_ROUNDS), warm_up=False)
    _say(result, case, window, told)


def _window(there: Contenders, job: Job) -> int:
    step = statistics.median(_steps([there["asynccb"](12, 0)]))
    return min(max(4, math.ceil(WINDOW[job.megabytes] / step)), 20_000)


def _say(result: Result, case: Case, window: int, told: dict[str, list[Told]]) -> None:
    title = f"{case.job}, {case.threads} BLAS"
    stall = {
        name: [statistics.median(stalls(answer.ended, window)) * 1e3 for answer in rounds]
        for name, rounds in told.items()
    }
    steps = {name: statistics.median(_steps(rounds)) * 1e3 for name, rounds in told.items()}
    usual = {
        name: typical([answer.ended for answer in rounds], window) * 1e3 for name, rounds in told.items()
    }
    for name, values in stall.items():
        result.detail(f"{title}: {name} (steps of {steps[name]:.1f} ms)", values, "ms")
        result.detail(f"{title}: {name}, typical", [usual[name]], "ms")
    limit = [statistics.median(answer.copies[1:]) * 1e3 for answer in told["copyto"]]
    gate = [answer.gate / max(1, answer.saved - 2) * 1e3 for answer in told["asynccb"]]
    result.detail(f"{title}: limit, the copy alone", limit, "ms")
    result.detail(f"{title}: asynccb, gate wait", gate, "ms")
    result.claim(f"{title}: gate wait / copy", over(gate, limit), "x", 0.15)
    target = 0.5 if case.threads == 1 else 1.0
    result.claim(f"{title}: stall / copy", over(stall["asynccb"], limit), "x", target)
    copy = [statistics.median(limit)]
    result.claim(f"{title}: stall / copy, typical", over([usual["asynccb"]], copy), "x")
    noise = [abs(value) for value in (*stall["nothing"], usual["nothing"])]
    result.claim(f"{title}: noise / copy, by round and typical", over(noise, copy * len(noise)), "x")
    if ADAPTED in stall:
        result.claim(f"{title}: {ADAPTED}, stall / copy", over(stall[ADAPTED], limit), "x", 1.1)
    peers = [name for name in stall if name in PEERS]
    if peers:
        best = min(peers, key=lambda name: statistics.median(stall[name]))
        result.claim(
            f"{title}: stall / {best}'s, the best peer's", over(stall["asynccb"], stall[best]), "x", 0.5
        )


def _steps(rounds: list[Told]) -> list[float]:
    return [late - early for told in rounds for early, late in itertools.pairwise(told.ended)]


if __name__ == "__main__":
    main(measure, __doc__)
