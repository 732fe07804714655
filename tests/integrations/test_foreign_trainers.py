"""Our callbacks in the loops of Keras, Lightning, transformers and Ignite: they see what the frameworks' own
callbacks see, and stop them."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import os
import threading
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from foreign import BATCHES, NEEDS, Beside, Raises, installed, samples

from asynccb import ArgumentError, Callback, CallbackError
from asynccb.callbacks import CSVLogger, EarlyStopping, ModelCheckpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(120)]

EPOCHS = 3


class Fails(Callback):
    async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        raise PermissionError("the disk")


class Stops(Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1:
            self.run.stop("seen enough")


Train = Any
"""A function (callbacks, epochs=EPOCHS, loop=None) that answers the Background and what the framework's own
callback or log has recorded, epoch by epoch."""


def keras_fit(callbacks: Any, epochs: int = EPOCHS, loop: Any = None) -> tuple[Any, list[dict[str, Any]]]:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import keras

    from asynccb.integrations.keras import BackgroundCallback

    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = samples()
    with BackgroundCallback(callbacks, loop=loop) as callback:
        record = model.fit(
            x,
            y,
            batch_size=8,
            epochs=epochs,
            verbose=0,
            shuffle=False,
            validation_data=(x, y),
            callbacks=[callback],
        )
    rows = [{name: values[at] for name, values in record.history.items()} for at in range(len(record.epoch))]
    return callback.background, rows


def lightning_fit(callbacks: Any, epochs: int = EPOCHS, loop: Any = None) -> tuple[Any, list[dict[str, Any]]]:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback as LightningCallback
    from torch.utils.data import DataLoader, TensorDataset

    from asynccb.integrations.lightning import BackgroundCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            torch.nn.init.zeros_(self.layer.weight)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True, on_step=False)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    class Record(LightningCallback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            rows.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    rows: list[dict[str, Any]] = []
    data = DataLoader(TensorDataset(*map(torch.from_numpy, samples())), batch_size=8)
    callback = BackgroundCallback(callbacks, loop=loop)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[Record(), callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data, data)
    return callback.background, rows


def transformers_train(
    callbacks: Any, epochs: int = EPOCHS, loop: Any = None
) -> tuple[Any, list[dict[str, Any]]]:
    import tempfile

    import torch
    from torch.utils.data import TensorDataset
    from transformers import Trainer, TrainingArguments

    from asynccb.integrations.transformers import BackgroundCallback

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            torch.nn.init.zeros_(self.layer.weight)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": torch.nn.functional.mse_loss(self.layer(x), labels)}

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    data = TensorDataset(*map(torch.from_numpy, samples()))
    with tempfile.TemporaryDirectory() as folder, BackgroundCallback(callbacks, loop=loop) as callback:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            Module(), arguments, collate, data, data, callbacks=[callback], optimizers=(None, None)
        )
        trainer.train()
    found = [row for row in trainer.state.log_history if "eval_loss" in row]
    return callback.background, [{"eval_loss": row["eval_loss"]} for row in found]


def ignite_run(callbacks: Any, epochs: int = EPOCHS, loop: Any = None) -> tuple[Any, list[dict[str, Any]]]:
    import torch
    from ignite.engine import Engine, Events
    from ignite.metrics import Average

    from asynccb.integrations.ignite import BackgroundHandlers

    layer = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    x, y = map(torch.from_numpy, samples())
    data = list(zip(x.split(8), y.split(8), strict=True))

    def step(engine: Any, batch: Any) -> float:
        loss = torch.nn.functional.mse_loss(layer(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def test(engine: Any, batch: Any) -> float:
        with torch.no_grad():
            return torch.nn.functional.mse_loss(layer(batch[0]), batch[1]).item()

    trainer, evaluator = Engine(step), Engine(test)
    Average().attach(trainer, "loss")
    Average().attach(evaluator, "loss")
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(data))
    rows: list[dict[str, Any]] = []
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: rows.append(
            {"loss": trainer.state.metrics["loss"], "val_loss": evaluator.state.metrics["loss"]}
        ),
    )
    handlers = BackgroundHandlers(callbacks, model=layer, optimizer=optimizer, loop=loop)
    handlers.attach(trainer, evaluator)
    trainer.run(data, max_epochs=epochs)
    return handlers.background, rows


TRAINS: dict[str, Train] = {
    "keras": keras_fit,
    "lightning": lightning_fit,
    "transformers": transformers_train,
    "ignite": ignite_run,
}


PARAMETERS = [
    pytest.param(name, id=name, marks=pytest.mark.skipif(not installed(name), reason=f"needs {NEEDS[name]}"))
    for name in TRAINS
]


@pytest.fixture(params=PARAMETERS)
def train(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Train]:
    """Each framework's training, which has the same data and the same model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        yield TRAINS[request.param]


