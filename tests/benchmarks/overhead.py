"""What a batch pays for the loop and for its callbacks, beside hand-written loops, Keras, Ignite and
Lightning.

    python tests/benchmarks/overhead.py [--rounds 5]

Loop: Sequential 64-64-10, rmsprop, batches of 128 from 12,800 float32 samples, shuffled, no metrics. "by
hand" is a plain loop over the same permutation, the same fancy indexing and the same ``train_batch``, so the
difference is the loop alone; "numpy by hand" writes the network out in numpy too. The bare loop of a model
that does nothing is the slope between two numbers of batches.

Callbacks: 8 callbacks with a hook on batch begin and one on batch end that do nothing. What they cost is the
slope between two numbers of batches with them, less the same slope without them, in microseconds a batch;
async hooks count until every event is delivered, for that is when ``fit`` ends. A step takes nothing, 20 us
(a hash, which releases the interpreter lock), 500 us or 5 ms (asleep, as a host is while a device computes),
or is the numpy Sequential above, which takes and gives the lock as any numpy training does. Keras' row is its
``CallbackList`` alone, called as its ``fit`` calls it, once with plain callbacks and once with ``async_safe``
ones, whose end hooks go to its thread pool and are flushed before the clock stops. Without callbacks it is
left out, for then it takes a way that costs more than with some; so its row holds what the list itself costs
a batch, as a user of Keras pays it, while ours is what the callbacks add to a ``fit``. "7 more" compares
like with
like: what is beyond one callback, of both. Ignite's is an ``Engine``
with 16 handlers; Lightning's a ``Trainer`` with everything else off and manual optimization.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, Took, alternate, main, minus, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLBACKS = 8
BATCH, SAMPLES, EPOCHS = 128, 12_800, 60

BATCHES = {"0": (3_000, 15_000), "20 us": (1_000, 16_000), "500 us": (100, 1_100), "5 ms": (10, 160)}
"""Two numbers of batches for each step, between which the slope is taken."""
NUMPY = (500, 4_500)
SHORT = {"0": (300, 1_300), "20 us": (100, 600), "500 us": (10, 60), "5 ms": (2, 8)}
COMPARED = (("step 0", "wall"), ("step 0", "cpu"), ("step 20 us", "cpu"))
SHARED = {("step 500 us", "wall"): None, ("step 5 ms", "wall"): 0.5, ("numpy Sequential", "wall"): None}
"""What is said as a part of the bare loop, with its target."""
STEPS = {"step 500 us": (500, None), "step 5 ms": (5_000, 0.5)}
"""Microseconds of a step, of which processor time is a part, and the target of inline hooks."""
SLOWER = 5
"""Ignite and Lightning take so many fewer of the batches that take no time: their own time is far longer."""


def step_of(name: str) -> Callable[[], Any]:
    if name == "0":
        return lambda: None
    if name != "20 us":
        seconds = 500e-6 if name == "500 us" else 5e-3
        return lambda: time.sleep(seconds)
    block = bytes(1_000_000)
    began = time.perf_counter()
    hashlib.sha256(block)
    block = block[: round(20e-6 / (time.perf_counter() - began) * len(block))]
    return lambda: hashlib.sha256(block)


# asynccb ----------------------------------------------------------------------------------------------------


def model_and_data() -> tuple[Any, Any, Any]:
    import numpy as np

    from asynccb.models import Activation, Dense, Sequential

    model = Sequential([Dense(64, activation="relu", input_dim=64), Dense(10), Activation("softmax")], seed=7)
    model.compile(optimizer="rmsprop", loss="categorical_crossentropy")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(SAMPLES, 64)).astype(np.float32)
    return model, x, np.eye(10, dtype=np.float32)[generator.integers(0, 10, SAMPLES)]


def ours() -> Callable[[str, str, int], Took]:
    import numpy as np

    from asynccb import Callback, Trainer

    class Stepping:
        """A model that does nothing but take its time, so that what is measured is around it."""

        metrics_names = ("loss",)
        stop_training = False

        def __init__(self, step: Callable[[], Any]) -> None:
            self._step = step

        def train_batch(self, batch: Any) -> dict[str, float]:
            self._step()
            return {"loss": 1.0}

    class Inline(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            pass

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    class Beside(Callback):
        async def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            pass

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    kinds = {"none": None, "one": Inline, "inline": Inline, "async": Beside}
    steps = {name: step_of(name) for name in BATCHES}
    network, inputs, targets = model_and_data()

    def run(step: str, kind: str, batches: int) -> Took:
        made = kinds[kind]
        callbacks = [made() for _ in range(1 if kind == "one" else CALLBACKS)] if made else []
        if step == "numpy":
            trainer, data = Trainer(network, seed=1), [(inputs[:BATCH], targets[:BATCH])] * batches
            fit = trainer.fit(data, verbose=0, callbacks=callbacks)
        else:
            x = np.zeros((batches, 1))
            trainer = Trainer(Stepping(steps[step]), seed=1)
            fit = trainer.fit(x, batch_size=1, shuffle=False, verbose=0, callbacks=callbacks)
        return Took.by(lambda: asyncio.run(fit))

    return run


def our_loops() -> Callable[[str, int], float]:
    """The same training by ``fit``, by hand over the same model, and by hand in numpy: seconds a batch."""
    import numpy as np

    from asynccb import Trainer
    from asynccb.protocols import Batch

    def fit(epochs: int) -> float:
        model, x, y = model_and_data()
        began = time.perf_counter()
        asyncio.run(Trainer(model, seed=1).fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0))
        return time.perf_counter() - began

    def by_hand(epochs: int) -> float:
        model, x, y = model_and_data()
        began = time.perf_counter()
        for epoch in range(epochs):
            order = np.random.default_rng([1, epoch]).permutation(SAMPLES)
            total = 0.0
            for start in range(0, SAMPLES, BATCH):
                rows = order[start : start + BATCH]
                total += model.train_batch(Batch(x[rows], y[rows], None, BATCH))["loss"]
        return time.perf_counter() - began

    def numpy_by_hand(epochs: int) -> float:
        _, x, y = model_and_data()
        generator = np.random.default_rng(7)
        w1 = generator.normal(0, 0.1, (64, 64)).astype(np.float32)
        w2 = generator.normal(0, 0.1, (64, 10)).astype(np.float32)
        b1, b2 = np.zeros(64, np.float32), np.zeros(10, np.float32)
        weights = [w1, b1, w2, b2]
        squares = [np.zeros_like(weight) for weight in weights]
        began = time.perf_counter()
        for epoch in range(epochs):
            order = np.random.default_rng([1, epoch]).permutation(SAMPLES)
            total = 0.0
            for start in range(0, SAMPLES, BATCH):
                rows = order[start : start + BATCH]
                inputs, targets = x[rows], y[rows]
                hidden = np.maximum(inputs @ w1 + b1, 0)
                scores = hidden @ w2 + b2
                scores -= scores.max(axis=1, keepdims=True)
                exponents = np.exp(scores)
                sums = exponents.sum(axis=1, keepdims=True)
                total += float((np.log(sums)[:, 0] - (scores * targets).sum(axis=1)).mean())
                above = (exponents / sums - targets) / np.float32(BATCH)
                below = (above @ w2.T) * (hidden > 0)
                gradients = [inputs.T @ below, below.sum(axis=0), hidden.T @ above, above.sum(axis=0)]
                for weight, square, gradient in zip(weights, squares, gradients, strict=True):
                    square *= np.float32(0.9)
                    square += np.float32(0.1) * gradient * gradient
                    weight -= np.float32(0.001) * gradient / np.sqrt(square + np.float32(1e-7))
        return time.perf_counter() - began

    loops = {"fit": fit, "by hand": by_hand, "numpy by hand": numpy_by_hand}
    return lambda name, epochs: loops[name](epochs) / (epochs * SAMPLES // BATCH)


# Peers ------------------------------------------------------------------------------------------------------


def keras() -> Callable[[str, str, int], Took]:
    import keras

    class Plain(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            pass

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    class Safe(Plain):
        async_safe = True

    kinds = {"none": None, "one": Plain, "inline": Plain, "async_safe": Safe}
    steps = {name: step_of(name) for name in BATCHES}

    def run(step: str, kind: str, batches: int) -> Took:
        made, compute = kinds[kind], steps[step]

        def bare() -> None:
            for _ in range(batches):
                compute()

        def hooked() -> None:
            hooks.on_train_begin()
            hooks.on_epoch_begin(0)
            for batch in range(batches):
                hooks.on_train_batch_begin(batch)
                compute()
                hooks.on_train_batch_end(batch, {"loss": 1.0})
            hooks.on_epoch_end(0)
            hooks.on_train_end()

        if made is None:
            return Took.by(bare)
        hooks = keras.callbacks.CallbackList([made() for _ in range(1 if kind == "one" else CALLBACKS)])
        return Took.by(hooked)

    return run


def ignite() -> Callable[[str, str, int], Took]:
    from ignite.engine import Engine, Events

    steps = {name: step_of(name) for name in BATCHES}

    def hook(engine: Any) -> None:
        pass

    def run(step: str, kind: str, batches: int) -> Took:
        compute = steps[step]
        engine = Engine(lambda engine, batch: compute())
        for _ in range(CALLBACKS if kind == "inline" else 0):
            engine.add_event_handler(Events.ITERATION_STARTED, hook)
            engine.add_event_handler(Events.ITERATION_COMPLETED, hook)
        data = [0] * batches
        return Took.by(lambda: engine.run(data, max_epochs=1))

    return run


def lightning() -> Callable[[str, str, int], Took]:
    import lightning
    import torch

    class Stepping(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, compute: Callable[[], Any]) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self._compute = compute

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self._compute()

        def configure_optimizers(self) -> None:
            return None

    class Loader:
        """The cheapest loader there is; a list would be taken for many loaders."""

        def __init__(self, batches: int) -> None:
            self._batches = [torch.zeros(1)] * batches

        def __len__(self) -> int:
            return len(self._batches)

        def __iter__(self) -> Iterator[Any]:
            return iter(self._batches)

    class Plain(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, *given: Any) -> None:
            pass

        def on_train_batch_end(self, *given: Any) -> None:
            pass

    steps = {name: step_of(name) for name in BATCHES}

    def run(step: str, kind: str, batches: int) -> Took:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Plain() for _ in range(CALLBACKS if kind == "inline" else 0)],
        )
        model, data = Stepping(steps[step]), Loader(batches)
        return Took.by(lambda: trainer.fit(model, data))

    return run


PEERS = {
    "Keras": (keras, ("one", "inline", "async_safe")),
    "Ignite": (ignite, ("inline",)),
    "Lightning": (lightning, ("inline",)),
}


# Tables -----------------------------------------------------------------------------------------------------


def measure(scale: Scale) -> Result:
    result = Result("overhead", notes=["us a batch; one BLAS thread; 8 callbacks x 2 hooks that do nothing"])
    with Contenders() as there:
        there.add("asynccb", ours)
        there.add("loops", our_loops)
        for name, (setup, _) in PEERS.items() if scale.peers else ():
            there.add(name, setup)
        result.left_out = there.missing
        _measure_loop(result, scale, there)
        for step in ("0", "20 us", "500 us", "5 ms", "numpy"):
            _measure_callbacks(result, scale, there, step)
    return result


def _measure_loop(result: Result, scale: Scale, there: Contenders) -> None:
    epochs = 5 if scale.quick else EPOCHS
    rows = {
        name: lambda name=name: there["loops"](name, epochs) * 1e6
        for name in ("fit", "by hand", "numpy by hand")
    }
    figures = alternate(rows, scale.rounds)
    for name, values in figures.items():
        result.detail(f"Sequential 64-64-10: {name}", values, "us")
    result.claim(
        "fit over a hand-written loop of the same model", minus(figures["fit"], figures["by hand"]), "us"
    )
    result.claim("fit / numpy written by hand", over(figures["fit"], figures["numpy by hand"]), "x")


def _measure_callbacks(result: Result, scale: Scale, there: Contenders, step: str) -> None:
    contenders = {"asynccb": ("none", "one", "inline", "async")}
    if step != "numpy":
        contenders |= {name: ("none", *kinds) for name, (_, kinds) in PEERS.items() if name in there}
    rows = {
        (name, kind): lambda name=name, kind=kind: _slope(there, name, step, kind, quick=scale.quick)
        for name, kinds in contenders.items()
        for kind in kinds
    }
    figures = alternate(rows, scale.rounds)
    title = "numpy Sequential" if step == "numpy" else f"step {step}"
    for clock in Took._fields:
        told = {key: [getattr(took, clock) * 1e6 for took in rounds] for key, rounds in figures.items()}
        _say(result, title, clock, told)


def _say(result: Result, title: str, clock: str, told: dict[tuple[str, str], list[float]]) -> None:
    bare = told["asynccb", "none"]
    costs: dict[tuple[str, str], list[float]] = {}
    for (name, kind), values in told.items():
        if kind == "none":
            result.detail(f"{title}, {clock}: {name} without callbacks", values, "us")
        else:
            costs[name, kind] = minus(values, told[name, "none"])
            count = 1 if kind == "one" else CALLBACKS
            result.detail(f"{title}, {clock}: {count} callbacks, {name}, {kind}", costs[name, kind], "us")
    if title == "step 0" and clock == "wall":
        result.claim("bare loop, a model that does nothing", bare, "us", 5)
    for kind, against in (("inline", 0.35), ("async", 1.0)):
        keras = costs.get(("Keras", "inline"))
        if keras and (title, clock) in COMPARED:
            ratio = over(costs["asynccb", kind], keras)
            result.claim(f"{title}, {clock}: 8 callbacks, {kind} / Keras, inline", ratio, "x", against)
            if kind == "inline":
                more = [minus(costs[name, kind], costs[name, "one"]) for name in ("asynccb", "Keras")]
                result.claim(f"{title}, {clock}: 7 more, inline / Keras, inline", over(*more), "x")
        if (title, clock) in SHARED:
            share = [cost / whole * 100 for cost, whole in zip(costs["asynccb", kind], bare, strict=True)]
            result.claim(f"{title}, {clock}: 8 callbacks, {kind}", share, "% of bare", SHARED[title, clock])
    if clock == "cpu" and title in STEPS:
        # No less than the wait that it can cause; for inline hooks, which have one thread, the very same.
        for kind, target in (("inline", STEPS[title][1]), ("async", None)):
            share = [cost / STEPS[title][0] * 100 for cost in costs["asynccb", kind]]
            result.claim(f"{title}, cpu: 8 callbacks, {kind}", share, "% of step", target)


def _slope(there: Contenders, name: str, step: str, kind: str, *, quick: bool) -> Took:
    few, many = NUMPY if step == "numpy" else (SHORT if quick else BATCHES)[step]
    if name in ("Ignite", "Lightning") and step in ("0", "20 us"):
        few, many = few // SLOWER, many // SLOWER
    short, long = there[name](step, kind, few), there[name](step, kind, many)
    return Took(*((more - less) / (many - few) for less, more in zip(short, long, strict=True)))


if __name__ == "__main__":
    main(measure, __doc__)
