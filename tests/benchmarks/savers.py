"""Trainings that save as they train: asynccb, what it is measured against, and the peers. Used by ``stall``
and ``memory``.

All train the same network, a row of square linear layers whose weights are the whole state (plain gradient
descent keeps none beside them), or an embedding with one layer behind it, and all save after the same
batches. A training answers when each of its batches had ended; what a batch paid for a save is therefore in
the batches that follow. What each one writes, and whether it is on the disk when the save is done (its calls
of fsync were counted):

================  ==============================================================================  =====
asynccb           ``ModelCheckpoint(save_freq=...)``: HDF5, atomic                                  yes
h5py inline       the same weights, a dataset each, in an inline hook of the same training           no
copyto            the limit: an inline hook copies tensor by tensor into warm buffers; no file       no
torch in asynccb  a torch module under ``Trainer``, whose ``live`` shows its tensors and whose
                  ``train_batch`` asks the gate before ``optimizer.step()``; a snapshot, no file    no
Keras             ``ModelCheckpoint(save_freq=..., save_weights_only=True)``: ``.weights.h5``        no
Orbax             ``StandardCheckpointer`` (it is the asynchronous one), jitted, donated steps       yes
DCP               torch ``async_save``, default stager, files synced by default                     yes
DCP gated         the same with a kept stager that copies on a thread into reused memory, waited
                  for before ``optimizer.step()``                                                   yes
Lightning         ``AsyncCheckpointIO().save_checkpoint`` of the state dict                          no
================  ==============================================================================  =====
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

PEERS = ("Keras", "Orbax", "DCP", "DCP gated", "Lightning")
SPARSE_PEERS = ("DCP", "DCP gated", "Lightning")
ADAPTED = "torch in asynccb"
LEARNING_RATE = 1e-6
EMBEDDED = 64


class Job(NamedTuple):
    """What is trained: state of ``megabytes`` (2**20 bytes) in ``tensors``, on batches of ``batch`` rows."""

    megabytes: int
    tensors: int
    batch: int
    sparse: bool = False

    @property
    def layers(self) -> int:
        return self.tensors // 2

    @property
    def width(self) -> int:
        """Of each square layer: width * (width + 1) floats."""
        return round(math.sqrt(self.megabytes * 2**18 / self.layers))

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return self.megabytes * 2**18 // EMBEDDED

    def __str__(self) -> str:
        what = "embedding" if self.sparse else f"{self.tensors:,} tensors"
        return f"{self.megabytes} MB, {what}"


class Told(NamedTuple):
    """What a training tells.

    Attributes:
        ended: when each batch had ended, seconds.
        gate: seconds that the training waited for a copy or for memory to copy into, at all saves but the
            first and the one after the last batch.
        copies: seconds of each copy, told by ``copyto`` alone.
        saved: how many saves there were.
    """

    ended: list[float]
    gate: float = 0.0
    copies: tuple[float, ...] = ()
    saved: int = 0


def is_save(step: int, every: int) -> bool:
    """Whether to save after this 0-based step; ``every`` 0: never."""
    return bool(every) and (step + 1) % every == 0


def kernel(width: int) -> Any:
    """Keeps the size of what goes through it, however many layers there are."""
    import numpy as np

    noise = np.random.default_rng(0).normal(0, 0.01 / math.sqrt(width), (width, width))
    return (np.eye(width) + noise).astype(np.float32)


def batch_of(job: Job) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(1)
    if job.sparse:
        return generator.integers(0, job.rows, (job.batch, 1)), np.zeros((job.batch, 1), np.float32)
    x = generator.normal(size=(job.batch, job.width)).astype(np.float32)
    return x, np.zeros_like(x)


# asynccb ----------------------------------------------------------------------------------------------------


def ours(job: Job, folder: str, how: str) -> Callable[[int, int], Told]:
    """``how``: "asynccb", "copyto", "h5py inline", or "nothing", which does not save."""
    from asynccb import Callback, Trainer
    from asynccb.callbacks import ModelCheckpoint

    class Clock(Callback):
        changes_model = False

        def __init__(self, steps: int, every: int) -> None:
            self.ended: list[float] = []
            # Before the second save and before the last batch: the first save does not count, and one after
            # the last batch has no batch to hide behind.
            self.looks, self.waited = (2 * every - 2, steps - 2), list[float]()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.ended.append(time.perf_counter())
            if batch in self.looks:
                waited = self.run.stats.waited
                self.waited.append(waited.get("gate", 0.0) + waited.get("pool", 0.0))

    model, data = _our_model(job), batch_of(job)
    buffers = [weight.value.copy() for weight in model.weights] if how == "copyto" else []

    class Inline(Callback):
        changes_model = False

        def __init__(self, every: int) -> None:
            self.every, self.took = every, list[float]()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if is_save(batch, self.every):
                began = time.perf_counter()
                self.save(batch)
                self.took.append(time.perf_counter() - began)

        def save(self, batch: int) -> None: ...

    class Copy(Inline):
        def save(self, batch: int) -> None:
            import numpy as np

            for buffer, weight in zip(buffers, self.model.weights, strict=True):
                np.copyto(buffer, weight.value)

    class Write(Inline):
        def save(self, batch: int) -> None:
            import h5py

            with h5py.File(os.path.join(folder, f"inline-{batch}.h5"), "w") as file:
                for weight in self.model.weights:
                    file.create_dataset(weight.path, data=weight.value)

    def run(steps: int, every: int) -> Told:
        empty(folder)
        clock, callbacks = Clock(steps, every), list[Callback]()
        if how == "asynccb" and every:
            callbacks = [ModelCheckpoint(os.path.join(folder, "ours-{batch}.hdf5"), save_freq=every)]
        elif how in ("copyto", "h5py inline") and every:
            callbacks = [(Copy if how == "copyto" else Write)(every)]

        asyncio.run(Trainer(model, seed=1).fit([data] * steps, verbose=0, callbacks=[clock, *callbacks]))
        waited = clock.waited[-1] - clock.waited[0] if every else 0.0
        copies = tuple(callbacks[0].took) if how == "copyto" and every else ()
        return Told(clock.ended, waited, copies, steps // every if every else 0)

    return run


def _our_model(job: Job) -> Any:
    from asynccb.models import Dense, Embedding, Flatten, Sequential

    if job.sparse:
        layers = [Embedding(job.rows, EMBEDDED, input_length=1), Flatten(), Dense(1)]
    else:
        layers = [Dense(job.width, input_dim=job.width), *(Dense(job.width) for _ in range(job.layers - 1))]
    model = Sequential(layers, seed=7)
    model.compile(optimizer="sgd", loss="mse")
    model.optimizer.lr = LEARNING_RATE
    if not job.sparse:
        weight = kernel(job.width)
        model.set_weights([weight if old.ndim == 2 else old for old in model.get_weights()])
    return model


def adapted(job: Job, folder: str) -> Callable[[int, int], Told]:
    """A model of another framework under asynccb: what a copy costs it, without a file."""
    import torch

    from asynccb import Callback, Trainer
    from asynccb.protocols import LiveState

    class State:
        def __init__(self, arrays: Any) -> None:
            self.arrays = dict(enumerate(arrays))

        def save(self, path: Any, *, weights_only: bool = False) -> None:
            raise NotImplementedError

        def to_model(self) -> Any:
            raise NotImplementedError

    class Module:
        metrics_names = ("loss",)
        stop_training = False

        def __init__(self) -> None:
            self.net = _torch_net(job)
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE)
            self.tensors = [parameter.detach().numpy() for parameter in self.net.parameters()]
            self.segments = [(at, 0, len(tensor)) for at, tensor in enumerate(self.tensors)]

        def live(self) -> LiveState:
            return LiveState(self.tensors, self.segments, [None] * len(self.tensors), State)

        def train_batch(self, batch: Any, before_update: Any = None) -> dict[str, float]:
            self.optimizer.zero_grad(set_to_none=False)
            x, y = map(torch.from_numpy, (batch.x, batch.y))
            loss = torch.nn.functional.mse_loss(self.net(x), y)
            loss.backward()
            if before_update.copying:
                before_update()
            self.optimizer.step()
            return {"loss": loss.item()}

    class Clock(Callback):
        changes_model = False

        def __init__(self, every: int) -> None:
            self.ended: list[float] = []
            self.every = every

        def on_train_begin(self, logs: Any = None) -> None:
            self.run.expect_copies()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> Any:
            self.ended.append(time.perf_counter())
            if is_save(batch, self.every):
                return self.use(self.run.snapshot_now(self, pooled=True))
            return None

        async def use(self, snapshot: Any) -> None:
            snapshot.release()

    module, data = Module(), batch_of(job)

    def run(steps: int, every: int) -> Told:
        clock = Clock(every)
        asyncio.run(Trainer(module, seed=1).fit([data] * steps, verbose=0, callbacks=clock))
        return Told(clock.ended, saved=steps // every if every else 0)

    return run


# Peers ------------------------------------------------------------------------------------------------------


def keras(job: Job, folder: str) -> Callable[[int, int], Told]:
    import keras
    import numpy as np

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.ended: list[float] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.ended.append(time.perf_counter())

    layers = [keras.layers.Dense(job.width) for _ in range(job.layers)]
    model = keras.Sequential([keras.Input((job.width,)), *layers])
    model.compile(optimizer=keras.optimizers.SGD(LEARNING_RATE), loss="mse")
    for layer in layers:
        layer.kernel.assign(kernel(job.width))
    x, y = batch_of(job)

    def run(steps: int, every: int) -> Told:
        empty(folder)
        clock, callbacks = Clock(), []
        if every:
            path = os.path.join(folder, "keras-{batch}.weights.h5")
            callbacks = [keras.callbacks.ModelCheckpoint(path, save_freq=every, save_weights_only=True)]
        model.fit(
            np.tile(x, (steps, 1)),
            np.tile(y, (steps, 1)),
            batch_size=job.batch,
            shuffle=False,
            verbose=0,
            callbacks=[clock, *callbacks],
        )
        return Told(clock.ended, saved=steps // every if every else 0)

    return run


def orbax(job: Job, folder: str) -> Callable[[int, int], Told]:
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    def forward(state: Any, x: Any, y: Any) -> Any:
        for weight, bias in state:
            x = x @ weight + bias
        return jnp.mean((x - y) ** 2)

    def update(state: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(forward)(state, x, y)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state, gradients), loss

    step = jax.jit(update, donate_argnums=0)
    weight = kernel(job.width)
    held = [[(jnp.array(weight), jnp.zeros(job.width)) for _ in range(job.layers)]]
    x, y = map(jnp.asarray, batch_of(job))
    checkpointer = ocp.StandardCheckpointer()

    def run(steps: int, every: int) -> Told:
        empty(folder)
        ended, state = [], held[0]
        for index in range(steps):
            state, loss = step(state, x, y)
            loss.block_until_ready()
            ended.append(time.perf_counter())
            if is_save(index, every):
                checkpointer.save(os.path.join(folder, f"orbax-{index}"), state)
        checkpointer.wait_until_finished()
        held[0] = state
        return Told(ended, saved=steps // every if every else 0)

    return run


def torch(job: Job, folder: str, how: str) -> Callable[[int, int], Told]:
    import torch

    model = _torch_net(job)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x, y = map(torch.from_numpy, batch_of(job))
    saver = {"DCP": _dcp, "DCP gated": _dcp_gated, "Lightning": _lightning}[how]()

    def run(steps: int, every: int) -> Told:
        empty(folder)
        ended = []
        for index in range(steps):
            # Kept and zeroed: freed and allocated anew, a save would change how fast the allocator is later.
            optimizer.zero_grad(set_to_none=False)
            torch.nn.functional.mse_loss(model(x), y).backward()
            saver.before_update()
            optimizer.step()
            ended.append(time.perf_counter())
            if is_save(index, every):
                saver.save(model.state_dict(), os.path.join(folder, f"torch-{index}"))
        saver.finish()
        return Told(ended, saved=steps // every if every else 0)

    return run


def _torch_net(job: Job) -> Any:
    import torch

    if job.sparse:
        embedding = torch.nn.Embedding(job.rows, EMBEDDED, sparse=True)
        return torch.nn.Sequential(embedding, torch.nn.Flatten(), torch.nn.Linear(EMBEDDED, 1))
    net = torch.nn.Sequential(*(torch.nn.Linear(job.width, job.width) for _ in range(job.layers)))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.from_numpy(kernel(job.width).T))
            layer.bias.zero_()
    return net


class _Saver(NamedTuple):
    save: Callable[[dict[str, Any], str], Any]
    finish: Callable[[], Any]
    before_update: Callable[[], Any] = lambda: None


def _dcp() -> _Saver:
    from torch.distributed import checkpoint

    under_way: list[Any] = []

    def finish() -> None:
        while under_way:
            under_way.pop().result()

    def save(state: dict[str, Any], path: str) -> None:
        finish()
        under_way.append(checkpoint.async_save({"model": state}, checkpoint_id=path, no_dist=True))

    return _Saver(save, finish)


def _dcp_gated() -> _Saver:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    beside_on_a_cpu = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
    )
    stager = DefaultStager(beside_on_a_cpu)
    staging: list[Any] = []
    under_way: list[Any] = []

    def before_update() -> None:
        while staging:
            staging.pop().result()

    def finish() -> None:
        before_update()
        while under_way:
            under_way.pop().result()

    def save(state: dict[str, Any], path: str) -> None:
        finish()
        answer = checkpoint.async_save(
            {"model": state}, checkpoint_id=path, no_dist=True, async_stager=stager
        )
        staging.append(answer.staging_completion)
        under_way.append(answer.upload_completion)

    return _Saver(save, finish, before_update)


def _lightning() -> _Saver:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    checkpoints = AsyncCheckpointIO(TorchCheckpointIO())
    return _Saver(
        lambda state, path: checkpoints.save_checkpoint({"state_dict": state}, path + ".ckpt"),
        checkpoints.teardown,
    )


# All of them ------------------------------------------------------------------------------------------------


def trains(name: str, job: Job, folder: str) -> Callable[[int, int], Told]:
    """The training of that name, for a :class:`harness.Contender`; call it with the number of steps, and with
    how many of them lie from one save to the next (0: none are made)."""
    os.makedirs(folder, exist_ok=True)
    if name == "Keras":
        return keras(job, folder)
    if name == "Orbax":
        return orbax(job, folder)
    if name in SPARSE_PEERS:
        return torch(job, folder, name)
    if name == ADAPTED:
        return adapted(job, folder)
    return ours(job, folder, name)


def empty(folder: str) -> None:
    """Removes what the last run wrote."""
    for entry in os.scandir(folder):
        shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
