"""What our callbacks cost in the loops of others, and what a slow callback costs there in either way.

    python tests/benchmarks/foreign_loops.py [--rounds 5]

Overhead: a small net, batches of 32; microseconds a batch with one callback that has a batch hook and writes
a row an epoch, beyond the same training without a callback; begin and end are in it, over 2,000 batches.
Theirs: a callback of the framework whose batch hook counts, with a CSV row an epoch. Ours: an ``async def``
batch hook that counts, and CSVLogger, through the integration.

Slow: batches that sleep 5 ms, 40 an epoch; each epoch a CSV row and a POST to a server that takes 100 ms to
answer. Theirs: a callback of the framework that does both when the epoch ends. Ours: CSVLogger and
RemoteMonitor through the integration. Told is what the whole call takes longer than without a callback, the
drain at its end counted in.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import os
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from harness import Contenders, Result, Scale, alternate, main, minus, over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ANSWERS_AFTER = 0.1
STEP = 0.005
SLOW_EPOCHS, SLOW_BATCHES = 5, 40
EPOCHS, BATCHES, SIZE = 2, 1_000, 32
NONE, THEIRS, OURS = "no callback", "theirs", "ours"
LOOPS = ("by hand", "keras", "lightning", "transformers", "ignite")


class _Slow(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(ANSWERS_AFTER)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def _serving() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# What is done in both ways ----------------------------------------------------------------------------------


class _Books:
    """What a callback of a framework does, inline."""

    def __init__(self, port: int, *, slow: bool) -> None:
        self._port, self._slow = port, slow
        self.batches = 0

    def batch(self) -> None:
        self.batches += 1

    def epoch(self, epoch: int, loss: float) -> None:
        with open("theirs.csv", "a", newline="") as file:
            csv.writer(file).writerow([epoch, loss])
        if self._slow:
            server = http.client.HTTPConnection("127.0.0.1", self._port)
            server.request("POST", "/publish/epoch/end/", f'{{"epoch": {epoch}}}')
            server.getresponse().read()
            server.close()


def _ours(port: int, *, slow: bool) -> list[Any]:
    from asynccb import Callback
    from asynccb.callbacks import CSVLogger, RemoteMonitor

    class Counts(Callback):
        batches = 0

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.batches += 1

    books: list[Callback] = [CSVLogger("ours.csv"), Counts()]
    return [*books, RemoteMonitor(f"http://127.0.0.1:{port}")] if slow else books


def _samples(batches: int) -> Any:
    import numpy as np

    x = np.random.default_rng(0).normal(size=(batches * SIZE, 8)).astype(np.float32)
    return x, x.sum(axis=1, keepdims=True)


# The loops: each answers a function of (way, slow, epochs, batches) -> seconds ------------------------------


def by_hand(port: int) -> Callable[..., float]:
    import numpy as np

    from asynccb.integrations import Background

    def run(way: str, slow: bool, epochs: int, batches: int) -> float:
        x, y = _samples(batches)
        weights = np.zeros((8, 1), np.float32)
        books = _Books(port, slow=slow)
        began = time.perf_counter()
        background = Background(_ours(port, slow=slow)) if way == OURS else contextlib.nullcontext()
        with background as hooks:
            for epoch in range(epochs):
                loss = 0.0
                for batch in range(batches):
                    rows = slice(batch * SIZE, (batch + 1) * SIZE)
                    error = x[rows] @ weights - y[rows]
                    weights -= 0.01 * x[rows].T @ error / SIZE
                    loss = float((error**2).mean())
                    if slow:
                        time.sleep(STEP)
                    if way == OURS:
                        hooks.on_batch_end(batch, {"loss": loss})
                    elif way == THEIRS:
                        books.batch()
                if way == OURS:
                    hooks.on_epoch_end(epoch, {"loss": loss})
                elif way == THEIRS:
                    books.epoch(epoch, loss)
        return time.perf_counter() - began

    return run


def in_keras(port: int) -> Callable[..., float]:
    import keras

    from asynccb.integrations.keras import BackgroundCallback

    class Theirs(keras.callbacks.Callback):
        def __init__(self, books: _Books) -> None:
            super().__init__()
            self.books = books

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.books.batch()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.books.epoch(epoch, logs["loss"])

    model = keras.Sequential([keras.layers.Dense(16, activation="relu"), keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    def run(way: str, slow: bool, epochs: int, batches: int) -> float:
        x, y = _samples(batches)

        def sleepy() -> Iterator[Any]:
            for batch in range(epochs * batches):
                rows = slice(batch % batches * SIZE, (batch % batches + 1) * SIZE)
                time.sleep(STEP)
                yield x[rows], y[rows]

        data = {"x": sleepy(), "steps_per_epoch": batches} if slow else {"x": x, "y": y, "batch_size": SIZE}
        callbacks = {
            NONE: lambda: [],
            THEIRS: lambda: [Theirs(_Books(port, slow=slow))],
            OURS: lambda: [BackgroundCallback(_ours(port, slow=slow))],
        }[way]()
        began = time.perf_counter()
        model.fit(**data, epochs=epochs, verbose=0, callbacks=callbacks)
        return time.perf_counter() - began

    return run


def _torch_net() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))


def _torch_data(batches: int) -> Any:
    import torch
    from torch.utils.data import TensorDataset

    return TensorDataset(*map(torch.from_numpy, _samples(batches)))


def in_lightning(port: int) -> Callable[..., float]:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
    from torch.utils.data import DataLoader

    from asynccb.integrations.lightning import BackgroundCallback

    class Net(LightningModule):
        def __init__(self, slow: bool) -> None:
            super().__init__()
            self.net, self.slow = _torch_net(), slow

        def training_step(self, batch: Any, index: int) -> Any:
            if self.slow:
                time.sleep(STEP)
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    class Theirs(Callback):
        def __init__(self, books: _Books) -> None:
            self.books = books

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, idx: int
        ) -> None:
            self.loss = outputs["loss"]
            self.books.batch()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.books.epoch(trainer.current_epoch, self.loss.item())

    def run(way: str, slow: bool, epochs: int, batches: int) -> float:
        callbacks = {
            NONE: lambda: [],
            THEIRS: lambda: [Theirs(_Books(port, slow=slow))],
            OURS: lambda: [BackgroundCallback(_ours(port, slow=slow))],
        }[way]()
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net, data = Net(slow), DataLoader(_torch_data(batches), batch_size=SIZE)
        began = time.perf_counter()
        trainer.fit(net, data)
        return time.perf_counter() - began

    return run


def in_transformers(port: int) -> Callable[..., float]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from asynccb.integrations.transformers import BackgroundCallback

    class Net(torch.nn.Module):
        def __init__(self, slow: bool) -> None:
            super().__init__()
            self.net, self.slow = _torch_net(), slow

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            if self.slow:
                time.sleep(STEP)
            return {"loss": torch.nn.functional.mse_loss(self.net(x), labels)}

    class Theirs(TrainerCallback):
        def __init__(self, books: _Books) -> None:
            self.books = books

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.books.batch()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.books.epoch(int(state.epoch), 0.0)

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    def run(way: str, slow: bool, epochs: int, batches: int) -> float:
        callbacks = {
            NONE: lambda: [],
            THEIRS: lambda: [Theirs(_Books(port, slow=slow))],
            OURS: lambda: [BackgroundCallback(_ours(port, slow=slow))],
        }[way]()
        arguments = TrainingArguments(
            output_dir="output",
            num_train_epochs=epochs,
            per_device_train_batch_size=SIZE,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(Net(slow), arguments, collate, _torch_data(batches), callbacks=callbacks)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began

    return run


def in_ignite(port: int) -> Callable[..., float]:
    import torch
    from ignite.engine import Engine, Events

    from asynccb.integrations.ignite import BackgroundHandlers

    def run(way: str, slow: bool, epochs: int, batches: int) -> float:
        net, (x, y) = _torch_net(), map(torch.from_numpy, _samples(batches))
        optimizer = torch.optim.SGD(net.parameters(), 0.01)

        def step(engine: Any, batch: Any) -> Any:
            if slow:
                time.sleep(STEP)
            loss = torch.nn.functional.mse_loss(net(batch[0]), batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        trainer, books = Engine(step), _Books(port, slow=slow)
        if way == THEIRS:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, books.batch)
            trainer.add_event_handler(
                Events.EPOCH_COMPLETED,
                lambda: books.epoch(trainer.state.epoch, trainer.state.output.item()),
            )
        elif way == OURS:
            BackgroundHandlers(_ours(port, slow=slow), model=net).attach(trainer)
        data = list(zip(x.split(SIZE), y.split(SIZE), strict=True))
        began = time.perf_counter()
        trainer.run(data, max_epochs=epochs)
        return time.perf_counter() - began

    return run


SETUPS = dict(zip(LOOPS, (by_hand, in_keras, in_lightning, in_transformers, in_ignite), strict=True))


def contender(loop: str, port: int, folder: str) -> Callable[..., float]:
    os.chdir(folder)
    return SETUPS[loop](port)


def measure(scale: Scale) -> Result:
    result = Result("our callbacks in the loops of others")
    with _serving() as port, tempfile.TemporaryDirectory() as folder, Contenders() as there:
        for loop in LOOPS:
            there.add(loop, contender, loop, port, folder)
        epochs, batches = (1, 50) if scale.quick else (EPOCHS, BATCHES)
        slow_epochs = 2 if scale.quick else SLOW_EPOCHS
        rows: dict[tuple[str, str, bool], Callable[[], float]] = {}
        for loop in there:
            for way in (NONE, THEIRS, OURS):
                rows[loop, way, False] = lambda c=there[loop], w=way: c(w, False, epochs, batches)
                rows[loop, way, True] = lambda c=there[loop], w=way: c(w, True, slow_epochs, SLOW_BATCHES)
        took = alternate(rows, scale.rounds)
        for loop in there:
            bare, slept = took[loop, NONE, False], took[loop, NONE, True]
            count = epochs * batches * 1e-6
            result.detail(f"{loop}: a batch without a callback", [s / count for s in bare], "us")
            for way in (THEIRS, OURS):
                beyond = minus(took[loop, way, False], bare)
                result.claim(f"{loop}: {way}, beyond that", [s / count for s in beyond], "us a batch")
            for way in (THEIRS, OURS):
                more = [part - 1 for part in over(took[loop, way, True], slept)]
                result.claim(f"{loop}: slow callback, {way}", [100 * part for part in more], "% longer")
        result.left_out = there.missing
    return result


if __name__ == "__main__":
    main(measure, __doc__)
