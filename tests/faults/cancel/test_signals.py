"""Ctrl-C and SIGTERM at random moments of ``asynccb demo``: the right status, and whole files."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import h5py
import pytest

from asynccb.models import load_model
from asynccb.storage.atomic import is_temporary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: each trial is a child of one")

SEED = 20_261_127
SPAN = 0.2
"""Seconds from the start of a child within which its signal comes: before, in and behind its first epochs."""

# Imports everything once; each line "folder <tab> epochs" is a child that runs the demo there. A child that
# has not got its signal handlers back when it is done says so by its status.
SERVER = """
import os, signal, sys, traceback
from asynccb import cli
from asynccb.callbacks import CSVLogger, ModelCheckpoint, TensorBoard
import h5py
digits = cli._digits()
cli._digits = lambda: digits
NUMBERS = signal.SIGINT, signal.SIGTERM
# Where all this runs in a shell's background Ctrl-C is ignored, and one that comes early would be lost.
signal.signal(signal.SIGINT, signal.default_int_handler)

def child(folder, epochs):
    os.chdir(folder)
    for number, name in ((1, "printed"), (2, "errors")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    before = [signal.getsignal(number) for number in NUMBERS]
    status = cli.main(["demo", "--epochs", epochs, "--out", "out"])
    sys.stdout.flush()
    given_back = [signal.getsignal(number) for number in NUMBERS] == before
    return status if given_back else 99

for line in sys.stdin:
    folder, epochs = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        status = 98
        try:
            status = child(folder, epochs)
        except KeyboardInterrupt:  # it came before or behind the command line
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

# What people write in its place: the handler ends the program, wherever it is, and saves are made in place.
NAIVE = """
import signal, sys
import h5py, numpy
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
weights = numpy.zeros(100_000)
print("begun", flush=True)
while True:
    with h5py.File(sys.argv[1], "w") as file:
        for layer in range(8):
            file.create_dataset(f"layer {layer}", data=weights)
"""


class Ended(NamedTuple):
    """How a child ended; what it wrote is in its folder."""

    status: int
    errors: str
    folder: Path


class Demos:
    """Children that run the demo, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        )
        self._number = 0

    def run(self, epochs: int, *signals: tuple[float, int]) -> Ended:
        """One demo, which gets each of the signals so many seconds after the one before."""
        self._number += 1
        folder = self._folder / str(self._number)
        folder.mkdir()
        self._tell(f"{folder}\t{epochs}")
        pid = int(self._told())
        while not (folder / "errors").exists():  # from here on what it says is read
            time.sleep(0.001)
        for seconds, number in signals:
            time.sleep(seconds)
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                break
        return Ended(int(self._told()), (folder / "errors").read_text(), folder)

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()

    def _tell(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()

    def _told(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


@pytest.fixture
def demos(folder: Path) -> Iterator[Demos]:
    demos = Demos(folder)
    yield demos
    demos.close()


def check_files(folder: Path) -> tuple[int, int]:
    """Every file under its own name is whole. Answers how many checkpoints and rows there are, and lets
    nobody be half-written."""
    models = [*folder.rglob("*.hdf5"), *folder.rglob("*.h5")]
    for path in models:
        if not is_temporary(path.name):
            load_model(path)
    rows = 0
    for path in folder.rglob("*.csv"):
        text = path.read_bytes().decode()
        assert text == "" or text.endswith("\r\n"), text
        table = list(csv.reader(text.splitlines()))
        assert len({len(row) for row in table}) <= 1, text
        rows += max(0, len(table) - 1)
    return len(models), rows


def signal_at_random(demos: Demos, trials: int, kinds: list[tuple[int, ...]]) -> None:
    saved = rows = stopped = 0
    for trial in range(trials):
        chance = random.Random(SEED + trial)
        numbers = kinds[trial % len(kinds)]
        epochs = chance.choice([1, 10**6, 10**6, 10**6])
        moments = [chance.uniform(0, SPAN), *(chance.uniform(0, 0.03) for _ in numbers[1:])]
        told = f"seed {SEED + trial}, {epochs} epochs, {list(zip(moments, numbers, strict=True))}"
        # Only one that ends by itself is done before its signal.
        ended = demos.run(epochs, *zip(moments, numbers, strict=True))
        status = 128 + numbers[0]
        begun = (ended.folder / "out").exists()
        allowed = {status} | ({0} if epochs == 1 else set())
        if numbers[0] == signal.SIGTERM and not (begun and epochs > 1 and len(numbers) == 1):
            # Before the trainings have begun and after they have ended it is the system's (143 to a shell).
            allowed.add(-signal.SIGTERM)
        assert ended.status in allowed, (told, ended.errors)
        # Before the trainings have begun, what an interrupt leaves is the interpreter's to say.
        assert not begun or "Traceback" not in ended.errors, (told, ended.errors)
        try:
            models, written = check_files(ended.folder)
        except Exception as error:
            error.add_note(told)
            raise
        if len(numbers) == 1:  # the second one leaves at once, and what is half-written stays so
            assert not [path for path in ended.folder.rglob("*") if is_temporary(path.name)], told
        shutil.rmtree(ended.folder)
        saved, rows, stopped = saved + models, rows + written, stopped + ("Stopping" in ended.errors)
    # It is no test if the signals came before anything had been written, or behind it all.
    assert saved > trials / 2
    assert rows > trials / 2
    assert stopped > trials / 2


ALL = [
    (signal.SIGINT,),
    (signal.SIGTERM,),
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGTERM),
]


@pytest.mark.timeout(300)
def test_a_signal_at_a_hundred_random_moments_gives_its_status_and_leaves_whole_files(demos: Demos) -> None:
    signal_at_random(demos, 100, ALL)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_signal_at_five_hundred_random_moments_gives_its_status_and_leaves_whole_files(
    demos: Demos,
) -> None:
    signal_at_random(demos, 500, ALL)


def test_a_handler_that_ends_the_program_leaves_half_a_file_of_a_save_in_place(tmp_path: Path) -> None:
    """The negative control. (It may also vanish in a destructor, and then the program never ends.)"""
    broken = 0
    for trial in range(10):
        path = tmp_path / f"{trial}.h5"
        process = subprocess.Popen([sys.executable, "-c", NAIVE, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(SEED + trial).uniform(0.01, 0.05))
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return
        try:
            with h5py.File(path) as file:
                broken += len(file) < 8
        except OSError:
            broken += 1
        if broken:
            return
    raise AssertionError(f"ten saves in place were whole (seed {SEED})")
