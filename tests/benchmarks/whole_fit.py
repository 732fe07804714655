"""A whole ``fit`` with everything turned on against the bare one, and Keras' same pair beside.

    python tests/benchmarks/whole_fit.py [--rounds 5]

Model 784-256-10, adam, batches of 64 from 60,000 synthetic samples, 5 epochs, one BLAS thread. Turned on:
CSVLogger, a checkpoint of the whole model at every epoch's end, TensorBoard histograms of all weights at
every epoch's end, and RemoteMonitor to a server on this machine that answers after 100 ms. What is timed is
the whole ``fit``, to the last byte and the last answer; "while training" ends with the last batch's epoch,
before asynccb's drain.

Keras: its own CSVLogger, ModelCheckpoint (``.keras``) and RemoteMonitor; its TensorBoard needs TensorFlow, so
that the histograms and scalars are written with torch's SummaryWriter in a callback, as its users without
TensorFlow do.
"""

from __future__ import annotations

import asyncio
import http.server
import os
import tempfile
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, alternate, main, minus, over
from savers import empty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLES, BATCH, EPOCHS = 60_000, 64, 5
ANSWERS_AFTER = 0.1


def data(samples: int) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    x = generator.random((samples, 784), dtype=np.float32)
    return x, np.eye(10, dtype=np.float32)[generator.integers(0, 10, samples)]


def ours(samples: int, folder: str, url: str) -> Callable[[bool], dict[str, float]]:
    """Call it with whether to turn everything on; it answers seconds."""
    from asynccb import Callback, Trainer
    from asynccb.callbacks import CSVLogger, ModelCheckpoint, RemoteMonitor, TensorBoard
    from asynccb.models import Dense, Sequential

    x, y = data(samples)
    os.makedirs(folder)

    class Clock(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.ended = time.perf_counter()

    def run(everything: bool) -> dict[str, float]:
        empty(folder)
        model = Sequential(
            [Dense(256, activation="relu", input_dim=784), Dense(10, activation="softmax")], seed=7
        )
        model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
        callbacks = [
            CSVLogger(os.path.join(folder, "log.csv")),
            ModelCheckpoint(os.path.join(folder, "model-{epoch}.hdf5")),
            TensorBoard(folder, histogram_freq=1),
            RemoteMonitor(url),
        ]
        clock = Clock()
        fit = Trainer(model, seed=1).fit(
            x,
            y,
            batch_size=BATCH,
            epochs=EPOCHS,
            verbose=0,
            callbacks=[*(callbacks if everything else ()), clock],
        )
        began = time.perf_counter()
        asyncio.run(fit)
        return {"fit": time.perf_counter() - began, "while training": clock.ended - began}

    return run


def keras(samples: int, folder: str, url: str) -> Callable[[bool], dict[str, float]]:
    import keras
    import requests  # noqa: F401  # Keras' RemoteMonitor needs it
    from torch.utils.tensorboard import SummaryWriter

    x, y = data(samples)
    os.makedirs(folder)

    class Histograms(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            self.writer = SummaryWriter(folder)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            for name, value in (logs or {}).items():
                self.writer.add_scalar(name, value, epoch)
            for weight in self.model.weights:
                self.writer.add_histogram(weight.path, weight.numpy(), epoch)
            self.writer.flush()

        def on_train_end(self, logs: Any = None) -> None:
            self.writer.close()

    def build() -> Any:
        model = keras.Sequential(
            [keras.Input((784,)), keras.layers.Dense(256, "relu"), keras.layers.Dense(10, "softmax")]
        )
        model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
        return model

    def run(everything: bool) -> dict[str, float]:
        empty(folder)
        model = build()
        model.fit(x[:BATCH], y[:BATCH], batch_size=BATCH, verbose=0)  # compiles
        callbacks = [
            keras.callbacks.CSVLogger(os.path.join(folder, "log.csv")),
            keras.callbacks.ModelCheckpoint(os.path.join(folder, "model-{epoch}.keras")),
            Histograms(),
            keras.callbacks.RemoteMonitor(url),
        ]
        began = time.perf_counter()
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=callbacks if everything else [])
        return {"fit": time.perf_counter() - began}

    return run


@contextmanager
def slow_server() -> Iterator[str]:
    """A server that answers every POST after 100 ms; in the process that only waits for the contenders."""

    class Slow(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(ANSWERS_AFTER)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def measure(scale: Scale) -> Result:
    result = Result(
        "whole fit", notes=["784-256-10, 5 epochs; every callback on against none; one BLAS thread"]
    )
    samples = 2_000 if scale.quick else SAMPLES
    with tempfile.TemporaryDirectory() as folder, slow_server() as url, Contenders() as there:
        there.add("asynccb", ours, samples, f"{folder}/asynccb", url)
        if scale.peers:
            there.add("Keras", keras, samples, f"{folder}/keras", url)
        result.left_out = there.missing
        rows = {
            (name, everything): lambda name=name, everything=everything: there[name](everything)
            for name in there
            for everything in (False, True)
        }
        figures = alternate(rows, scale.rounds)
    seconds = {key: [answer["fit"] for answer in rounds] for key, rounds in figures.items()}
    for (name, everything), values in seconds.items():
        result.detail(f"{name}, {'everything on' if everything else 'bare'}", values, "s")
    ratio = over(seconds["asynccb", True], seconds["asynccb", False])
    result.claim("asynccb: everything on / bare", ratio, "x", 1.05)
    training = [[answer["while training"] for answer in figures["asynccb", on]] for on in (True, False)]
    result.claim("asynccb: everything on / bare, while training", over(*training), "x")
    if ("Keras", True) in seconds:
        beside = over(seconds["Keras", True], seconds["Keras", False])
        result.claim("Keras: everything on / bare", beside, "x")
        costs = [minus(seconds[name, True], seconds[name, False]) for name in ("asynccb", "Keras")]
        result.claim("asynccb's overhead / Keras' overhead, in seconds", over(*costs), "x")
        shares = over([value - 1 for value in ratio], [value - 1 for value in beside])
        result.claim("asynccb's overhead / Keras' overhead", shares, "x", 0.33)
    return result


if __name__ == "__main__":
    main(measure, __doc__)
