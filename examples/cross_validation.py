"""Cross-validation: five trainings at the same time, each validated on the fifth of the digits that it
has not seen.

Prints, among others::

    fold 1: val_accuracy ...
    fold 5: val_accuracy ...
    val_accuracy ... ± ... over 5 folds
"""

import asyncio

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

from asynccb import Orchestrator, Trainer
from asynccb.models import Dense, Sequential

FOLDS = 5


def build() -> Trainer:
    model = Sequential([Dense(32, activation="relu", input_dim=64), Dense(10, activation="softmax")], seed=7)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return Trainer(model, seed=7)


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=7).split(x, y)

    # One fold that fails makes the mean worthless, so it ends the others.
    async with Orchestrator(on_failure="cancel_others") as orch:
        runs = [
            orch.submit(
                build,
                x[train],
                y[train],
                validation_data=(x[test], y[test]),
                epochs=10,
                name=f"fold {number}",
            )
            for number, (train, test) in enumerate(folds, start=1)
        ]

    accuracies = [run.history.history["val_accuracy"][-1] for run in runs]
    for run, accuracy in zip(runs, accuracies, strict=True):
        print(f"{run.name}: val_accuracy {accuracy:.3f}")
    print(f"val_accuracy {np.mean(accuracies):.3f} ± {np.std(accuracies):.3f} over {FOLDS} folds")


if __name__ == "__main__":
    asyncio.run(main())
