"""Keras' own callbacks in our list: what they are told and what they do is what Keras' ``fit`` gives them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from keras_models import CALM, classifier, digits, numbers

from asynccb import ArgumentError, Callback, CallbackBusy, Trainer
from asynccb.callbacks import BackupAndRestore, Offload
from asynccb.callbacks.hooks import read_hooks
from asynccb.callbacks.keras_callback import wrap
from asynccb.testing import ScriptedModel

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

pytestmark = [pytest.mark.heavy, *CALM]

OPTIONS: dict[str, Any] = {"batch_size": 32, "epochs": 2, "shuffle": False, "verbose": 0}


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def data(keras: ModuleType) -> tuple[Any, Any]:
    return digits(100)


def recorder(keras: ModuleType) -> Any:
    """A callback of Keras that overrides every hook and writes down what it is told."""
    hooks = ["train_begin", "train_end", "epoch_begin", "epoch_end", "test_begin", "test_end"]
    hooks += [f"{part}_batch_{side}" for part in ("train", "test", "predict") for side in ("begin", "end")]
    hooks += ["predict_begin", "predict_end"]

    def noting(name: str) -> Any:
        def hook(self: Any, *told: Any, **named: Any) -> None:
            *index, logs = [*told, *named.values()]
            shown = {key: value for key, value in (logs or {}).items() if key != "outputs"}
            self.said.append((name, *index, dict(sorted(shown.items()))))

        return hook

    kind = type("Records", (keras.callbacks.Callback,), {f"on_{name}": noting(name) for name in hooks})
    made = kind()
    made.said = []
    return made


@pytest.mark.asyncio
async def test_all_hooks_are_told_the_same_as_in_keras_own_fit(keras: ModuleType, data: Any) -> None:
    x, y = data
    theirs, ours = classifier(), classifier()
    told, said = recorder(keras), recorder(keras)
    theirs.fit(x, y, callbacks=[told], validation_data=(x, y), **OPTIONS)
    await Trainer(ours).fit(x, y, callbacks=[said], validation_data=(x, y), **OPTIONS)
    assert said.said == told.said
    assert len(told.said) > 30
    assert said.params["steps"] == told.params["steps"] == 4
    assert said.params["epochs"] == told.params["epochs"]
    assert said.model is ours
    for model, notes in ((theirs, told), (ours, said)):
        notes.said.clear()
        if model is theirs:
            model.predict(x, batch_size=32, callbacks=[notes], verbose=0)
        else:
            await Trainer(model).predict(x, batch_size=32, callbacks=notes)
    assert said.said == told.said


@pytest.mark.asyncio
async def test_stopping_rates_rows_and_files_are_as_in_keras_own_fit(
    keras: ModuleType, data: Any, tmp_path: Path
) -> None:
    x, y = data

    def callbacks(folder: Path) -> list[Any]:
        folder.mkdir()
        return [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 * (epoch + 1)),
            keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=10.0),
            keras.callbacks.CSVLogger(str(folder / "rows.csv")),
            keras.callbacks.ModelCheckpoint(str(folder / "{epoch}.keras")),
            keras.callbacks.EarlyStopping(
                "loss", patience=1, min_delta=10.0, restore_best_weights=True, start_from_epoch=0
            ),
        ]

    options = {**OPTIONS, "epochs": 5}
    theirs, ours = classifier(optimizer="sgd"), classifier(optimizer="sgd")
    told = theirs.fit(x, y, callbacks=callbacks(tmp_path / "theirs"), **options).history
    history = await Trainer(ours).fit(x, y, callbacks=callbacks(tmp_path / "ours"), **options)
    assert history.history == told
    assert len(history.epoch) == 2
    assert numbers(ours) == numbers(theirs)
    rows, wanted = [(tmp_path / who / "rows.csv").read_text() for who in ("ours", "theirs")]
    assert rows == wanted
    names = [sorted(path.name for path in (tmp_path / who).iterdir()) for who in ("ours", "theirs")]
    assert names[0] == names[1] == ["1.keras", "2.keras", "rows.csv"]
    loaded = keras.models.load_model(tmp_path / "ours" / "1.keras")
    for one, other in zip(loaded.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)  # epoch 1 was the best, and came back


@pytest.mark.asyncio
async def test_each_runs_in_its_place_in_the_list_and_sees_what_was_added(
    keras: ModuleType, data: Any
) -> None:
    order: list[str] = []

    class Ours(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            order.append(f"{self.name} {logs.get('theirs')}")

    class Theirs(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            order.append("theirs")
            logs["theirs"] = 1.0

    history = await Trainer(classifier()).fit(
        *data, callbacks=[Ours("first"), Theirs(), Ours("last")], **{**OPTIONS, "epochs": 1}
    )
    assert order == ["first None", "theirs", "last 1.0"]
    assert history.history["theirs"] == [1.0]


@pytest.mark.asyncio
async def test_a_resumed_training_goes_on_with_what_they_have_counted(
    keras: ModuleType, data: Any, tmp_path: Path
) -> None:
    class Never(keras.callbacks.Callback):
        """Has what no backup can hold, and more than one should."""

        def __init__(self) -> None:
            super().__init__()
            self.lock, self.many = threading.Lock(), [0]

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.many += range(20_000)
            logs["score"] = float(-epoch)

    class Interrupts(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                self.run.stop("here")

    def callbacks(patience: int = 4) -> list[Any]:
        stops = keras.callbacks.EarlyStopping(
            "score", mode="max", patience=patience, restore_best_weights=True
        )
        plateau = keras.callbacks.ReduceLROnPlateau("score", mode="max", factor=0.5, patience=2)
        return [Never(), plateau, stops]

    async def fit(*more: Any, patience: int = 4) -> tuple[Any, Any, Any]:
        model, given = classifier(optimizer="sgd"), callbacks(patience)
        options = {**OPTIONS, "epochs": 9}
        history = await Trainer(model, seed=1).fit(*data, callbacks=[*given, *more], **options)
        return model, history, given

    whole, uninterrupted, _ = await fit()
    assert len(uninterrupted.epoch) == 5
    await fit(BackupAndRestore(tmp_path / "one"), Interrupts())
    resumed, history, _ = await fit(BackupAndRestore(tmp_path / "one"))
    assert history.history == uninterrupted.history
    assert numbers(resumed) == numbers(whole)
    # What was not changed while it trained is the new one's own.
    await fit(BackupAndRestore(tmp_path / "two"), Interrupts())
    _, history, given = await fit(BackupAndRestore(tmp_path / "two"), patience=6)
    assert (len(history.epoch), given[-1].patience) == (7, 6)


def test_a_checkpoint_has_a_hook_of_batches_only_where_it_counts_them(keras: ModuleType) -> None:
    kind = keras.callbacks.ModelCheckpoint

    class Own(kind):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...

    given = [kind("x.keras"), kind("x.keras", save_freq=5), Own("x.keras")]
    found = ["on_train_batch_end" in read_hooks(wrap(callback)).inline for callback in given]
    assert found == [False, True, True]


@pytest.mark.asyncio
async def test_offloaded_it_has_a_model_of_its_own_and_stops_the_training(
    keras: ModuleType, data: Any
) -> None:
    seen: list[Any] = []
    went_on = threading.Event()

    class Evaluates(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            assert went_on.wait(20)  # inline it would wait for ever
            seen.append((self.model, self.model.evaluate(*data, verbose=0, return_dict=True)["loss"]))
            self.model.stop_training = True

    class GoesOn(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                went_on.set()

    model = classifier()
    history = await Trainer(model).fit(
        *data,
        callbacks=[Offload(Evaluates()), GoesOn()],
        validation_data=data,
        **{**OPTIONS, "epochs": 50},
    )
    assert all(isinstance(shown, keras.Model) and shown is not model for shown, _ in seen)
    assert seen[0][1] == pytest.approx(history.history["val_loss"][0], rel=1e-6)
    assert history.outcome == "stopped"
    assert len(history.epoch) <= 6


@pytest.mark.asyncio
async def test_what_keras_callbacks_cannot_do_here_is_refused(keras: ModuleType, data: Any) -> None:
    begun: list[Any] = []

    class Begins(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            begun.append(self)

    stops = keras.callbacks.EarlyStopping("loss")
    for callbacks in ([Begins(), stops], [Begins(), Offload(stops)]):
        with pytest.raises(ArgumentError, match="needs a Keras model, and the model is a ScriptedModel"):
            await Trainer(ScriptedModel()).fit(*data, callbacks=callbacks, verbose=0)
    assert begun == []
    backup = keras.callbacks.BackupAndRestore("somewhere")
    with pytest.raises(ArgumentError, match=r"asynccb\.callbacks\.BackupAndRestore"):
        await Trainer(classifier()).fit(*data, callbacks=[backup], verbose=0)
    with pytest.raises(ArgumentError, match="each instance once"):
        await Trainer(classifier()).fit(*data, callbacks=[stops, stops], verbose=0)
    with pytest.raises(ArgumentError, match="not classes"):
        await Trainer(classifier()).fit(*data, callbacks=[keras.callbacks.EarlyStopping], verbose=0)


@pytest.mark.asyncio
async def test_one_serves_one_run_at_a_time(keras: ModuleType, data: Any) -> None:
    go_on = threading.Event()

    class Holds(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            assert go_on.wait(20)

    holds = Holds()
    run = Trainer(classifier()).start(*data, callbacks=holds, **{**OPTIONS, "epochs": 0})
    with pytest.raises(CallbackBusy, match="Holds"):
        await Trainer(classifier()).fit(*data, callbacks=holds, **OPTIONS)
    go_on.set()
    await run


@pytest.mark.asyncio
async def test_an_error_in_it_is_the_trainings(keras: ModuleType, data: Any) -> None:
    class Fails(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await Trainer(classifier()).fit(*data, callbacks=Fails(), **OPTIONS)
