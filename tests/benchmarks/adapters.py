"""What a batch pays for going through asynccb, beside the framework's own loop.

    python tests/benchmarks/adapters.py [--rounds 5]

Both do the same updates on the same batches in the same order, and read the loss as a number after each. Both
live in one process, unlike the contenders of the other benchmarks: where its memory lies makes one process up
to a quarter slower than another that does the same, which is more than there is to measure here. What is said
of a pair is its time by the clock over that of the framework's own loop within a round, and the same of
processor time, which a neighbour disturbs less.

torch       784-512-256-10, Adam, batches of 128 shuffled from memory, four epochs of 50: zero_grad,
            cross_entropy, backward, step; about 5 ms a batch. By hand it runs on a thread of its own, as in
            asynccb. asynccb is ``Trainer(TorchModel(...)).fit`` on the same arrays; "a snapshot every 10" has
            a callback take a pooled copy of weights and slots (6 MB), which is made beside the batches.
keras       The same network in Keras on JAX, compiled with the accuracy as a metric; its own loop is ``fit``
            with ``shuffle=False``. "With callbacks": CSVLogger, ModelCheckpoint (the whole model each epoch)
            and EarlyStopping, Keras' own beside Keras' fit, ours beside ours. Ours are durable, theirs not.
jax         The same network and Adam by hand in one jitted step with its state donated.
"""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, Took, alternate, main, over

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, INPUTS, CLASSES = 128, 784, 10
EPOCHS, BATCHES, SHORT = 4, 50, 2
"""Batches in each of the epochs: what a ``fit`` costs once is not lost among too many."""
MOST_OVER = 1.03


def data(batches: int) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.standard_normal((batches * BATCH, INPUTS), dtype=np.float32)
    return x, generator.integers(0, CLASSES, len(x))


def on_a_thread(function: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(function).result()


# torch ------------------------------------------------------------------------------------------------------


def torch_parts() -> tuple[Any, Any, Any]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(INPUTS, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )
    return module, nn.CrossEntropyLoss(), torch.optim.Adam(module.parameters(), lr=1e-5)


def torch_by_hand(x: Any, y: Any) -> Callable[[], None]:
    import numpy as np
    import torch

    module, loss_of, optimizer = torch_parts()

    def train() -> None:
        for epoch in range(EPOCHS):
            order = np.random.default_rng([0, epoch]).permutation(len(x))
            for at in range(0, len(x), BATCH):
                rows = order[at : at + BATCH]
                samples, targets = torch.from_numpy(x[rows]), torch.from_numpy(y[rows])
                optimizer.zero_grad()
                loss = loss_of(module(samples), targets)
                loss.backward()
                optimizer.step()
                loss.item()

    return lambda: on_a_thread(train)


def torch_with_asynccb(x: Any, y: Any, *, snapshots: bool) -> Callable[[], None]:
    from asynccb import Callback, Trainer
    from asynccb.models import TorchModel

    class Copies(Callback):
        changes_model = False

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch % 10 == 9:
                self.run.snapshot_now(self, pooled=True).release()

    module, loss, optimizer = torch_parts()
    trainer = Trainer(TorchModel(module, loss, optimizer), seed=0)

    async def fit() -> None:
        callbacks = [Copies()] if snapshots else []
        await trainer.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks)

    return lambda: asyncio.run(fit())


def torch(batches: int) -> Callable[[str], Took]:
    """The process in which all of torch's contenders run."""
    x, y = data(batches)
    runs = {
        OWN_LOOP: torch_by_hand(x, y),
        "asynccb": torch_with_asynccb(x, y, snapshots=False),
        "asynccb, a snapshot every 10": torch_with_asynccb(x, y, snapshots=True),
    }
    return lambda name: Took.by(runs[name])


# Keras ------------------------------------------------------------------------------------------------------


def keras(batches: int) -> Callable[[str], Took]:
    import os
    import tempfile
    from pathlib import Path

    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    from asynccb import Trainer, callbacks

    x, y = data(batches)
    folder = Path(tempfile.mkdtemp(prefix="adapters"))

    def build() -> Any:
        layers = [keras.layers.Dense(size, "relu") for size in (512, 256)]
        model = keras.Sequential([keras.Input((INPUTS,)), *layers, keras.layers.Dense(CLASSES, "softmax")])
        model.compile(keras.optimizers.Adam(1e-5), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def of(room: Any, name: str) -> list[Any]:
        path = str(folder / name)
        logger, checkpoint = room.CSVLogger(f"{path}.csv"), room.ModelCheckpoint(f"{path}.keras")
        return [logger, checkpoint, room.EarlyStopping("loss", patience=99)]

    given, own = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0, "shuffle": False}, build()
    trainer = Trainer(build())

    def fit(listed: list[Any]) -> None:
        asyncio.run(trainer.fit(x, y, callbacks=listed, **given))

    runs = {
        OWN_LOOP: lambda: on_a_thread(lambda: own.fit(x, y, **given)),
        "asynccb": lambda: fit([]),
        OWN_CALLBACKS: lambda: on_a_thread(
            lambda: own.fit(x, y, callbacks=of(keras.callbacks, "k"), **given)
        ),
        "asynccb, with callbacks": lambda: fit(of(callbacks, "a")),
    }
    return lambda name: Took.by(runs[name])


