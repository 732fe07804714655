"""What a callback in trouble costs the training: a dead server, a slow hook, a hook that raises.

    python tests/benchmarks/isolation.py [--rounds 5]

numpy Sequential 256-256-10, adam, batches of 128, one BLAS thread; each row against the bare ``fit`` of the
same batches in the same round. The time of a training is from its first batch to its last; the drain that
follows is told beside. Dead server: RemoteMonitor to a port that nobody listens on, every one of 10 epochs.
Slow: an async hook on every batch that sleeps 50 ms. With ``overflow = "latest"`` the training leaves it
behind; with ``"wait"`` nothing may be lost, so that the training goes at the hook's pace once its mailbox
(here 16 events) is full. Raising: an async hook that raises at the first batch; ``on_error = "raise"`` ends
the training, ``"warn"`` goes on and calls it again, ``"disable"`` goes on without it. Keras and Ignite call a
hook that sleeps as long in between the batches; only so many of them are run that it takes seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import warnings
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, alternate, main, minus, over

if TYPE_CHECKING:
    from collections.abc import Callable

SLEEP = 0.05
BATCH, EPOCHS = 128, 10
BATCHES, FEW = 300, 6
"""Of an epoch; FEW where each batch waits for the sleeping hook."""
ON_ERRORS = ("warn", "disable", "raise")


def data(batches: int) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.random((batches * BATCH, 256), dtype=np.float32)
    return x, np.eye(10, dtype=np.float32)[generator.integers(0, 10, len(x))]


def ours(batches: int) -> Callable[[str, int], dict[str, float]]:
    """Call it with a kind of trouble and the batches of an epoch."""
    from asynccb import Callback, CallbackError, Trainer
    from asynccb.callbacks import RemoteMonitor
    from asynccb.models import Dense, Sequential

    warnings.simplefilter("ignore")
    logging.disable()
    x, y = data(batches)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"

    class Clock(Callback):
        begun = ended = cpu = spent = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if not self.begun:
                self.begun, self.cpu = time.perf_counter(), time.process_time()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.ended, self.spent = time.perf_counter(), time.process_time() - self.cpu

    class Slow(Callback):
        mailbox_size = 16

        def __init__(self, overflow: str) -> None:
            self.overflow, self.called = overflow, 0

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.called += 1
            await asyncio.sleep(SLEEP)

    class Raising(Callback):
        def __init__(self, on_error: str) -> None:
            self.on_error, self.called = on_error, 0

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.called += 1
            raise ValueError("a hook in trouble")

    troubles: dict[str, Callable[[], Any]] = {
        "dead server": lambda: RemoteMonitor(nobody),
        "slow, latest": lambda: Slow("latest"),
        "slow, wait": lambda: Slow("wait"),
        "raising, raise": lambda: Raising("raise"),
        "raising, warn": lambda: Raising("warn"),
        "raising, disable": lambda: Raising("disable"),
    }

    def run(trouble: str, batches: int) -> dict[str, float]:
        model = Sequential(
            [Dense(256, activation="relu", input_dim=256), Dense(10, activation="softmax")], seed=7
        )
        model.compile(optimizer="adam", loss="categorical_crossentropy")
        clock, rows = Clock(), batches * BATCH
        callback = troubles[trouble]() if trouble in troubles else None

        async def train() -> tuple[int, bool]:
            run = Trainer(model, seed=1).start(
                x[:rows],
                y[:rows],
                batch_size=BATCH,
                epochs=EPOCHS,
                verbose=0,
                callbacks=[clock, *([callback] if callback else [])],
            )
            try:
                await run
            except CallbackError:
                return run.step, True
            return run.step, False

        steps, raised = asyncio.run(train())
        over_at = time.perf_counter()
        return {
            "training": clock.ended - clock.begun,
            "cpu": clock.spent,
            "drain": over_at - clock.ended,
            "trained": steps,
            "raised": raised,
            "called": getattr(callback, "called", 0),
        }

    return run


def keras(batches: int) -> Callable[[str, int], dict[str, float]]:
    import keras

    x, y = data(batches)

    class Slow(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            time.sleep(SLEEP)

    model = keras.Sequential(
        [keras.Input((256,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(10, "softmax")]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy")

    def run(trouble: str, batches: int) -> dict[str, float]:
        rows, callbacks = batches * BATCH, [Slow()] if trouble else []
        began = time.perf_counter()
        model.fit(x[:rows], y[:rows], batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks)
        return {"training": time.perf_counter() - began}

    return run


def ignite(batches: int) -> Callable[[str, int], dict[str, float]]:
    import torch
    from ignite.engine import Engine, Events

    x, y = map(torch.from_numpy, data(batches))
    layers = [torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters())

    def step(engine: Any, batch: Any) -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    def run(trouble: str, batches: int) -> dict[str, float]:
        engine, rows = Engine(step), batches * BATCH
        if trouble:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: time.sleep(SLEEP))
        loader = list(zip(x[:rows].split(BATCH), y[:rows].split(BATCH), strict=True))
        began = time.perf_counter()
        engine.run(loader, max_epochs=EPOCHS)
        return {"training": time.perf_counter() - began}

    return run


def measure(scale: Scale) -> Result:
    result = Result(
        "isolation", notes=["training time against the bare fit's, first batch to last; one BLAS thread"]
    )
    batches, few = (30, 1) if scale.quick else (BATCHES, FEW)
    with Contenders() as there:
        there.add("asynccb", ours, batches)
        for name, setup in (("Keras", keras), ("Ignite", ignite)) if scale.peers else ():
            there.add(name, setup, batches)
        result.left_out = there.missing
        rows = {
            ("asynccb", trouble): (trouble, batches) for trouble in ("bare", "dead server", "slow, latest")
        }
        rows |= {
            ("asynccb", f"raising, {on_error}"): (f"raising, {on_error}", batches) for on_error in ON_ERRORS
        }
        rows |= {("asynccb", "bare, few"): ("bare", few), ("asynccb", "slow, wait"): ("slow, wait", few)}
        for name in ("Keras", "Ignite"):
            if name in there:
                rows |= {(name, "bare, few"): ("", few), (name, "slow"): ("slow", few)}
        figures = alternate(
            {key: lambda key=key, asked=asked: there[key[0]](*asked) for key, asked in rows.items()},
            scale.rounds,
        )
    _say(result, figures)
    return result


def _say(result: Result, figures: dict[tuple[str, str], list[dict[str, float]]]) -> None:
    def of(name: str, trouble: str, what: str = "training") -> list[float]:
        return [float(answer[what]) for answer in figures[name, trouble]]

    for name, trouble in figures:
        if trouble != "raising, raise":
            result.detail(f"{name}, {trouble}: training", of(name, trouble), "s")
    bare, few = of("asynccb", "bare"), of("asynccb", "bare, few")
    result.claim("RemoteMonitor to a dead server", over(of("asynccb", "dead server"), bare), "x", 1.02)
    drains = minus(of("asynccb", "dead server", "drain"), of("asynccb", "bare", "drain"))
    result.detail("RemoteMonitor to a dead server: drain at the end", drains, "s")
    result.claim("async hook sleeps 50 ms, latest", over(of("asynccb", "slow, latest"), bare), "x", 1.02)
    drains = minus(of("asynccb", "slow, latest", "drain"), of("asynccb", "bare", "drain"))
    result.detail("async hook sleeps 50 ms, latest: drain at the end", drains, "s")
    result.claim("async hook sleeps 50 ms, wait: at its pace", over(of("asynccb", "slow, wait"), few), "x")
    for trouble in ("dead server", "slow, latest", "raising, warn", "raising, disable"):
        cpu = over(of("asynccb", trouble, "cpu"), of("asynccb", "bare", "cpu"))
        result.detail(f"asynccb, {trouble}: processor time of all threads / bare", cpu, "x")
    lost = minus(of("asynccb", "slow, wait", "trained"), of("asynccb", "slow, wait", "called"))
    result.claim("async hook sleeps 50 ms, wait: batches it missed", lost, "", 0)
    for name in ("Keras", "Ignite"):
        if (name, "slow") in figures:
            ratio = over(of(name, "slow"), of(name, "bare, few"))
            result.claim(f"{name}: hook sleeps 50 ms, between the batches", ratio, "x")
    for on_error in ("warn", "disable"):
        ratio = over(of("asynccb", f"raising, {on_error}"), bare)
        result.claim(
            f"async hook raises, {on_error}: goes on", ratio, "x", 1.02 if on_error == "disable" else None
        )
        result.detail(
            f"async hook raises, {on_error}: called", of("asynccb", f"raising, {on_error}", "called"), "times"
        )
    result.detail("async hook raises, raise: batches trained", of("asynccb", "raising, raise", "trained"), "")
    silent = [1 - raised for raised in of("asynccb", "raising, raise", "raised")]
    result.claim("async hook raises, raise: fits that did not raise CallbackError", silent, "", 0)


if __name__ == "__main__":
    main(measure, __doc__)