def test_callbacks_see_the_events_and_logs_of_the_framework(train: Train) -> None:
    beside = Beside()
    background, recorded = train([beside])
    batches = ["(", ")"] * BATCHES
    told = [
        told for epoch in range(EPOCHS) for told in [epoch, *batches, "test", "tested", f"end of {epoch}"]
    ]
    assert beside.hooks == ["begin", *told, "end"]
    assert [batch for batch, _ in beside.batches] == [*range(BATCHES)] * EPOCHS
    assert all(type(logs["loss"]) is float for _, logs in beside.batches)
    assert [epoch for epoch, _ in beside.epochs] == [*range(EPOCHS)]
    assert len(recorded) == EPOCHS
    for (_, logs), row in zip(beside.epochs, recorded, strict=True):
        assert logs.items() >= row.items()
    assert beside.threads == {"asynccb background"}
    assert background.history.outcome == "completed"
    assert background.run.step == EPOCHS * BATCHES
    assert "asynccb background" not in {thread.name for thread in threading.enumerate()}


def test_a_stop_ends_the_frameworks_training_behind_the_batch(train: Train) -> None:
    background, _ = train([Stops()])
    assert background.run.step == 2
    assert (background.history.outcome, background.history.reason) == ("stopped", "seen enough")


def test_early_stopping_ends_it_behind_an_epoch(train: Train) -> None:
    class Worse(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["worse"] = float(epoch)

    beside = Beside()
    background, _ = train([Worse(), EarlyStopping("worse", patience=2), beside], epochs=9)
    assert background.history.epoch == [0, 1, 2]
    assert background.run.step == 3 * BATCHES
    assert background.history.outcome == "stopped"


def test_a_failure_beside_it_is_raised_out_of_the_frameworks_call(train: Train) -> None:
    with pytest.raises(CallbackError, match=r"Fails\.on_epoch_end of epoch 0 raised:?\s+PermissionError"):
        train([Fails()])
    assert "asynccb background" not in {thread.name for thread in threading.enumerate()}


def test_an_exception_in_its_loop_is_told_and_goes_on(train: Train) -> None:
    raises, beside = Raises(), Beside()
    with pytest.raises(ValueError, match="in a batch") as caught:
        train([beside, raises])
    assert caught.value is raises.error
    assert beside.hooks[-2:] == [raises.error, "end"]
    assert "asynccb background" not in {thread.name for thread in threading.enumerate()}


def test_rows_are_on_the_disk_when_the_frameworks_call_returns(train: Train, tmp_path: Path) -> None:
    background, _ = train([CSVLogger(tmp_path / "log.csv")])
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == background.history.epoch == [*range(EPOCHS)]


def test_hooks_run_on_the_callers_loop_where_it_is_given(train: Train) -> None:
    class Here(Callback):
        async def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            loops.append(asyncio.get_running_loop())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(train, [Here()], loop=loop)
        assert loops == [loop] * EPOCHS

    loops: list[Any] = []
    asyncio.run(main())


def test_a_checkpoint_holds_the_weights_of_the_moment(train: Train, tmp_path: Path) -> None:
    if train is keras_fit and importlib.util.find_spec("asynccb.models.keras") is None:
        pytest.skip("needs what copies Keras models")

    class Compares(Callback):
        changes_model = False

        def on_epoch_end(self, epoch: int, logs: Any = None) -> Any:
            told = getattr(self.model, "get_weights", None)
            weights = told() if told else [value.numpy() for value in self.model.state_dict().values()]
            return self._compare(self.snapshot(), [weight.copy() for weight in weights])

        async def _compare(self, snapshot: Any, weights: Any) -> None:
            arrays = list(snapshot.arrays.values())[: len(weights)]
            compared.append(all(map(np.array_equal, arrays, weights)))
            first.append(float(arrays[0].ravel()[0]))

    compared: list[bool] = []
    first: list[float] = []
    train([Compares(), ModelCheckpoint(str(tmp_path / "{epoch}.weights.h5"))])
    assert compared == [True] * EPOCHS
    assert len(set(first)) == EPOCHS  # else old weights would do
    assert len(list(tmp_path.iterdir())) == EPOCHS


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_a_torch_module_in_a_hand_written_loop_is_written_as_torch_or_as_hdf5(tmp_path: Path) -> None:
    import torch

    from asynccb.integrations import Background
    from asynccb.models.torch import load_weights

    module = torch.nn.Linear(2, 1).to(torch.bfloat16)
    kinds = [(f"{{epoch}}.{end}", end == "pt") for end in ("pt", "pth", "h5", "safetensors")]
    saves = [ModelCheckpoint(str(tmp_path / path), save_weights_only=only) for path, only in kinds]
    with Background(saves, model=module) as hooks:
        hooks.on_epoch_end(0)
        written = {name: value.clone() for name, value in module.state_dict().items()}
        with torch.no_grad():
            module.weight.add_(1)
    assert torch.equal(torch.load(tmp_path / "1.pt", weights_only=True)["weight"], written["weight"])
    for path, _ in kinds:
        other = torch.nn.Linear(2, 1).to(torch.bfloat16)
        other.load_state_dict(load_weights(tmp_path / path.format(epoch=1)))
        assert torch.equal(other.weight, written["weight"])


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_the_state_of_optimizers_is_copied_with_a_module(tmp_path: Path) -> None:
    import torch

    from asynccb.integrations.module_state import CopiedModule
    from asynccb.models import TorchModel

    module = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    second = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    second.step()
    state = CopiedModule(module, [optimizer, second]).capture()
    slot = optimizer.state[module.weight]["exp_avg"].clone()
    optimizer.step()
    assert np.array_equal(state.arrays["optimizer/weight/exp_avg"], slot.numpy())
    assert "optimizer/1/weight/momentum_buffer" in state.arrays
    state.save(tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)["optimizer"]
    again = torch.optim.Adam(module.parameters())
    again.load_state_dict(loaded)
    assert torch.equal(again.state[module.weight]["exp_avg"], slot)
    state.save(tmp_path / "whole.h5")
    model = TorchModel(
        other := torch.nn.Linear(2, 1), torch.nn.MSELoss(), torch.optim.Adam(other.parameters())
    )
    model.load(tmp_path / "whole.h5")
    assert torch.equal(model.optimizer.state[other.weight]["exp_avg"], slot)
    with pytest.raises(ArgumentError, match="not written in this format"):
        state.save(tmp_path / "model.ckpt")
    with pytest.raises(NotImplementedError, match="load_state_dict"):
        state.to_model()


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
def test_what_numpy_has_a_type_for_is_shown_in_it() -> None:
    import torch

    from asynccb.integrations.module_state import CopiedModule

    module = torch.nn.Module()
    module.register_buffer("large", torch.tensor([2**31 + 1], dtype=torch.uint32))
    module.register_buffer("brief", torch.ones(1, dtype=torch.bfloat16))
    arrays = CopiedModule(module).capture().arrays
    assert arrays["large"].tolist() == [2**31 + 1]
    assert arrays["brief"].dtype == np.float32
    module.register_buffer("complex", torch.tensor([1 + 2j]))  # half of it would be lost as a float
    assert CopiedModule(module).capture().arrays["complex"].tolist() == [1 + 2j]


@pytest.mark.skipif(not installed("lightning"), reason="needs Lightning")
def test_of_several_processes_the_first_runs_callbacks_and_all_stop_at_the_same_epoch_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from asynccb.integrations.lightning import BackgroundCallback

    def trainer(rank: int, first_says: bool) -> Any:
        """Stands for Lightning's: ``broadcast`` answers what the first process says."""
        return SimpleNamespace(
            is_global_zero=rank == 0,
            world_size=2,
            strategy=SimpleNamespace(broadcast=lambda own: own if rank == 0 else first_says),
            optimizers=[],
            current_epoch=0,
            max_epochs=1,
            num_training_batches=1,
            callback_metrics={},
            should_stop=False,
        )

    first, second = Beside(), Beside()
    for rank, beside in enumerate((first, second)):
        stops = Stops()
        callback, told = BackgroundCallback([beside, stops]), trainer(rank, first_says=True)
        callback.on_train_start(told, object())
        callback.on_train_epoch_start(told, object())
        for batch in range(2):
            callback.on_train_batch_start(told, object(), None, batch)
            callback.on_train_batch_end(told, object(), None, None, batch)
        assert not told.should_stop  # the other one trains on, and would wait for ever
        callback.on_train_epoch_end(told, object())
        assert told.should_stop
        callback.on_train_end(told, object())
    assert first.hooks == ["begin", 0, "(", ")", "(", ")", "end of 0", "end"]
    assert second.hooks == []
