"""What one framework alone has: where its loop, its logs or its errors are not as everybody else's."""

from __future__ import annotations

import asyncio
import os
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from foreign import BATCHES, Beside, Raises, installed, samples

from asynccb import ArgumentError, Callback, Trainer
from asynccb.callbacks import EarlyStopping, LambdaCallback, Offload, SwapEMAWeights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(120)]

needs_keras = pytest.mark.skipif(not installed("keras"), reason="needs Keras")
needs_lightning = pytest.mark.skipif(not installed("lightning"), reason="needs Lightning")
needs_transformers = pytest.mark.skipif(not installed("transformers"), reason="needs transformers")
needs_ignite = pytest.mark.skipif(not installed("ignite"), reason="needs Ignite")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        yield


def keras_model() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import keras

    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros", use_bias=False)])
    model.compile("sgd", "mse")
    return model


@needs_keras
def test_a_keras_fit_that_failed_leaves_the_model_to_the_next_callback() -> None:
    model, (x, y) = keras_model(), samples()
    from asynccb.integrations.keras import BackgroundCallback

    def fit(*callbacks: Callback) -> BackgroundCallback:
        callback = BackgroundCallback([*callbacks])
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[callback])
        return callback

    with pytest.raises(ValueError, match="in a batch"):
        fit(Raises())
    assert fit().background.history.outcome == "completed"


@needs_keras
def test_a_callback_in_the_wrong_place_is_refused_before_the_first_batch() -> None:
    model, (x, y) = keras_model(), samples()
    import keras

    from asynccb.integrations.keras import BackgroundCallback

    for ours in (EarlyStopping("loss"), Offload(keras.callbacks.Callback())):
        with pytest.raises(ArgumentError, match=r"integrations\.keras\.BackgroundCallback"):
            model.fit(x, y, verbose=0, callbacks=[ours])
    theirs: Any = BackgroundCallback([])
    with pytest.raises(ArgumentError, match="runs them in Keras' own fit"):
        asyncio.run(Trainer(model).fit(x, y, verbose=0, callbacks=[theirs]))
    assert int(model.optimizer.iterations.numpy()) == 0


@needs_lightning
def test_ours_in_lightnings_list_says_where_they_belong() -> None:
    from lightning import pytorch as lightning

    with pytest.raises(AttributeError, match=r"integrations\.lightning\.BackgroundCallback"):
        lightning.Trainer(callbacks=[EarlyStopping("loss")], logger=False, enable_progress_bar=False)


@needs_transformers
def test_ours_in_the_list_of_transformers_say_where_they_belong(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer as TheirTrainer
    from transformers import TrainingArguments

    given = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(AttributeError, match=r"integrations\.transformers\.BackgroundCallback"):
        TheirTrainer(torch.nn.Linear(1, 1), given, callbacks=[EarlyStopping("loss")])


@needs_keras
def test_averages_of_weights_are_made_of_those_that_the_batch_has_left_behind() -> None:
    model, (x, y) = keras_model(), samples()
    import keras

    from asynccb.integrations.keras import BackgroundCallback

    class Averages(keras.callbacks.Callback):  # type: ignore[misc]  # Any, where Keras is not looked into
        average: Any = None

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            (kernel,) = self.model.get_weights()
            self.average = kernel if self.average is None else 0.5 * self.average + 0.5 * kernel

    theirs = Averages()
    ours = BackgroundCallback([SwapEMAWeights(0.5)])
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[ours, theirs])
    np.testing.assert_allclose(model.get_weights()[0], theirs.average, rtol=1e-6)


