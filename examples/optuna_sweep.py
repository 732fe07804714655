"""A sweep with Optuna: forty trials, four at a time; those that learn worse than the others end early.

Prints, among others::

    trial-0  COMPLETE after 8 epochs
    40 trials: ... completed, ... pruned
    best: trial-..., val_loss ..., rate ..., units ...
"""

import asyncio
from collections import Counter
from functools import partial

import optuna
from optuna import Study, Trial
from optuna.trial import TrialState
from sklearn.datasets import load_digits

from asynccb import Orchestrator, Trainer
from asynccb.integrations.optuna import PruningCallback, ask, tell
from asynccb.models import Adam, Dense, Sequential

DIGITS = load_digits()


def build(trial: Trial) -> Trainer:
    """Called on a thread: a suggestion may reach the study's storage."""
    units = trial.suggest_int("units", 4, 64, log=True)
    rate = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
    model = Sequential([Dense(units, "relu", input_dim=64), Dense(10, "softmax")], seed=7)
    model.compile(Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return Trainer(model, seed=7)


async def work(orch: Orchestrator, study: Study, trials: int) -> None:
    for _ in range(trials):
        trial = await ask(study)
        run = orch.submit(
            partial(build, trial),
            DIGITS.data / 16,
            DIGITS.target,
            validation_split=0.2,
            epochs=8,
            callbacks=[PruningCallback(trial)],
            name=f"trial-{trial.number}",
        )
        told = await tell(study, trial, run)
        print(f"{run.name:<8} {told.state.name} after {len(run.history.epoch)} epochs")


async def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=7), pruner=optuna.pruners.MedianPruner(n_warmup_steps=1)
    )
    async with Orchestrator(slots=4) as orch, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(work(orch, study, 10))

    states = Counter(trial.state for trial in study.trials)
    completed, pruned = states[TrialState.COMPLETE], states[TrialState.PRUNED]
    print(f"{len(study.trials)} trials: {completed} completed, {pruned} pruned")
    best = study.best_trial
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in sorted(best.params.items()))
    print(f"best: trial-{best.number}, val_loss {best.value:.3f}, {chosen}")


if __name__ == "__main__":
    asyncio.run(main())
