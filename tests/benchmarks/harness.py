"""How all benchmarks of this folder measure, and how they say it.

Each contender (asynccb, a peer, the physical limit) lives in a fresh process of its own, whose number of BLAS
threads is set before anything is imported (or left as a user finds it), so that no framework's threads or
memory stand beside another's.
The contenders take turns: each is asked once a round, in an order that rotates. What is said is the median
over the rounds with the least and the most of them, and ratios are taken within a round. One round before the
first does not count.

A benchmark is a module with ``measure(scale) -> Result`` and ``main(measure)`` at its end; nothing in it
asserts a time.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection
    from types import TracebackType
    from typing import Self

K = TypeVar("K")
T = TypeVar("T")

PACKAGES = (
    *("numpy", "h5py", "aiohttp", "keras", "jax", "torch", "lightning", "pytorch-ignite", "orbax-checkpoint"),
    *("joblib", "ray"),
)
NEEDED = ("asynccb", "numpy", "h5py")


class Scale(NamedTuple):
    """How much is measured.

    Attributes:
        rounds: how often each contender is asked, where the benchmark does not need more.
        quick: a smoke run: the figures mean little.
        full: every combination, not only the telling ones.
        peers: whether others than asynccb and the limits are asked.
    """

    rounds: int = 5
    quick: bool = False
    full: bool = False
    peers: bool = True


@dataclass
class Figure:
    """One line of a table: a value for each round, and what it should be at most, where that was promised."""

    what: str
    values: list[float]
    unit: str
    target: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """Whether the target was met, or in how many of the rounds where they do not agree."""
        if self.target is None:
            return ""
        if math.isinf(self.median):
            return "lost in the noise"
        if self.median < 0 < self.target:
            return "met, below the noise"
        met = sum(value <= self.target for value in self.values)
        if met in (0, len(self.values)):
            return "met" if met else "missed"
        return f"met in {met} of {len(self.values)}"

    def line(self) -> str:
        target = "" if self.target is None else f"<= {self.target:g}"
        figures = "".join(
            f"{number(value):>10}" for value in (self.median, min(self.values), max(self.values))
        )
        return f"{self.what:62}{figures}  {self.unit:12}{target:>8}  {self.verdict}".rstrip()


@dataclass
class Result:
    """What one benchmark found.

    Attributes:
        claims: the lines of the one table.
        details: what they were computed from.
        notes: what each contender does, where that is not plain from its name.
        left_out: contenders that are not installed.
    """

    name: str
    claims: list[Figure] = field(default_factory=list)
    details: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def claim(self, what: str, values: Sequence[float], unit: str, target: float | None = None) -> None:
        self.claims.append(Figure(what, list(values), unit, target))

    def detail(self, what: str, values: Sequence[float], unit: str) -> None:
        self.details.append(Figure(what, list(values), unit))

    def show(self) -> None:
        print(f"\n== {self.name}")
        for note in self.notes:
            print(f"   {note}")
        for title, figures in (("measured", self.details), ("said of it", self.claims)):
            if figures:
                print(f"\n{title:62}{'median':>10}{'least':>10}{'most':>10}")
                print("\n".join(figure.line() for figure in figures))
        if self.left_out:
            print(f"\nleft out, not installed: {', '.join(self.left_out)}")
        sys.stdout.flush()


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


# Contenders -------------------------------------------------------------------------------------------------


class Contender:
    """A process in which one contender runs when it is called.

    Args:
        name: how it is called in tables.
        setup: called in the process; imports what it needs, and answers the function that each call runs. An
            ImportError means that the peer is not installed.
        arguments: of ``setup``.
        threads: of BLAS, torch and XLA; None: nothing is set, as where a user has set nothing.
        children: whether the function starts processes of its own; it has to end them before it returns.

    Attributes:
        pipe: can be read when there is an answer; for :func:`multiprocessing.connection.wait`.

    Raises:
        RuntimeError: from the constructor or a call, with the traceback of the process.
    """

    def __init__(
        self,
        name: str,
        setup: Callable[..., Any],
        *arguments: Any,
        threads: int | None = 1,
        children: bool = False,
    ) -> None:
        self.name = name
        self.missing: str | None = None
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        # A daemon may have no children.
        self._process = context.Process(target=_serve, args=(other, setup, arguments), daemon=not children)
        with _environ(environment(threads)):  # a spawned process is born with ours
            self._process.start()
        other.close()
        self.missing = self.answer()

    def __call__(self, *arguments: Any) -> Any:
        self.ask(*arguments)
        return self.answer()

    def ask(self, *arguments: Any) -> None:
        """Begins a call, whose result :meth:`answer` waits for: several contenders work at once."""
        self.pipe.send(arguments)

    def close(self) -> None:
        self.pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def answer(self) -> Any:
        try:
            well, answer = self.pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process died ({self._process.exitcode})") from None
        if not well:
            raise RuntimeError(f"{self.name}:\n{answer}")
        return answer


class Contenders:
    """Those of one table that are installed, by name; closed at the end of a ``with`` block.

    Attributes:
        missing: what the others lack.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._there: dict[str, Contender] = {}

    def add(
        self,
        name: str,
        setup: Callable[..., Any],
        *arguments: Any,
        threads: int | None = 1,
        children: bool = False,
    ) -> None:
        contender = Contender(name, setup, *arguments, threads=threads, children=children)
        if contender.missing is None:
            self._there[name] = contender
        else:
            self.missing.append(f"{name} ({contender.missing})")
            contender.close()

    def __getitem__(self, name: str) -> Contender:
        return self._there[name]

    def __contains__(self, name: str) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for contender in self._there.values():
            contender.close()


