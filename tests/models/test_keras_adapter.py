"""Keras models, trained as they are: the numbers of Keras' own ``fit``, and what ours adds.

With the backend that is set; ``test_keras_backends`` runs all of this with the other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from keras_models import CALM, classifier, digits, numbers

from asynccb import ArgumentError, Callback, CheckpointWriteError, ModelBusy, ResumeRefused, Trainer
from asynccb.callbacks import (
    BackupAndRestore,
    EarlyStopping,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    TensorBoard,
    TerminateOnNaN,
)
from asynccb.models import adapt
from asynccb.storage.atomic import is_temporary

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = [pytest.mark.heavy, *CALM]

OPTIONS: dict[str, Any] = {"batch_size": 32, "epochs": 3, "shuffle": False, "verbose": 0}


@pytest.fixture(scope="module")
def keras() -> ModuleType:
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def data(keras: ModuleType) -> tuple[Any, Any]:
    return digits()


async def fit(model: Any, x: Any, y: Any, *callbacks: Any, **options: Any) -> Any:
    return await Trainer(model, seed=1).fit(x, y, callbacks=list(callbacks), **{**OPTIONS, **options})


# ---------------------------------------------------------------- the numbers of Keras


@pytest.mark.asyncio
async def test_weights_and_history_are_those_of_keras_own_fit_to_the_last_bit(data: Any) -> None:
    x, y = data
    theirs, ours = (classifier(["accuracy", "auc"]) for _ in range(2))
    validation = (x[:100], y[:100])
    told = theirs.fit(x, y, validation_data=validation, **OPTIONS).history
    history = await fit(ours, x, y, validation_data=validation)
    assert numbers(ours) == numbers(theirs)
    assert history.history == told
    # That it is not for want of a difference: another order of the samples gives other numbers.
    shuffled = classifier(["accuracy", "auc"])
    await fit(shuffled, x, y, shuffle=True)
    assert numbers(shuffled) != numbers(theirs)


@pytest.mark.parametrize("weights", ["sample_weight", "class_weight"])
@pytest.mark.asyncio
async def test_weighted_samples_and_a_model_built_by_its_data_agree_too(data: Any, weights: str) -> None:
    x, y = data[0].astype("float64"), data[1]
    given: Any = {n: 0.25 * n for n in range(10)} if weights == "class_weight" else np.linspace(0, 2, len(x))
    theirs, ours = (classifier(inputs=False) for _ in range(2))
    told = theirs.fit(x, y, **{weights: given}, **OPTIONS).history
    history = await fit(ours, x, y, **{weights: given})
    assert numbers(ours) == numbers(theirs)
    assert history.history == told


@pytest.mark.asyncio
async def test_averages_of_the_optimizer_take_the_weights_place_at_the_end(
    keras: ModuleType, data: Any
) -> None:
    theirs, ours, plain = (
        classifier(optimizer=keras.optimizers.SGD(0.1, use_ema=ema, ema_momentum=0.9))
        for ema in (True, True, False)
    )
    theirs.fit(*data, **OPTIONS)
    await fit(ours, *data)
    await fit(plain, *data)
    assert numbers(ours) == numbers(theirs)
    assert numbers(plain)[0] != numbers(ours)[0]


@pytest.mark.asyncio
async def test_evaluate_and_predict_are_those_of_keras(data: Any) -> None:
    x, y = data
    model = classifier(["accuracy", "auc"])
    means = await Trainer(model).evaluate(x, y, batch_size=50)
    assert means == model.evaluate(x, y, batch_size=50, verbose=0, return_dict=True)
    assert next(iter(means)) == "loss"
    outputs = await Trainer(model).predict(x, batch_size=50)
    np.testing.assert_array_equal(outputs, model.predict(x, batch_size=50, verbose=0))


@pytest.mark.asyncio
async def test_batches_log_values_of_the_epoch_so_far(data: Any) -> None:
    losses: list[float] = []

    class Looks(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            losses.append(logs["loss"])

    history = await fit(classifier(), *data, Looks(), epochs=2)
    assert [losses[9], losses[19]] == history.history["loss"]


@pytest.mark.asyncio
async def test_what_is_read_late_is_of_its_own_batch(keras: ModuleType, data: Any, tmp_path: Path) -> None:
    """A metric whose value is its variable itself, whose memory the next batch may use again."""

    class Counts(keras.metrics.Sum):
        def update_state(self, y: Any, outputs: Any, sample_weight: Any = None) -> Any:
            return super().update_state(keras.ops.ones_like(y[:, 0]))

    class StopsInTheMiddle(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 4:
                shown.append(self.run.logs)
                self.run.stop("here")

    shown: list[Any] = []
    x, y = data
    options: dict[str, Any] = {"validation_data": (x[:64], y[:64])}
    first = await fit(classifier([Counts()]), x, y, BackupAndRestore(tmp_path), StopsInTheMiddle(), **options)
    assert first.history["sum"] == [32.0 * 5]
    assert shown[0]["sum"] in (32.0 * 3, 32.0 * 4)  # the one before, where it is not waited for
    history = await fit(classifier([Counts()]), x, y, BackupAndRestore(tmp_path), **options)
    assert history.history["sum"] == [320.0] * 3
    assert history.history["val_sum"] == [64.0] * 3


@pytest.mark.asyncio
async def test_models_in_several_threads_give_each_what_it_gives_alone(data: Any) -> None:
    alone = []
    for seed in (1, 5):
        model = classifier(seed=seed)
        await fit(model, *data, epochs=2)
        alone.append(numbers(model))
    together = [classifier(seed=seed) for seed in (1, 5)]
    await asyncio.gather(*(fit(model, *data, epochs=2) for model in together))
    assert [numbers(model) for model in together] == alone
    assert alone[0] != alone[1]


@pytest.mark.asyncio
async def test_a_train_step_of_ones_own_logs_what_it_says(keras: ModuleType, data: Any) -> None:
    class Own(keras.Model):
        def train_step(self, *arguments: Any) -> Any:
            answer = super().train_step(*arguments)
            logs, *state = answer if isinstance(answer, tuple) else (answer,)
            logs = {"loss": logs["loss"], "twice": logs["loss"] * 2}
            return (logs, *state) if state else logs

    x, y = data
    inputs = keras.Input((64,))
    model = Own(inputs, keras.layers.Dense(10)(inputs))
    model.compile("sgd", "mse")
    history = await fit(model, x, y, epochs=1)
    assert history.history["twice"][0] == pytest.approx(2 * history.history["loss"][0])


@pytest.mark.asyncio
async def test_the_thread_has_its_callers_dtype_policy_and_device(keras: ModuleType, data: Any) -> None:
    made: list[Any] = []
    devices: list[Any] = []
    on_jax = keras.backend.backend() == "jax"
    if on_jax:
        import jax

        here = jax.default_device(jax.devices("cpu")[0])
    else:
        here = contextlib.nullcontext()

    class Late(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            made.append((threading.current_thread(), keras.layers.Dense(10)))
            self.inner = made[-1][1]
            self.inner.build(shape)
            devices.append(jax.config.jax_default_device if on_jax else None)

        def call(self, x: Any) -> Any:
            return self.inner(x)

    model = keras.Sequential([Late()])
    model.compile("sgd", "mse")
    policies: list[str] = []
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        plain = threading.Thread(target=lambda: policies.append(keras.config.dtype_policy().name))
        plain.start()
        plain.join()
        with here:
            await fit(model, *data, epochs=1)
    finally:
        keras.config.set_dtype_policy(before)
    assert devices == [jax.devices("cpu")[0] if on_jax else None]
    assert policies == ["float32"]  # what a thread has that nobody tells
    ((thread, inner),) = made
    assert thread is not threading.main_thread()
    assert inner.dtype_policy.name == "mixed_bfloat16"


# ---------------------------------------------------------------- our callbacks with it


@pytest.mark.asyncio
async def test_a_training_goes_on_to_the_last_bit_where_another_was_stopped(
    data: Any, tmp_path: Path
) -> None:
    class StopsAt(Callback):
        def __init__(self, step: int) -> None:
            self.left = step

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.left -= 1
            if not self.left:
                self.run.stop("here")

    x, y = data
    options = {"shuffle": True, "validation_data": (x[:64], y[:64])}
    whole = classifier()
    uninterrupted = await fit(whole, x, y, **options)
    await fit(classifier(), x, y, BackupAndRestore(tmp_path), StopsAt(14), **options)
    # In the same process its layers are counted on and have other names; it goes on all the same.
    resumed = classifier()
    history = await fit(resumed, x, y, BackupAndRestore(tmp_path), **options)
    assert numbers(resumed) == numbers(whole)
    assert history.history == uninterrupted.history


@pytest.mark.asyncio
async def test_a_backup_of_another_model_is_refused(data: Any, tmp_path: Path) -> None:
    await fit(classifier(), *data, BackupAndRestore(tmp_path), epochs=1)
    with pytest.raises(ResumeRefused, match="class_name"):
        await fit(classifier(optimizer="sgd"), *data, BackupAndRestore(tmp_path), epochs=2)


@pytest.mark.asyncio
async def test_checkpoints_are_files_of_keras(keras: ModuleType, data: Any, tmp_path: Path) -> None:
    x, y = data
    model = classifier()
    await fit(
        model,
        x,
        y,
        ModelCheckpoint(tmp_path / "{epoch}.keras"),
        ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True),
    )
    names = ["1.keras", "2.keras", "3.keras", "last.weights.h5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    loaded = keras.models.load_model(tmp_path / "3.keras")
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    slots = len(model.optimizer.variables)
    assert numbers(loaded)[-slots:] == numbers(model)[-slots:]
    fresh = classifier(seed=7)
    with pytest.warns(UserWarning, match="the saved optimizer has 0 variables"):
        fresh.load_weights(tmp_path / "last.weights.h5")
    np.testing.assert_array_equal(fresh.predict(x, verbose=0), model.predict(x, verbose=0))
    older = keras.models.load_model(tmp_path / "1.keras")
    assert numbers(older) != numbers(model)


def test_a_file_that_could_not_be_written_leaves_the_old_one(
    keras: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = adapt(classifier()).capture()
    path = tmp_path / "model.keras"
    path.write_bytes(b"old")
    tried: list[str] = []

    def fails(self: Any, name: str) -> None:
        Path(name).write_bytes(b"half")
        tried.append(os.path.basename(name))
        raise OSError("no room")

    monkeypatch.setattr(keras.Sequential, "save", fails)
    with pytest.raises(CheckpointWriteError, match="no room"):
        state.save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.keras"]
    assert is_temporary(tried[0])
    assert tried[0].endswith(".keras")


def test_other_extensions_are_refused(tmp_path: Path) -> None:
    state = adapt(classifier()).capture()
    for name in ("model.h5", "model.hdf5", "model"):
        with pytest.raises(ArgumentError, match=r"name\.keras"):
            state.save(tmp_path / name)
    with pytest.raises(ArgumentError, match=r"name\.weights\.h5"):
        state.save(tmp_path / "model.keras", weights_only=True)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.asyncio
async def test_a_checkpoint_that_could_not_be_written_is_refused_before_the_first_batch(
    keras: ModuleType, data: Any, tmp_path: Path, weights_only: bool
) -> None:
    begun: list[int] = []

    class Begins(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            begun.append(epoch)

    class Cannot(keras.layers.Layer):
        def __init__(self, table: object) -> None:
            super().__init__()

        def call(self, x: Any) -> Any:
            return x

    name = "{epoch}.keras" if weights_only else "{epoch}.h5"
    checkpoint = ModelCheckpoint(tmp_path / name, save_weights_only=weights_only)
    with pytest.raises(ArgumentError, match=r"name\.weights\.h5"):
        await fit(classifier(), *data, checkpoint, Begins())
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10), Cannot(object())])
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match="get_config"):
        await fit(model, *data, ModelCheckpoint(tmp_path / "last.weights.h5"), Begins())
    assert begun == []


@pytest.mark.asyncio
async def test_the_rate_is_the_optimizers(data: Any) -> None:
    model = classifier(optimizer="sgd")
    schedule = LearningRateScheduler(lambda epoch: 0.5 / 2**epoch)
    history = await fit(model, *data, schedule)
    assert history.history["lr"] == [0.5, 0.25, 0.125]
    assert float(model.optimizer.learning_rate) == 0.125
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    await fit(model, *data, plateau)
    assert float(model.optimizer.learning_rate) == 0.125 / 4


@pytest.mark.asyncio
async def test_the_best_weights_come_back_and_a_hook_may_stop(data: Any) -> None:
    model, kept = classifier(optimizer="sgd"), []

    class Keeps(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            kept.append(self.model.get_weights())
            logs["score"] = float(-epoch)

    early = EarlyStopping("score", mode="max", patience=1, restore_best_weights=True)
    history = await fit(model, *data, Keeps(), early, epochs=9)
    assert len(history.epoch) == 2
    for best, now in zip(kept[0], model.get_weights(), strict=True):
        np.testing.assert_array_equal(best, now)


@pytest.mark.asyncio
async def test_a_loss_that_is_no_number_ends_the_training(data: Any) -> None:
    x, y = data
    spoilt = y.copy()
    spoilt[40] = np.nan
    history = await fit(classifier(), x, spoilt, TerminateOnNaN(), epochs=5)
    assert (history.outcome, len(history.epoch)) == ("stopped", 1)
    assert np.isnan(history.history["loss"][0])


@pytest.mark.asyncio
async def test_histograms_show_its_weights(data: Any, tmp_path: Path) -> None:
    x, y = data
    board = TensorBoard(tmp_path, histogram_freq=1)
    with pytest.warns(RuntimeWarning, match="histograms of weights only"):
        await fit(classifier(), x, y, board, epochs=1, validation_data=(x, y))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*tfevents*"))
    assert b"kernel" in written


@pytest.mark.asyncio
async def test_a_hook_may_compile_the_model_anew(keras: ModuleType, data: Any) -> None:
    class Compiles(Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                self.model.compile(
                    keras.optimizers.SGD(0.0), "categorical_crossentropy", metrics=["accuracy"]
                )
                kept.append(self.model.get_weights()[0])

    kept: list[Any] = []
    model = classifier()
    await fit(model, *data, Compiles(), epochs=2)
    np.testing.assert_array_equal(kept[0], model.get_weights()[0])


# ---------------------------------------------------------------- bad input


@pytest.mark.asyncio
async def test_what_cannot_train_is_refused_before_the_first_batch(keras: ModuleType, data: Any) -> None:
    x, y = data
    uncompiled = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    with pytest.raises(ArgumentError, match=r"compile\(optimizer, loss\)"):
        await fit(uncompiled, x, y)
    assert len(await Trainer(uncompiled).predict(x[:5])) == 5
    with pytest.raises(ArgumentError, match=r"keras\.Model trains"):
        Trainer(keras.layers.Dense(1))
    with pytest.raises(ArgumentError, match="is a class"):
        Trainer(keras.Sequential)
    with pytest.raises(ArgumentError, match=r"samples of shape \(64,\)"):
        await fit(classifier(), x[:, :60], y)
    with pytest.raises(ArgumentError, match="1 inputs"):
        await fit(classifier(), [x, x], y)
    for weights in ([y[:, 0], y[:, 0]], {"one": y[:, 0]}):
        with pytest.raises(ArgumentError, match=r"list of \(x, y, weights\)"):
            await fit(classifier(), x, y, sample_weight=weights)
    with pytest.raises(ArgumentError, match="y=None: the model's loss needs targets"):
        await fit(classifier(), x, None)
    with pytest.raises(ArgumentError, match="dtype object"):
        await fit(classifier(), x.astype(object), y)
    unbuilt = adapt(classifier(inputs=False))
    with pytest.raises(ArgumentError, match="must be built"):
        unbuilt.capture()


@pytest.mark.asyncio
async def test_a_model_in_a_running_fit_is_busy(data: Any) -> None:
    go_on = threading.Event()

    class Holds(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            assert go_on.wait(20)

    model = classifier()
    run = Trainer(model).start(*data, **{**OPTIONS, "epochs": 1}, callbacks=Holds())
    with pytest.raises(ModelBusy):
        await fit(model, *data)
    go_on.set()
    await run


@pytest.mark.asyncio
async def test_what_two_models_share_only_one_of_them_trains_at_a_time(keras: ModuleType, data: Any) -> None:
    go_on = threading.Event()

    class Holds(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            assert go_on.wait(20)

    model, other = classifier(), classifier()
    run = Trainer(model).start(*data, **{**OPTIONS, "epochs": 1}, callbacks=Holds())
    other.compile(model.optimizer, "categorical_crossentropy")
    with pytest.raises(ModelBusy, match="Adam of the model"):
        await fit(other, *data)
    tuned = keras.Sequential([keras.Input((64,)), *model.layers])
    tuned.compile("sgd", "categorical_crossentropy")
    with pytest.raises(ModelBusy, match="Dense of the model"):
        await fit(tuned, *data)
    go_on.set()
    await run
    await fit(tuned, *data, epochs=1)


# ---------------------------------------------------------------- copies, and what is private


def test_metrics_tell_their_directions() -> None:
    model = adapt(classifier(["accuracy", "auc", "mse"]))
    model.check_data(*digits(1), None)
    assert [model.direction(name) for name in ("loss", "val_auc", "accuracy", "mse", "other")] == [
        *["min", "max", "max", "min", None]
    ]


def test_what_nobody_registered_with_keras_is_copied_too(keras: ModuleType, tmp_path: Path) -> None:
    class Doubles(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x * 2

    class Rule(keras.optimizers.SGD):
        pass

    class Far(keras.metrics.Mean):
        pass

    def squares(y: Any, outputs: Any) -> Any:
        return keras.ops.mean((y - outputs) ** 2, axis=-1)

    def third(x: Any) -> Any:
        return x / 3

    narrow = keras.layers.Dense(3, activation=third, dtype="bfloat16")
    model = keras.Sequential([keras.Input((64,)), Doubles(), narrow])
    model.compile(Rule(0.1), squares, metrics=[Far(), squares])
    state = adapt(model).capture()
    made = state.to_model()
    assert numbers(made) == numbers(model)
    assert (type(made.optimizer), made.loss, made.layers[1].activation) == (Rule, squares, third)
    state.save(tmp_path / "model.keras")


def test_a_model_that_is_not_compiled_is_copied_and_written_as_it_is(
    keras: ModuleType, tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(3)])
    state = adapt(model).capture()
    state.save(tmp_path / "model.keras")
    for made in (state.to_model(), keras.models.load_model(tmp_path / "model.keras")):
        assert not made.compiled
        for one, other in zip(made.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_model_that_keras_cannot_make_anew_says_so(keras: ModuleType) -> None:
    class Cannot(keras.Model):
        def __init__(self, table: object) -> None:
            super().__init__()
            self.inner = keras.layers.Dense(3)

        def build(self, shape: Any) -> None:
            self.inner.build(shape)

        def call(self, x: Any) -> Any:
            return self.inner(x)

    model = Cannot(object())
    model.compile("sgd", "mse")
    model.build((None, 64))
    state = adapt(model).capture()
    assert next(iter(state.arrays)).endswith("kernel")
    with pytest.raises(ArgumentError, match="get_config"):
        state.to_model()


def test_what_is_private_in_keras_is_still_there(keras: ModuleType) -> None:
    """If this fails, Keras has changed: asynccb/models/keras has to follow."""
    model = classifier()
    for name in ("_symbolic_build", "_flatten_layers", "_compile_metrics", "_compile_loss"):
        assert hasattr(model, name)
    assert model._compile_config.config["loss"] == "categorical_crossentropy"
    for what in ("train", "test", "predict"):
        assert getattr(model, f"{what}_function") is None
        getattr(model, f"make_{what}_function")()
        assert callable(getattr(model, f"{what}_function"))
    (variable, *_) = model.trainable_variables
    array = keras.ops.convert_to_numpy(variable._value)
    np.testing.assert_array_equal(array, keras.ops.convert_to_numpy(variable.value))
    assert keras.callbacks.Callback.on_epoch_end._is_default is True
