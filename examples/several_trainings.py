"""Five widths of a layer at the same time, each in a worker thread with a CSV of its own. One of them
fails, which the others do not notice.

Prints, among others::

    of 5 trainings 4 completed, 1 failed
    best: units-...
"""

import asyncio
from functools import partial

from sklearn.datasets import load_digits

from asynccb import Orchestrator, Trainer
from asynccb.callbacks import CSVLogger
from asynccb.models import Dense, Sequential

WIDTHS = (0, 8, 16, 32, 64)


def build(units: int) -> Trainer:
    model = Sequential([Dense(units, "relu", input_dim=64), Dense(10, "softmax")], seed=7)
    model.compile(optimizer="rmsprop", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return Trainer(model, seed=7)


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target

    reached: dict[str, float] = {}
    async with Orchestrator() as orch:  # cancelling this task would cancel all of them
        for units in WIDTHS:
            # The data is shared, not copied; the model is made when the training's turn comes.
            orch.submit(
                partial(build, units),
                x,
                y,
                epochs=6,
                validation_split=0.2,
                callbacks=[CSVLogger(f"units-{units}.csv")],
                name=f"units-{units}",
            )
        async for run in orch.as_completed():
            if run.exception is not None:
                print(f"{run.name:<8} {run.outcome}: {run.reason}")
                continue
            reached[run.name] = run.history.history["val_accuracy"][-1]
            print(f"{run.name:<8} val_accuracy {reached[run.name]:.3f}")
        ended = orch.stats.ended

    print(f"of {len(WIDTHS)} trainings {ended['completed']} completed, {ended['failed']} failed")
    print(f"best: {max(reached, key=lambda name: reached[name])}")


if __name__ == "__main__":
    asyncio.run(main())
