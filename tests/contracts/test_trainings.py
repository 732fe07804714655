"""What a training promises, whichever model it drives: cancel, resume, a killed process, many at once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from subjects import MODELS, PARAMETERS, Subject, assert_same, batch, numbers

from asynccb import ArgumentError, Callback, RunCancelled, Trainer
from asynccb.callbacks import BackupAndRestore, ModelCheckpoint
from asynccb.models import adapt

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]

BATCH, EPOCHS = 5, 3
"""The last batch of an epoch is a short one."""

# A process that ends itself by SIGKILL in a batch of the second epoch, when a backup is on the disk.
KILLED = """
import asyncio, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from subjects import MODELS
from asynccb import Callback, Trainer
from asynccb.callbacks import BackupAndRestore

subject, folder = MODELS[sys.argv[2]], Path(sys.argv[3])
backup = BackupAndRestore(folder)

class Kills(Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if self.run.epoch == 1 and batch == 1:
            while backup.saved is None:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(Trainer(subject.make(), seed=3).fit(
    subject.x, subject.y, batch_size=5, epochs=3, verbose=0, callbacks=[backup, Kills()]))
"""


@pytest.fixture(params=PARAMETERS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def subject(name: str) -> Subject:
    return MODELS[name]


async def fit(given: Any, subject: Subject, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Its history; all but the epochs' times."""
    history = await Trainer(given, seed=3).fit(
        subject.x, subject.y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=list(callbacks)
    )
    return history.history


def state(given: Any) -> dict[str, Any]:
    return numbers(adapt(given).capture())


class At(Callback):
    """Does something behind a batch of the second epoch."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.run.epoch == 1 and batch == 1:
            self.act(self.run)


@pytest.mark.asyncio
async def test_cancelled_it_has_trained_the_batches_until_then_and_trains_on(subject: Subject) -> None:
    cancelled, by_hand = subject.make(), subject.make()
    trainer = Trainer(cancelled, seed=3)
    with pytest.raises(RunCancelled):
        await trainer.start(
            subject.x, subject.y, batch_size=4, epochs=2, shuffle=False, verbose=0,
            callbacks=At(lambda run: run.cancel("enough")),
        )  # fmt: skip
    model = adapt(by_hand)
    model.check_ready(training=True)
    model.check_data(subject.x, subject.y, None)
    for start in (0, 4, 8, 0, 4):
        if start == 0 and hasattr(model, "begin_pass"):
            model.begin_pass()
        model.train_batch(batch(subject, start, start + 4))
    assert_same(state(cancelled), numbers(model.capture()))
    history = await trainer.fit(subject.x, subject.y, batch_size=4, verbose=0)
    assert history.outcome == "completed"


@pytest.mark.asyncio
async def test_stopped_in_mid_epoch_and_started_again_it_ends_in_the_same_bytes(
    subject: Subject, tmp_path: Path
) -> None:
    whole, stopped, resumed = subject.make(), subject.make(), subject.make()
    told = await fit(whole, subject)
    await fit(stopped, subject, [BackupAndRestore(tmp_path), At(lambda run: run.stop("a pause"))])
    assert any((state(stopped)[key] != state(whole)[key]).any() for key in state(whole))  # the control
    assert await fit(resumed, subject, [BackupAndRestore(tmp_path)]) == told
    assert_same(state(resumed), state(whole))


@pytest.mark.timeout(120)
@pytest.mark.asyncio
async def test_killed_and_started_again_it_ends_in_the_same_bytes(
    name: str, subject: Subject, tmp_path: Path
) -> None:
    whole, resumed = subject.make(), subject.make()
    told = await fit(whole, subject)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", KILLED, str(ROOT / "tests" / "support"), name, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=100,
    )
    assert done.returncode == -signal.SIGKILL
    trainer = Trainer(resumed, seed=3)
    history = await trainer.fit(
        subject.x, subject.y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=BackupAndRestore(tmp_path)
    )
    assert trainer.last_run is not None
    assert trainer.last_run.resumed is not None
    assert history.history == told
    assert_same(state(resumed), state(whole))


# A dropout of torch's draws from one stream for all threads: beside others it promises no bytes.
@pytest.mark.parametrize("name", [found for found in PARAMETERS if found.values != ("torch",)], indirect=True)
@pytest.mark.asyncio
async def test_three_at_once_are_each_what_they_are_alone(subject: Subject) -> None:
    alone = subject.make()
    told = await fit(alone, subject)
    given = [subject.make() for _ in range(3)]
    assert await asyncio.gather(*(fit(one, subject) for one in given)) == [told] * 3
    for one in given:
        assert_same(state(one), state(alone))


@pytest.mark.parametrize("name", [found for found in PARAMETERS if found.values != ("bare",)], indirect=True)
@pytest.mark.asyncio
async def test_a_file_that_it_has_no_format_for_is_refused_before_the_first_batch(
    subject: Subject, tmp_path: Path
) -> None:
    given = subject.make()
    before = state(given)
    with pytest.raises(ArgumentError, match=r"\.ckpt"):
        await fit(given, subject, [ModelCheckpoint(tmp_path / "{epoch}.ckpt")])
    assert_same(state(given), before)
    assert list(tmp_path.iterdir()) == []