@needs_lightning
def test_an_epoch_of_lightning_has_no_metric_of_an_earlier_one() -> None:
    import torch
    from lightning import pytorch as lightning
    from torch.utils.data import DataLoader, TensorDataset

    from asynccb.integrations.lightning import BackgroundCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True, on_step=False)
            return {"loss": loss, "names": ["a"], "nothing": None, "kind": "x", "rows": batch[0]}

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

        def on_train_epoch_end(self) -> None:
            self.log("late", float(self.current_epoch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    class Tests(Callback):
        def on_test_end(self, logs: Any = None) -> None:
            tested.append(sorted(logs))

    class Stale(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            stale.append(sorted(trainer.callback_metrics))

    tested: list[Any] = []
    stale: list[Any] = []
    beside = Beside()
    data = DataLoader(TensorDataset(*map(torch.from_numpy, samples())), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=4,
        check_val_every_n_epoch=2,
        callbacks=[BackgroundCallback([beside, Tests()]), Stale()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data, data)
    assert [sorted(logs) for _, logs in beside.epochs] == [["loss"], ["loss", "val_loss"]] * 2
    assert tested == [["val_loss"]] * 2
    assert all(list(logs) == ["loss"] for _, logs in beside.batches)
    assert stale[2] == ["late", "loss", "val_loss"]  # the negative control: what Lightning shows there


def transformers_of(data: Any, callbacks: Any, **arguments: Any) -> Any:
    """A training with two data sets to evaluate on; answers the Background."""
    import torch
    from torch.utils.data import TensorDataset
    from transformers import Trainer, TrainingArguments

    from asynccb.integrations.transformers import BackgroundCallback

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": torch.nn.functional.mse_loss(self.layer(x), labels)}

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    full = TensorDataset(*map(torch.from_numpy, samples()))
    with tempfile.TemporaryDirectory() as folder:
        callback = BackgroundCallback(callbacks)
        given = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "logging_strategy": "no"}
        quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        told = TrainingArguments(output_dir=folder, **quiet, **(given | arguments))
        data = full if data is None else data
        Trainer(Module(), told, collate, data, {"a": full, "b": full}, callbacks=[callback]).train()
    return callback.background


@needs_transformers
def test_an_epoch_of_transformers_has_the_metrics_of_all_evaluations() -> None:
    beside = Beside()
    transformers_of(None, [beside], eval_strategy="epoch")
    batches = ["(", ")"] * BATCHES
    epochs = [[epoch, *batches, *["test", "tested"] * 2, f"end of {epoch}"] for epoch in range(2)]
    assert beside.hooks == ["begin", *epochs[0], *epochs[1], "end"]
    for _, logs in beside.epochs:
        assert {"eval_a_loss", "eval_b_loss"} <= logs.keys()


@needs_transformers
def test_a_stop_behind_several_evaluations_is_in_time_from_the_second_epoch_on() -> None:
    def stop(epoch: int, logs: Any) -> None:
        if epoch == 1:
            stops.run.stop("enough")

    stops = LambdaCallback(on_epoch_end=stop)
    background = transformers_of(None, [stops], eval_strategy="epoch", num_train_epochs=9)
    assert background.history.epoch == [0, 1]
    assert background.run.step == 2 * BATCHES


@needs_transformers
def test_epochs_of_data_without_a_length_are_counted() -> None:
    from torch import from_numpy
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return zip(*map(from_numpy, samples()), strict=True)

    background = transformers_of(Stream(), [], max_steps=3 * BATCHES)
    assert background.history.epoch == [0, 1, 2]
    assert background.history.params == {"epochs": None, "steps": None, "verbose": 0}


@needs_transformers
def test_steps_are_those_of_a_whole_epoch_wherever_the_training_ends() -> None:
    background = transformers_of(None, [], num_train_epochs=1.5)
    assert background.history.params["steps"] == BATCHES


@needs_ignite
@pytest.mark.parametrize("order", ["listener first", "listener last", "raises first", "two of ours"])
def test_what_becomes_of_an_exception_in_ignite_is_for_those_to_say_who_listen(order: str) -> None:
    from ignite.engine import Engine, Events

    from asynccb.integrations.ignite import BackgroundHandlers

    def fail(engine: Any, batch: Any) -> None:
        raise ValueError("in a batch")

    def listen(error: Exception) -> None:
        heard.append(error)
        if order == "raises first":
            raise error

    heard: list[Any] = []
    trainer, handlers = Engine(fail), [BackgroundHandlers([])]
    trainer.logger.disabled = True
    if order.endswith("first"):
        trainer.add_event_handler(Events.EXCEPTION_RAISED, listen)
    handlers[0].attach(trainer)
    if order == "listener last":
        trainer.add_event_handler(Events.EXCEPTION_RAISED, listen)
    if order == "two of ours":
        handlers.append(BackgroundHandlers([]))
        handlers[1].attach(trainer)
    if order.startswith("listener"):
        trainer.run([1])
    else:
        with pytest.raises(ValueError, match="in a batch"):
            trainer.run([1])
    assert all(str(error) == "in a batch" for error in heard)
    assert bool(heard) == (order != "two of ours")
    assert [of.background.history.outcome for of in handlers] == ["failed"] * len(handlers)
    assert not any(of.background.is_open for of in handlers)