def environment(threads: int | None) -> dict[str, str | None]:
    """Variables that numpy's BLAS, torch, JAX and Keras read as they are imported; None: not set."""
    number = None if threads is None else str(threads)
    return {
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), number),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false" if threads == 1 else "",
        "NPROC": number,  # the size of XLA's pool of threads
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
    }


@contextmanager
def _environ(variables: Mapping[str, str | None]) -> Iterator[None]:
    before = dict(os.environ)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, setup: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The life of a contender's process: frameworks talk, so nothing it prints is shown."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        run = setup(*arguments)
        pipe.send((True, None))
    except ImportError as error:
        missing = error.name or str(error)
        pipe.send((missing not in NEEDED, f"needs {missing}"))
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            os._exit(0)  # a framework's threads are not waited for
        try:
            pipe.send((True, run(*asked)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


# Rounds -----------------------------------------------------------------------------------------------------


def alternate(rows: Mapping[K, Callable[[], T]], rounds: int, *, warm_up: bool = True) -> dict[K, list[T]]:
    """Asks every row once a round, first another one each time, after a round that does not count."""
    names, figures = list(rows), {name: list[T]() for name in rows}
    for turn in range(-1 if warm_up else 0, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            answer = rows[name]()
            if turn >= 0:
                figures[name].append(answer)
    return figures


class Took(NamedTuple):
    """Seconds by the clock, and of processor time of all threads together."""

    wall: float
    cpu: float

    @classmethod
    def by(cls, work: Callable[[], Any]) -> Took:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)


def minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def over(left: Sequence[float], right: Sequence[float]) -> list[float]:
    """Ratios; infinite where what is divided by got lost in the noise, so that no target is met by that."""
    return [a / b if b > 0 else math.inf for a, b in zip(left, right, strict=True)]


# The command line -------------------------------------------------------------------------------------------


def cores() -> int:
    """Processors that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def machine() -> str:
    """Where the figures come from, in a few lines."""
    model = platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    there = [f"{package} {version}" for package in PACKAGES if (version := _version(package))]
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, load before {busy}\n"
        f"Python {platform.python_version()}, {', '.join(there)}"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parser(description: str | None) -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    commands.add_argument("--rounds", type=int, default=None, help="rounds that count; 5, or 1 with --quick")
    commands.add_argument("--quick", action="store_true", help="a smoke run, whose figures mean little")
    commands.add_argument("--full", action="store_true", help="every size and every peer everywhere")
    commands.add_argument("--no-peers", action="store_true", help="asynccb and the limits only")
    commands.add_argument("--json", metavar="FILE", help="write the figures there")
    return commands


def scale_of(given: argparse.Namespace) -> Scale:
    rounds = given.rounds or (1 if given.quick else Scale().rounds)
    return Scale(rounds, given.quick, given.full, not given.no_peers)


def save(path: str, results: Sequence[Result]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "results": [asdict(result) for result in results]}, file, indent=1)


def main(measure: Callable[[Scale], Result], description: str | None) -> None:
    """The command line of one benchmark."""
    given = parser(description).parse_args()
    print(machine())
    result = measure(scale_of(given))
    result.show()
    if given.json:
        save(given.json, [result])