# JAX --------------------------------------------------------------------------------------------------------


def jax(batches: int) -> Callable[[str], Took]:
    import jax
    import numpy as np
    from jax import numpy as jnp

    from asynccb import Trainer
    from asynccb.models import JaxModel

    x, y = data(batches)
    drawn = np.random.default_rng(0)
    sizes = (INPUTS, 512, 256, CLASSES)
    start = [
        {
            "kernel": drawn.standard_normal((fan_in, size), np.float32) / fan_in**0.5,
            "bias": np.zeros(size, np.float32),
        }
        for fan_in, size in itertools.pairwise(sizes)
    ]

    def loss_of(layers: Any, batch: Any) -> Any:
        out, targets = batch
        for layer in layers[:-1]:
            out = jax.nn.relu(out @ layer["kernel"] + layer["bias"])
        told = jax.nn.log_softmax(out @ layers[-1]["kernel"] + layers[-1]["bias"])
        return -told[jnp.arange(len(targets)), targets].mean()

    def step(state: Any, batch: Any) -> Any:
        loss, slopes = jax.value_and_grad(loss_of)(state["layers"], batch)
        first = jax.tree.map(lambda old, slope: 0.9 * old + 0.1 * slope, state["first"], slopes)
        second = jax.tree.map(lambda old, slope: 0.999 * old + 0.001 * slope**2, state["second"], slopes)
        moved = jax.tree.map(
            lambda old, one, two: old - 1e-5 * one / (jnp.sqrt(two) + 1e-7), state["layers"], first, second
        )
        return {"layers": moved, "first": first, "second": second}, {"loss": loss}

    zeros = jax.tree.map(np.zeros_like, start)
    whole = {"layers": start, "first": zeros, "second": zeros}
    compiled = jax.jit(step, donate_argnums=0)
    held = [jax.tree.map(jnp.array, whole)]
    trainer = Trainer(JaxModel(step, whole), seed=0)

    def by_hand() -> None:
        state = held[0]
        for epoch in range(EPOCHS):
            order = np.random.default_rng([0, epoch]).permutation(len(x))
            for at in range(0, len(x), BATCH):
                rows = order[at : at + BATCH]
                state, logs = compiled(state, (x[rows], y[rows]))
                float(logs["loss"])
        held[0] = state

    def fit() -> None:
        asyncio.run(trainer.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0))

    runs = {OWN_LOOP: lambda: on_a_thread(by_hand), "asynccb": fit}
    return lambda name: Took.by(runs[name])


# All of them ------------------------------------------------------------------------------------------------

OWN_LOOP = "its own loop"
OWN_CALLBACKS = "its own loop, with callbacks"
FRAMEWORKS: dict[str, tuple[Any, dict[str, str]]] = {
    "torch": (torch, {"asynccb": OWN_LOOP, "asynccb, a snapshot every 10": OWN_LOOP}),
    "keras": (keras, {"asynccb": OWN_LOOP, "asynccb, with callbacks": OWN_CALLBACKS}),
    "jax": (jax, {"asynccb": OWN_LOOP}),
}
"""For each the process, and what is compared with what."""


def measure(scale: Scale) -> Result:
    result = Result("adapters: a batch through asynccb beside the framework's own loop")
    each = SHORT if scale.quick else BATCHES
    batches = each * EPOCHS
    with Contenders() as contenders:
        for framework, (setup, _) in FRAMEWORKS.items() if scale.peers else ():
            contenders.add(framework, setup, each)
        rows = {
            (framework, name): (lambda framework=framework, name=name: contenders[framework](name))
            for framework in contenders
            for compared in (FRAMEWORKS[framework][1],)
            for name in (*dict.fromkeys(compared.values()), *compared)
        }
        found = alternate(rows, scale.rounds) if rows else {}
        result.left_out = contenders.missing
    for (framework, name), tooks in found.items():
        result.detail(f"{framework}, {name}: a batch", [took.wall / batches * 1e3 for took in tooks], "ms")
    for (framework, name), tooks in found.items():
        beside = FRAMEWORKS[framework][1].get(name)
        for clock in ("wall", "cpu") if beside is not None else ():
            mine, theirs = (
                [getattr(took, clock) for took in held] for held in (tooks, found[framework, beside])
            )
            what = f"{framework}, {name}: {clock} of its own loop's"
            result.claim(what, over(mine, theirs), "times", MOST_OVER)
    return result


if __name__ == "__main__":
    main(measure, __doc__)
