"""Training steps of the numpy Sequential beside torch in eager mode and Keras on JAX, with equal threads.

    python tests/benchmarks/model.py [--rounds 9] [--threads 1 2] [--only SUBSTRING] [--seconds 0.3]

The work: one update on each of the same batches of 128, which lie ready in memory, and the loss as a number
after each. Models: the page's (784 inputs, 10 softmax outputs), one with a hidden layer of 256, and one whose
step takes about 20 ms; softmax and categorical cross-entropy, rmsprop and adam with Keras' defaults, float32.

    asynccb     ``Sequential.train_batch``, targets one-hot
    torch       a loop by hand: ``zero_grad``, ``cross_entropy`` on class numbers (its fastest form),
                ``backward``, ``step``; the fastest of the optimizer's loop, ``foreach`` and ``fused``
                forms, each with gradients kept or set to None
    keras       ``fit`` on JAX, compiled, without shuffle, callbacks or output

For each number of threads a process of its own, held to so many cores, in which all of them have that number
of threads. They are measured in turn within each round; shown are medians and ranges over the rounds, in
microseconds a step, and ratios of steps per second within a round: above 1 asynccb is faster. The kernel that
OpenBLAS chose is printed where threadpoolctl is there to ask. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, BATCHES, INPUTS, CLASSES = 128, 32, 784, 10


class Case(NamedTuple):
    hidden: tuple[int, ...]
    optimizer: str

    def __str__(self) -> str:
        return f"{'-'.join(map(str, (INPUTS, *self.hidden, CLASSES)))} {self.optimizer}"


CASES = [Case(hidden, name) for hidden in ((), (256,), (2048, 1024)) for name in ("rmsprop", "adam")]


def data() -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.random((BATCHES * BATCH, INPUTS), dtype=np.float32)
    return x, generator.integers(0, CLASSES, len(x))


# The three --------------------------------------------------------------------------------------------------


def ours(case: Case) -> Callable[[int], object]:
    import numpy as np

    from asynccb.models import Dense, Sequential
    from asynccb.protocols import Batch

    x, y = data()
    one_hot = np.eye(CLASSES, dtype=np.float32)[y]
    batches = [
        Batch(x[at : at + BATCH], one_hot[at : at + BATCH], None, BATCH) for at in range(0, len(x), BATCH)
    ]
    hidden = [Dense(units, activation="relu") for units in case.hidden]
    model = Sequential([*hidden, Dense(CLASSES, activation="softmax")], seed=0)
    model.build((None, INPUTS))
    model.compile(case.optimizer, "categorical_crossentropy")

    def run(steps: int) -> None:
        for step in range(steps):
            model.train_batch(batches[step % BATCHES])

    return run


def torch_by_hand(case: Case) -> Callable[[int], object]:
    """The fastest of torch's forms of this optimizer on this machine."""
    forms = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    if case.optimizer == "rmsprop":
        del forms["fused"]  # torch has none
    runs = {
        f"{name}, gradients {'set to None' if to_none else 'kept'}": _torch(case, form, to_none)
        for name, form in forms.items()
        for to_none in (True, False)
    }
    steps = {name: max(20, int(0.1 / _took(run, 20))) for name, run in runs.items()}
    took = {name: min(_took(run, steps[name]) for _ in range(3)) for name, run in runs.items()}
    best = min(took, key=lambda name: took[name])
    print(f"  torch's fastest form: {best}", flush=True)
    return runs[best]


def _torch(case: Case, form: dict[str, bool], to_none: bool) -> Callable[[int], object]:
    import torch

    x, y = (torch.from_numpy(array) for array in data())
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    sizes, layers = (INPUTS, *case.hidden), []
    for before, after in zip(sizes, case.hidden, strict=False):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], CLASSES))
    if case.optimizer == "adam":
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.001, eps=1e-7, **form)
    else:
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.001, alpha=0.9, eps=1e-7, **form)
    loss_of = torch.nn.functional.cross_entropy

    def run(steps: int) -> None:
        for step in range(steps):
            samples, targets = batches[step % BATCHES]
            optimizer.zero_grad(set_to_none=to_none)
            loss = loss_of(model(samples), targets)
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def keras_fit(case: Case) -> Callable[[int], object]:
    import keras
    import numpy as np

    x, y = data()
    one_hot = np.eye(CLASSES, dtype=np.float32)[y]
    hidden = [keras.layers.Dense(units, activation="relu") for units in case.hidden]
    model = keras.Sequential(
        [keras.Input((INPUTS,)), *hidden, keras.layers.Dense(CLASSES, activation="softmax")]
    )
    model.compile(case.optimizer, "categorical_crossentropy")

    def run(steps: int) -> None:
        repeats = -(-steps // BATCHES)
        model.fit(x, one_hot, batch_size=BATCH, epochs=repeats, shuffle=False, verbose=0)

    return run


# Measuring --------------------------------------------------------------------------------------------------


def _took(run: Callable[[int], object], steps: int) -> float:
    began = time.perf_counter()
    run(steps)
    return (time.perf_counter() - began) / steps


def rows(case: Case) -> dict[str, Callable[[int], object]]:
    made = {"asynccb": ours(case)}
    for name, module, make in (("torch", "torch", torch_by_hand), ("keras", "keras", keras_fit)):
        try:
            __import__(module)
        except ImportError:
            continue
        made[name] = make(case)
    return made


def measure(case: Case, rounds: int, seconds: float) -> None:
    runs = rows(case)
    steps = {}
    for name, run in runs.items():
        run(2 * BATCHES)
        whole = -(-seconds // (BATCHES * _took(run, 2 * BATCHES)))
        steps[name] = BATCHES * max(1, int(whole))
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(_took(run, steps[name]) * 1e6)
    for name, values in figures.items():
        line = f"{case!s:26}{name:9}{statistics.median(values):10.1f}{min(values):10.1f}{max(values):10.1f}"
        ratios = sorted(other / own for own, other in zip(figures["asynccb"], values, strict=True))
        ratio = f"{statistics.median(ratios):8.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(line + (ratio if name != "asynccb" else ""), flush=True)


def kernels() -> str:
    import numpy as np

    np.dot(np.ones((2, 2)), np.ones((2, 2)))
    try:
        import threadpoolctl
    except ImportError:
        return "unknown (threadpoolctl is not installed)"
    pools = threadpoolctl.threadpool_info()
    return ", ".join(
        f"{pool['internal_api']} {pool.get('architecture', '')} x {pool['num_threads']}" for pool in pools
    )


def child(threads: int, only: str, rounds: int, seconds: float) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        pass
    print(f"\n{threads} thread{'s' * (threads > 1)}; BLAS: {kernels()}")
    print(f"{'':35}{'median':>10}{'least':>10}{'most':>10}   asynccb/it")
    for case in CASES:
        if only in str(case):
            measure(case, rounds, seconds)


def environment(threads: int) -> dict[str, str]:
    """That of the child: so many threads for everybody, and the kernel that OpenBLAS chooses itself."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**kept, **dict.fromkeys(names, str(threads)), "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help="part of a case's name, such as 'adam' or '784-10 '")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.threads[0], given.only, given.rounds, given.seconds)
        return
    for threads in given.threads:
        command = [sys.executable, __file__, "--child", "--threads", str(threads), "--only", given.only]
        command += ["--rounds", str(given.rounds), "--seconds", str(given.seconds)]
        subprocess.run(command, env=environment(threads), check=True)


if __name__ == "__main__":
    main()
