"""Successive halving on runs alone: sixteen trainings park at each rung, the worse half of them is pruned,
the better half goes on.

Prints, among others::

    rung 2: 8 of 16 go on, the best with val_loss ...
    rung 4: 4 of 8 go on, the best with val_loss ...
    rung 8: 2 of 4 go on, the best with val_loss ...
    2 completed, 14 pruned
    best: rate=..., val_loss ...
"""

import asyncio
from collections import Counter
from contextlib import aclosing
from typing import Any

from sklearn.datasets import load_digits

from asynccb import Callback, Run, Trainer
from asynccb.events import EpochEnd
from asynccb.models import SGD, Dense, Sequential

RUNGS = (2, 4, 8)
EPOCHS = 16
DIGITS = load_digits()


class ParkAtRungs(Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch + 1 in RUNGS:
            self.run.pause()  # inline: before the next batch


async def reach(run: Run, rung: int) -> None:
    async with aclosing(run.events(since=0)) as events:
        async for event in events:
            if isinstance(event, EpochEnd) and event.epoch + 1 == rung:
                return


async def halve(runs: list[Run]) -> list[Run]:
    """Those that were never among the worse half."""
    for rung in RUNGS:
        await asyncio.gather(*(reach(run, rung) for run in runs))
        runs = sorted(runs, key=val_loss)
        better, worse = runs[: len(runs) // 2], runs[len(runs) // 2 :]
        for run in worse:
            run.prune(f"in the worse half at rung {rung}")
        for run in better:
            run.resume()
        best = val_loss(better[0])
        print(f"rung {rung}: {len(better)} of {len(runs)} go on, the best with val_loss {best:.3f}")
        runs = better
    return runs


def val_loss(run: Run) -> float:
    return float(run.history.history["val_loss"][-1])


def start(rate: float) -> Run:
    model = Sequential([Dense(32, activation="relu", input_dim=64), Dense(10, activation="softmax")], seed=7)
    model.compile(SGD(rate), "sparse_categorical_crossentropy")
    return Trainer(model, seed=7).start(
        DIGITS.data / 16,
        DIGITS.target,
        validation_split=0.2,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[ParkAtRungs()],
        name=f"rate={rate:.4f}",
    )


async def main() -> None:
    runs = [start(0.001 * 1.6**number) for number in range(16)]
    left = await halve(runs)
    await asyncio.gather(*runs)  # to be pruned is an outcome and no failure
    outcomes = Counter(run.outcome for run in runs)
    print(f"{outcomes['completed']} completed, {outcomes['pruned']} pruned")
    best = min(left, key=val_loss)
    print(f"best: {best.name}, val_loss {val_loss(best):.3f}")


if __name__ == "__main__":
    asyncio.run(main())
