"""A training that is killed, again and again, and started again each time, ends in the very same bytes as one
that nobody interrupts: model, optimizer, random streams, History, CSV, checkpoints, TensorBoard's scalars.

Every child compares each step that it trains with the reference, so that the first one that differs is named.
"""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from resume_faults import trainings
from resume_faults.client import EPOCHS, Server, fresh

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LONG = 8
"""Epochs of the long tier."""


def go_on_until_done(
    server: Server,
    name: str,
    folder: Path,
    reference: Any,
    kills: Callable[[int], dict[str, Any]],
    epochs: int = EPOCHS,
) -> int:
    """Starts the training again after each kill. ``kills``: how the n-th trial is killed. Answers how many
    were."""
    fresh(folder)
    killed = 0
    while True:
        how = kills(killed)
        trial = server.trial(name, folder, reference["steps"], epochs=epochs, **how)
        if trial.status == 0:
            break
        assert trial.status == -9, f"{name}, after {killed} kills, {how}: {trial.said}"
        killed += 1
    different = {key: value for key, value in trial.answer["left"].items() if reference["left"][key] != value}
    assert different == {}, f"{name}, after {killed} kills"
    assert trial.answer["left"].keys() == reference["left"].keys()
    return killed


def at_every_step(steps: int) -> Callable[[int], dict[str, Any]]:
    """Behind step 1, then behind step 2, ...: each one dies of a kill of its own."""
    return lambda killed: {"kill_at": killed + 1 if killed < steps else None}


def killed_behind_every_step(server: Server, name: str, folder: Path, epochs: int = EPOCHS) -> None:
    reference = server.reference(name, folder, epochs)
    steps = len(reference["steps"])
    assert go_on_until_done(server, name, folder, reference, at_every_step(steps), epochs) >= steps * 0.5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("names", list(itertools.pairwise(trainings.SETTINGS))[::2])
def test_killed_behind_every_step_it_ends_in_the_same_bytes(
    names: tuple[str, ...], servers: tuple[Server, Server], folder: Path
) -> None:
    """Two trainings side by side, one on each of two processors."""
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(killed_behind_every_step, own, name, folder / name)
            for own, name in zip(servers, names, strict=True)
        ]
    for future in running:
        future.result()


@pytest.mark.timeout(120)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(server: Server, folder: Path) -> None:
    killed = 0
    for seed in range(8):
        drawn = random.Random(seed)
        name = drawn.choice(sorted(trainings.SETTINGS))
        reference = server.reference(name, folder)
        moments = [drawn.uniform(0.005, 0.06) for _ in range(6)] + [None]
        killed += go_on_until_done(
            server, name, folder, reference, lambda killed, at=moments: {"kill_after": at[killed]}
        )
    assert killed > 8  # or it was over before it was killed


@pytest.mark.timeout(120)
@pytest.mark.parametrize("naive", trainings.NAIVE)
def test_what_a_naive_resume_forgets_is_found(naive: str, server: Server, folder: Path) -> None:
    name = "adam, early stopping"
    reference = server.reference(name, folder)
    fresh(folder)
    assert server.trial(name, folder, reference["steps"], kill_at=40).status == -9
    trial = server.trial(name, folder, reference["steps"], naive=naive)
    assert "is another one than it was" in trial.said or trial.answer["left"] != reference["left"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_step_of_every_configuration(server: Server, folder: Path) -> None:
    for name in trainings.SETTINGS | trainings.MORE_SETTINGS:
        killed_behind_every_step(server, name, folder, LONG)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_thousand_chains_of_kills_at_random_moments(server: Server, folder: Path) -> None:
    names = sorted(trainings.SETTINGS | trainings.MORE_SETTINGS)
    references = {name: server.reference(name, folder) for name in names}
    killed = 0
    for seed in range(1000):
        drawn = random.Random(seed)
        name = names[seed % len(names)]
        moments = [drawn.uniform(0.005, 0.06) for _ in range(drawn.randint(1, 6))] + [None]
        killed += go_on_until_done(
            server, name, folder, references[name], lambda killed, at=moments: {"kill_after": at[killed]}
        )
    assert killed > 1000
