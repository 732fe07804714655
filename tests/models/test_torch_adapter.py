"""TorchModel: what it computes, beside a loop written by hand with the same numbers."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asynccb import ArgumentError, Callback, FileRefused, ModelBusy, RunCancelled, Trainer
from asynccb.callbacks import (
    BackupAndRestore,
    EarlyStopping,
    LearningRateScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    SwapEMAWeights,
    TensorBoard,
    TerminateOnNaN,
)
from asynccb.models import TorchModel, adapt
from asynccb.models.torch import load_weights
from asynccb.protocols import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = pytest.mark.heavy

X = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 40)
R = X.sum(axis=1, keepdims=True)


def net(seed: int = 0, *, drop: float = 0.0, out: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, out))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return module


def model(module: Any = None, *, loss: Any = None, lr: float = 0.05, **options: Any) -> TorchModel:
    module = net() if module is None else module
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    return TorchModel(module, loss or nn.CrossEntropyLoss(), optimizer, **options)


def weights(module: Any) -> list[bytes]:
    held = module.module if isinstance(module, TorchModel) else module
    return [tensor.numpy().tobytes() for tensor in held.state_dict().values()]


def batches(seed: int, epochs: int, size: int = 10, x: Any = X, y: Any = Y) -> Iterator[tuple[Any, Any]]:
    """As the array feed orders them."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        for at in range(0, len(x), size):
            rows = order[at : at + size]
            yield torch.from_numpy(x[rows]), torch.from_numpy(y[rows])


async def fit(given: TorchModel, epochs: int = 2, **options: Any) -> Any:
    return await Trainer(given, seed=3).fit(X, Y, batch_size=10, epochs=epochs, verbose=0, **options)


# ---------------------------------------------------------------- the same as by hand


def digits_net() -> Any:
    torch.manual_seed(5)
    middle = [nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(nn.Linear(64, 32), *middle, nn.Linear(32, 10))


def digits_by_hand(x: Any, y: Any, seed: int) -> Any:
    module, loss = digits_net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    torch.manual_seed(seed)
    for number, (inputs, targets) in enumerate(batches(3, 3, 128, x, y), 1):
        optimizer.zero_grad()
        loss(module(inputs), targets).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if number % 15 == 0:
            scheduler.step()
    return module


@pytest.mark.asyncio
async def test_three_epochs_of_digits_give_the_bytes_of_a_loop_by_hand() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target
    module = digits_net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    ours = TorchModel(
        module, nn.CrossEntropyLoss(), optimizer, ["accuracy"], clip_norm=1.0, scheduler=scheduler, seed=11
    )
    history = await Trainer(ours, seed=3).fit(x, y, batch_size=128, epochs=3, verbose=0)
    assert history.history["accuracy"][-1] > 0.8
    assert weights(module) == weights(digits_by_hand(x, y, seed=11))
    assert weights(module) != weights(digits_by_hand(x, y, seed=12))


@pytest.mark.asyncio
@pytest.mark.parametrize("accumulate", [1, 3])
async def test_a_group_of_batches_goes_on_in_the_next_epoch(accumulate: int) -> None:
    """Four batches an epoch, three in a group, so that the second group has one of the second epoch."""
    ours = model(accumulate=accumulate)
    await fit(ours, epochs=3)
    hand, loss = net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(hand.parameters(), lr=0.05)
    for number, (x, y) in enumerate(batches(3, 3), 1):
        (loss(hand(x), y) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert weights(ours) == weights(hand)


@pytest.mark.asyncio
@pytest.mark.parametrize("step", ["epoch", "batch"])
async def test_a_scheduler_is_stepped_behind_each_epoch_or_each_update(step: str) -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates: list[float] = []

    class Reads(Callback):
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            rates.append(self.model.optimizer.param_groups[0]["lr"])

    ours = TorchModel(
        module, nn.CrossEntropyLoss(), optimizer, accumulate=2, scheduler=scheduler, scheduler_step=step
    )
    await fit(ours, callbacks=[Reads()])
    by_epoch, by_update = [0.4] * 4 + [0.2] * 4, [0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05]
    assert rates == pytest.approx(by_epoch if step == "epoch" else by_update)


@pytest.mark.asyncio
async def test_an_epoch_that_is_cut_short_does_not_step_a_scheduler() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    class Stops(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = batch == 1

    await fit(TorchModel(module, nn.CrossEntropyLoss(), optimizer, scheduler=scheduler), callbacks=[Stops()])
    assert optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.asyncio
async def test_bfloat16_computes_as_autocast_by_hand_does_and_not_as_float32() -> None:
    ours, plain = model(amp="bfloat16"), model()
    await fit(ours, epochs=1)
    await fit(plain, epochs=1)
    hand, loss = net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(hand.parameters(), lr=0.05)
    for x, y in batches(3, 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(hand(x), y)
        value.backward()
        optimizer.step()
    assert weights(ours) == weights(hand)
    assert weights(ours) != weights(plain)


def test_losses_in_float16_are_scaled_and_the_scale_is_part_of_a_copy() -> None:
    ours = model(amp="float16", clip_norm=1.0, lr=0.01)
    before = weights(ours)
    first = ours.train_batch(Batch(X, Y, None, 40))["loss"]
    assert np.isfinite(first)
    assert weights(ours) != before
    made = ours.capture().to_model()
    assert ours.train_batch(Batch(X, Y, None, 40)) == made.train_batch(Batch(X, Y, None, 40))
    assert weights(ours) == weights(made)


@pytest.mark.asyncio
async def test_trainings_beside_each_other_give_the_bytes_of_each_alone() -> None:
    alone, together = [[model(net(seed)) for seed in range(3)] for _ in range(2)]
    for ours in alone:
        await fit(ours)
    await asyncio.gather(*(fit(ours) for ours in together))
    assert [*map(weights, together)] == [*map(weights, alone)]
    assert len({tuple(weights(ours)) for ours in alone}) == 3


# ---------------------------------------------------------------- data


@pytest.mark.asyncio
async def test_a_data_loader_trains_and_validates_as_the_same_arrays_do() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    def loader() -> Any:
        return DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=10)

    by_loader, by_arrays = model(), model()
    one = await Trainer(by_loader).fit(loader(), epochs=2, verbose=0, validation_data=loader())
    options: dict[str, Any] = {"shuffle": False, "validation_data": (X, Y), "verbose": 0}
    two = await Trainer(by_arrays).fit(X, Y, batch_size=10, epochs=2, **options)
    assert one.history == two.history
    assert weights(by_loader) == weights(by_arrays)


@pytest.mark.asyncio
async def test_tensors_train_as_the_same_arrays_do() -> None:
    ours, same, low = model(), model(), model(net().bfloat16())
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    history = await fit(ours, validation_split=0.25)
    given = await Trainer(same, seed=3).fit(
        x.clone().requires_grad_(), y, batch_size=10, epochs=2, verbose=0, validation_split=0.25
    )
    assert weights(same) == weights(ours)
    assert given.history == history.history
    assert (await Trainer(ours).predict(x)).tobytes() == (await Trainer(ours).predict(X)).tobytes()
    await Trainer(low).fit(x.bfloat16(), y, verbose=0)  # numpy has no such type


@pytest.mark.asyncio
async def test_a_list_of_a_loaders_batches_is_batches_and_a_dataset_wants_a_loader() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    ours, same = model(), model()
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    await Trainer(ours).fit(DataLoader(dataset, batch_size=10), verbose=0)
    await Trainer(same).fit(list(DataLoader(dataset, batch_size=10)), verbose=0)
    assert weights(same) == weights(ours)
    with pytest.raises(ArgumentError, match="DataLoader"):
        await Trainer(ours).fit(dataset, verbose=0)


@pytest.mark.asyncio
async def test_a_shuffled_loader_draws_as_in_a_loop_by_hand() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    ours, hand = model(), model()
    torch.manual_seed(4)
    loader = DataLoader(dataset, batch_size=16, shuffle=True)
    for _ in range(2):
        for inputs, targets in loader:
            hand.optimizer.zero_grad()
            hand.loss(hand.module(inputs), targets).backward()
            hand.optimizer.step()
    torch.manual_seed(4)
    await Trainer(ours).fit(DataLoader(dataset, batch_size=16, shuffle=True), epochs=2, verbose=0)
    assert weights(ours) == weights(hand)


@pytest.mark.asyncio
async def test_a_loader_of_dicts_trains_a_module_that_computes_its_loss_itself() -> None:
    """And has an output that is None, and one number for a batch."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Any, labels: Any) -> Any:
            output = self.inner(x)
            return {"logits": output, "loss": nn.functional.cross_entropy(output, labels), "hidden": None}

    from torch.utils.data import DataLoader

    samples = [{"x": torch.from_numpy(x), "labels": torch.tensor(y)} for x, y in zip(X, Y, strict=True)]
    loader = DataLoader(samples, batch_size=10)
    ours, plain = model(Own(), loss=lambda output, target: output["loss"]), model()
    await Trainer(ours).fit(loader, verbose=0)
    await Trainer(plain).fit(X, Y, batch_size=10, shuffle=False, verbose=0)
    assert weights(ours) == weights(plain)
    found = await Trainer(ours).predict(loader)
    assert found["logits"].tobytes() == (await Trainer(plain).predict(X, batch_size=10)).tobytes()
    assert found["loss"].shape == (4,)
    assert found["hidden"] is None


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool"])
def test_whole_targets_of_a_binary_cross_entropy_are_floats(kind: str) -> None:
    half = Y[:, None] > 0
    for loss in (nn.BCEWithLogitsLoss(), nn.functional.binary_cross_entropy_with_logits):
        ours, same = model(net(out=1), loss=loss), model(net(out=1), loss=loss)
        logs = ours.train_batch(Batch(X, half.astype(kind), None, 40))
        assert logs == same.train_batch(Batch(X, half.astype(np.float32), None, 40))


def test_floats_become_the_modules_type_and_whole_targets_int64() -> None:
    kinds = [(X, Y), (X.astype(float), Y.astype(np.int32)), (X.astype(">f4"), Y.astype(np.uint8))]
    losses = {model().train_batch(Batch(x, y, None, 40))["loss"] for x, y in [*kinds]}
    assert len(losses) == 1
    double = model(net().double())
    assert double.train_batch(Batch(X, Y, None, 40))["loss"] == pytest.approx(losses.pop(), rel=1e-6)
    assert double.predict_batch(Batch(X, None, None, 40)).dtype == np.float64


def test_several_inputs_are_arguments_by_position_or_by_name() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, left: Any, right: Any) -> Any:
            return {"sum": (left + 2 * right) * self.scale}

    ours = model(Sums(), loss=lambda output, target: (output["sum"] - target).square().mean())
    left, right = X[:4, :1], X[:4, 1:2]
    for x in ((left, right), [left, right], {"right": right, "left": left}):
        found = ours.predict_batch(Batch(x, None, None, 4))["sum"]
        np.testing.assert_allclose(found, left + 2 * right)
    assert ours.train_batch(Batch((left, right), left + 2 * right, None, 4)) == {"loss": 0.0}


def test_a_module_that_overwrites_its_input_does_not_overwrite_the_data() -> None:
    ours = model(nn.Sequential(nn.ReLU(inplace=True), net()))
    kept = X.copy()
    ours.train_batch(Batch(X[:10], Y[:10], None, 10))
    ours.predict_batch(Batch(X[:10], None, None, 10))
    np.testing.assert_array_equal(X, kept)


def test_sample_weights_weigh_the_losses_of_samples() -> None:
    weight = np.arange(40) / 10
    ours = model(loss=nn.CrossEntropyLoss(reduction="none"))
    each = nn.functional.cross_entropy(net()(torch.from_numpy(X)), torch.from_numpy(Y), reduction="none")
    expected = (each * torch.from_numpy(weight).float()).sum().item() / 40
    assert ours.train_batch(Batch(X, Y, weight, 40))["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.asyncio
async def test_sample_weights_of_a_loss_that_averages_are_refused_before_the_first_batch() -> None:
    ours = model()
    before = weights(ours)
    with pytest.raises(ArgumentError, match='reduction="none"'):
        await fit(ours, sample_weight=np.ones(40))
    assert weights(ours) == before
    by_function = model(loss=nn.functional.cross_entropy)
    with pytest.raises(ArgumentError, match='reduction="none"'):
        by_function.train_batch(Batch(X, Y, np.ones(40), 40))


# ---------------------------------------------------------------- metrics, modes, threads


class Collects:
    """As torchmetrics' objects are: a call gives the value of the batch, and adds to a tensor in its place,
    which must not be one that was made in inference mode."""

    higher_is_better = True

    def __init__(self) -> None:
        self.reset()

    def __call__(self, output: Any, target: Any) -> Any:
        self.seen += len(target)
        return self.compute()

    def compute(self) -> Any:
        return self.seen.clone()

    def reset(self) -> None:
        self.seen = torch.zeros(())


def test_metrics_are_numbers_of_this_batch_under_their_names() -> None:
    def per_sample(output: Any, target: Any) -> Any:
        assert not output.requires_grad
        return (output.argmax(1) == target).float()

    ours = model(metrics=["accuracy", per_sample, Collects(), "acc"])
    for step in (ours.test_batch, ours.train_batch):
        logs = step(Batch(X, Y, None, 40))
        assert list(logs) == ours.metrics_names == ["loss", "accuracy", "per_sample", "collects", "acc"]
        assert all(type(value) is float for value in logs.values())
        assert logs["accuracy"] == pytest.approx(logs["per_sample"])
        assert logs["collects"] == 40.0
    assert [ours.direction(name) for name in ("val_collects", "acc", "val_loss", "per_sample")] == [
        *("max", "max", "min"),
        None,
    ]
    assert model(metrics={"mine": per_sample}).metrics_names == ["loss", "mine"]


def test_accuracy_fits_the_loss_and_the_shapes() -> None:
    def accuracy(loss: Any, output: Any, target: Any) -> float:
        class Says(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = nn.Parameter(torch.ones(1))

            def forward(self, x: Any) -> Any:
                return x * self.one

        ours = model(Says(), loss=loss, metrics=["accuracy"])
        return ours.test_batch(Batch(np.array(output, np.float32), np.array(target), None, len(target)))[
            "accuracy"
        ]

    logits = [[0.2], [-3.0], [0.4], [0.1]]
    ones = np.array([[1.0], [0.0], [1.0], [0.0]], np.float32)
    assert accuracy(nn.BCEWithLogitsLoss(), logits, ones) == 0.75
    assert accuracy(nn.MSELoss(), logits, ones) == 0.5  # on which side of one half they are
    assert accuracy(nn.CrossEntropyLoss(), [[0, 1.0], [1, 0]], [1, 1]) == 0.5
    assert accuracy(nn.CrossEntropyLoss(), [[0, 1.0], [1, 0]], [[0.0, 1.0], [0.0, 1.0]]) == 0.5
    two = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    assert accuracy(nn.BCEWithLogitsLoss(), [[3.0, -3.0], [3.0, -3.0]], two) == 0.75


def test_errors_of_a_column_and_of_a_row_of_targets_are_those_of_each_sample() -> None:
    ours = model(net(out=1), loss=lambda output, target: output.sum() * 0, metrics=["mae", "mse"])
    expected = ours.predict_batch(Batch(X, None, None, 40))
    for y in (R, R[:, 0]):
        logs = ours.test_batch(Batch(X, y, None, 40))
        assert logs["mae"] == pytest.approx(np.abs(expected - R).mean(), rel=1e-5)
        assert logs["mse"] == pytest.approx(np.square(expected - R).mean(), rel=1e-5)


class Tells(nn.Module):
    """A module that notes how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.told: list[Any] = []

    def forward(self, x: Any) -> Any:
        output = self.inner(x)
        self.told.append((self.training, torch.is_inference_mode_enabled(), output.dtype))
        return output


def test_only_training_batches_are_in_train_mode_and_keep_gradients() -> None:
    module = Tells()
    ours = model(module)
    batch = Batch(X, Y, None, 40)
    for step in (ours.train_batch, ours.test_batch, ours.predict_batch, ours.train_batch):
        step(batch)
    kind = torch.float32
    assert module.told == [(True, False, kind), (False, True, kind), (False, True, kind), (True, False, kind)]


@pytest.mark.asyncio
async def test_what_is_kept_in_eval_mode_stays_so_behind_a_validation() -> None:
    module = nn.Sequential(
        nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8)), nn.Linear(8, 3)
    )
    module[1].eval()
    module[1][1].train()
    frozen, running = (module[1][at].running_mean.clone() for at in (0, 1))
    ours = model(module)
    await fit(ours, validation_data=(X, Y))
    await Trainer(ours).predict(X)
    await fit(ours)
    assert torch.equal(module[1][0].running_mean, frozen)
    assert not torch.equal(module[1][1].running_mean, running)
    assert [part.training for part in module.modules()] == [True, True, False, False, True, True]


@pytest.mark.asyncio
async def test_the_callers_settings_of_torch_count_on_the_training_thread() -> None:
    seen: list[Any] = []

    class Looks(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append((torch.is_grad_enabled(), torch.get_default_device().type))

    module = Tells()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        await fit(model(module), epochs=1, callbacks=[Looks()])
    assert seen == [(False, "meta")]
    assert {dtype for _, _, dtype in module.told} == {torch.bfloat16}
    assert weights(module) != weights(Tells())  # it trains, whatever the caller's gradient mode is
    await fit(model(module), epochs=1, callbacks=[Looks()])
    assert seen[1:] == [(True, "cpu")]
    assert module.told[-1] == (True, False, torch.float32)


@pytest.mark.asyncio
async def test_a_seeded_model_draws_from_a_stream_of_its_own() -> None:
    class Draws(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            torch.rand(3)

    async def trained(seed: int | None, *callbacks: Callback) -> list[bytes]:
        torch.manual_seed(1)
        ours = model(net(drop=0.5), seed=seed)
        await fit(ours, callbacks=[*callbacks])
        return weights(ours)

    assert await trained(4) == await trained(4, Draws())
    assert await trained(4) != await trained(5)
    # The control: without a seed it draws from the process-wide one.
    assert await trained(None) != await trained(None, Draws())
    seeded = model(net(drop=0.5), seed=4)
    torch.manual_seed(1)
    first = torch.rand(2)
    torch.manual_seed(1)
    seeded.train_batch(Batch(X, Y, None, 40))
    assert torch.equal(first, torch.rand(2))  # which it leaves as it was


# ---------------------------------------------------------------- callbacks


@pytest.mark.asyncio
async def test_callbacks_set_the_learning_rate_and_groups_keep_their_proportion() -> None:
    module = net()
    groups = [{"params": module[0].parameters(), "lr": 0.4}, {"params": module[3].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    ours = TorchModel(module, nn.CrossEntropyLoss(), optimizer)
    history = await fit(ours, callbacks=[LearningRateScheduler(lambda epoch, lr: lr / 2)])
    assert history.history["lr"] == pytest.approx([0.2, 0.1])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.025])


@pytest.mark.asyncio
async def test_groups_keep_their_proportion_over_a_rate_of_zero_and_over_a_backup_made_of_it() -> None:
    def made() -> TorchModel:
        module = net()
        groups = [
            {"params": module[0].parameters(), "lr": 0.1},
            {"params": module[3].parameters(), "lr": 1.0},
        ]
        return TorchModel(module, nn.CrossEntropyLoss(), torch.optim.SGD(groups))

    ours = made()
    await fit(ours, epochs=1, callbacks=[LearningRateScheduler(lambda epoch: 0.0)])
    assert [group["lr"] for group in ours.optimizer.param_groups] == [0.0, 0.0]
    again = ours.capture().to_model()
    for one in (ours, again):
        await fit(one, epochs=1, callbacks=[LearningRateScheduler(lambda epoch: 0.2)])
        assert [group["lr"] for group in one.optimizer.param_groups] == pytest.approx([0.2, 2.0])


@pytest.mark.asyncio
async def test_a_learning_rate_that_is_one_tensor_of_all_groups_is_filled_once() -> None:
    module, rate = net(), torch.tensor(0.4)
    groups = [{"params": module[0].parameters()}, {"params": module[3].parameters()}]
    optimizer = torch.optim.Adam(groups, lr=rate)
    ours = TorchModel(module, nn.CrossEntropyLoss(), optimizer)
    await fit(ours, epochs=1, callbacks=[LearningRateScheduler(lambda epoch: 0.1)])
    assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
    assert rate.item() == pytest.approx(0.1)


@pytest.mark.asyncio
async def test_a_plateau_reduces_the_rate_and_the_best_weights_are_put_back() -> None:
    ours = model(lr=0.5)
    best: dict[float, list[bytes]] = {}

    class Keeps(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            best[logs["val_loss"]] = weights(self.model)

    callbacks = [
        Keeps(),
        ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.1, min_delta=10),
        EarlyStopping(monitor="val_loss", patience=3, restore_best_weights=True),
    ]
    await fit(ours, epochs=12, callbacks=callbacks, validation_data=(X[::-1].copy(), Y))
    assert ours.optimizer.param_groups[0]["lr"] < 0.5
    assert weights(ours) == best[min(best)]
    assert weights(ours) != [*best.values()][-1]  # the last epoch was not the best


@pytest.mark.asyncio
async def test_averages_of_the_weights_take_their_place_at_the_end_tied_ones_too() -> None:
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 3))
    module[1].weight = module[0].weight
    steps: list[Any] = []

    class Keeps(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            steps.append(self.model.get_weights()[0])

    await fit(model(module), epochs=1, callbacks=[Keeps(), SwapEMAWeights(momentum=0.5)])
    average = steps[0]
    for step in steps[1:]:
        average = 0.5 * average + 0.5 * step
    np.testing.assert_allclose(module[1].weight.detach().numpy(), average, rtol=1e-6)


@pytest.mark.asyncio
async def test_a_loss_that_is_nan_ends_the_training_with_terminate_on_nan() -> None:
    module = net()
    with torch.no_grad():
        module[0].weight[0, 0] = np.nan
    history = await fit(model(module), epochs=3, callbacks=[TerminateOnNaN()])
    assert history.outcome == "stopped"


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:TensorBoard. histograms of weights only:RuntimeWarning")
async def test_tensorboard_shows_histograms_of_all_weights_and_of_no_slot(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    await fit(model(digits_like()), epochs=1, callbacks=[TensorBoard(str(tmp_path), histogram_freq=1)])
    tags: set[str] = set()
    for folder in {file.parent for file in tmp_path.rglob("events*")}:
        found = EventAccumulator(str(folder))
        found.Reload()
        tags |= set(found.Tags()["histograms"])
    assert {"0.weight", "0.bias", "1.running_mean"} <= {tag.removesuffix("/histogram") for tag in tags}
    assert not [tag for tag in tags if "exp_avg" in tag]


def digits_like() -> Any:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


# ---------------------------------------------------------------- copies and resuming


def test_a_rate_that_is_a_tensor_is_overwritten_by_a_scheduler_when_it_is_copied() -> None:
    module, rate = net(), torch.tensor(0.4)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    ours = TorchModel(module, nn.CrossEntropyLoss(), optimizer, scheduler=scheduler)
    ours.train_batch(Batch(X, Y, None, 40))
    copied: list[float] = []

    class Copying:
        copying = True

        def __call__(self, segments: int | None = None) -> None:
            copied.append(rate.item())

    ours.training_gate = Copying()  # type: ignore[assignment]
    ours.end_epoch()
    assert copied == [pytest.approx(0.4)]
    assert rate.item() == pytest.approx(0.2)


def test_a_copy_in_the_middle_of_a_group_has_its_gradients() -> None:
    ours = model(accumulate=2)
    ours.train_batch(Batch(X[:10], Y[:10], None, 10))
    state = ours.capture()
    made = state.to_model()
    for given in (ours, made):
        given.train_batch(Batch(X[10:20], Y[10:20], None, 10))
    assert weights(ours) == weights(made)
    control = state.to_model()
    control.optimizer.zero_grad()
    control.train_batch(Batch(X[10:20], Y[10:20], None, 10))
    assert weights(control) != weights(ours)


def test_what_is_frozen_now_is_frozen_in_what_is_made_of_a_copy() -> None:
    ours = model()
    ours.train_batch(Batch(X, Y, None, 40))
    ours.module[0].weight.requires_grad_(False)
    made = ours.capture().to_model()
    assert [p.requires_grad for p in made.module.parameters()] == [False, True, True, True]


def test_types_that_numpy_has_not_are_kept_to_the_bit(tmp_path: Path) -> None:
    ours = model(net().bfloat16())
    ours.train_batch(Batch(X, Y, None, 40))
    state = ours.capture()
    assert {array.dtype for array in state.arrays.values()} == {np.dtype(np.float32)}
    expected = [tensor.clone() for tensor in ours.module.state_dict().values()]
    state.save(tmp_path / "a.h5")
    ours.train_batch(Batch(X, Y, None, 40))
    ours.load(tmp_path / "a.h5")
    for before, after in zip(expected, ours.module.state_dict().values(), strict=True):
        assert after.dtype is torch.bfloat16
        assert torch.equal(before, after)


def test_a_module_that_cannot_be_copied_trains_and_says_so_where_a_copy_is_wanted() -> None:
    module = net()
    module.held = (number for number in range(3))  # a generator
    ours = model(module)
    ours.train_batch(Batch(X, Y, None, 40))
    state = ours.capture()
    assert len(state.arrays) == 4 + 4 * 3
    with pytest.raises(ArgumentError, match="cannot be copied"):
        state.to_model()


def resumable(**options: Any) -> TorchModel:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.fill_(0.01 * number)
            parameter += torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return TorchModel(module, nn.CrossEntropyLoss(), optimizer, accumulate=3, scheduler=scheduler, **options)


class CancelsAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.run.cancel()


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("cut", [1, 4, 6])
async def test_a_training_that_was_cancelled_goes_on_to_the_same_bytes(
    seed: int | None, cut: int, tmp_path: Path
) -> None:
    """Cut in the middle of a group of batches, at the end of an epoch, and in the second one."""
    torch.manual_seed(9)
    whole = resumable(seed=seed)
    expected = await fit(whole, epochs=3)
    torch.manual_seed(9)
    with pytest.raises(RunCancelled):
        await fit(resumable(seed=seed), epochs=3, callbacks=[BackupAndRestore(tmp_path), CancelsAfter(cut)])
    torch.rand(5)  # a new process' generator stands elsewhere
    again = resumable(seed=seed)
    history = await fit(again, epochs=3, callbacks=[BackupAndRestore(tmp_path)])
    assert history.history == expected.history
    assert weights(again) == weights(whole)


class CountsBatches(Callback):
    seen = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        CountsBatches.seen += 1


@pytest.mark.asyncio
async def test_a_training_that_has_ended_goes_on_behind_the_step_of_its_scheduler(tmp_path: Path) -> None:
    whole, first, again = (resumable(seed=5) for _ in range(3))
    await fit(whole, epochs=3)
    await fit(first, epochs=1, callbacks=[BackupAndRestore(tmp_path)])
    await fit(again, epochs=3, callbacks=[BackupAndRestore(tmp_path)])
    assert weights(again) == weights(whole)


CRASHES = """
    import asyncio, os, sys
    sys.path.insert(0, {folder!r})
    from asynccb import Callback
    from asynccb.callbacks import BackupAndRestore
    import test_torch_adapter as tests

    class Dies(Callback):
        lockstep = True

        async def on_train_batch_end(self, batch, logs=None):
            # The first backup is of the begin, and the next one is not begun before it is written.
            least = "backup-000001.h5" if self.run.step < 3 else "backup-000002.h5"
            while not any(least <= name < "backup-9" for name in os.listdir({backups!r})):
                await asyncio.sleep(0.001)
            if self.run.step == 6:
                os._exit(9)

    asyncio.run(tests.fit(tests.resumable(seed=5), epochs=3,
                          callbacks=[BackupAndRestore({backups!r}, save_freq=1), Dies()]))
"""


@pytest.fixture
def backups(tmp_path: Path) -> str:
    """Of a process that died in the second epoch."""
    folder, code = str(tmp_path / "backups"), textwrap.dedent(CRASHES)
    code = code.format(folder=os.path.dirname(__file__), backups=folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    return folder


@pytest.mark.asyncio
async def test_a_training_whose_process_died_goes_on_to_the_same_bytes(backups: str) -> None:
    whole, again = resumable(seed=5), resumable(seed=5)
    await fit(whole, epochs=3)
    keeps = BackupAndRestore(backups)
    await fit(again, epochs=3, callbacks=[keeps, CountsBatches()])
    assert weights(again) == weights(whole)
    assert CountsBatches.seen < 12  # it went on, and did not begin anew


# ---------------------------------------------------------------- files

FORMATS = [".pt", ".pth", ".safetensors", ".h5"]


def need(suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_gives_weights_for_the_bare_module_and_the_model_its_state(
    suffix: str, tmp_path: Path
) -> None:
    need(suffix)
    ours, path = resumable(seed=5), tmp_path / f"model{suffix}"
    for _ in range(4):
        ours.train_batch(Batch(X, Y, None, 40))
    ours.capture().save(path)
    bare = resumable().module
    bare.load_state_dict(load_weights(path))
    assert weights(bare) == weights(ours)
    again = resumable(seed=5)
    again.load(path)
    assert weights(again) == weights(ours)
    whole = again.optimizer.state_dict()["state"]
    assert bool(whole) is (suffix != ".safetensors")  # which keeps the weights alone
    if whole:
        assert torch.equal(whole[0]["exp_avg"], ours.optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.asyncio
async def test_a_checkpoint_of_weights_is_a_plain_state_dict(suffix: str, tmp_path: Path) -> None:
    need(suffix)
    ours, path = model(), tmp_path / f"model{suffix}"
    await fit(ours, callbacks=[ModelCheckpoint(path, save_weights_only=True)])
    if suffix.startswith(".pt"):
        net().load_state_dict(torch.load(path, weights_only=True))
    bare = net(seed=4)
    bare.load_state_dict(load_weights(path))
    assert weights(bare) == weights(ours)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("the code in the file was run",)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_is_not_safe_damaged_or_of_another_module_changes_nothing(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(suffix)
    ours, path = model(), tmp_path / f"model{suffix}"
    before = weights(ours)
    ours.capture().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FileRefused):
        ours.load(path)
    path.write_bytes(pickle.dumps({"weights": Evil()}))
    with pytest.raises(FileRefused):
        ours.load(path)
    for other in (model(net(out=2)), model(nn.Linear(6, 3))):
        other.capture().save(path)
        with pytest.raises(FileRefused):
            ours.load(path)
    with pytest.raises(FileNotFoundError):
        ours.load(tmp_path / f"none{suffix}")
    assert weights(ours) == before
    assert capsys.readouterr().out == ""


@pytest.mark.asyncio
async def test_a_path_that_cannot_be_written_is_refused_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    CountsBatches.seen = 0
    for name, refused in (("{epoch}.ckpt", ArgumentError), ("{epoch}.safetensors", ImportError)):
        with pytest.raises(refused, match=r"\.pt|safetensors"):
            await fit(model(), callbacks=[CountsBatches(), ModelCheckpoint(str(tmp_path / name))])
    assert CountsBatches.seen == 0


def test_a_safetensors_file_without_the_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"asynccb\[torch\]"):
        model().capture().save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_backup_under_the_name_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="HDF5"):
        model().capture().save(tmp_path / "a.pt", extra={"place": 1})


# ---------------------------------------------------------------- bad input


def refusals() -> Iterator[tuple[str, Callable[[], Any], str]]:
    module, ce = net(), nn.CrossEntropyLoss()
    adam = torch.optim.Adam(module.parameters())
    yield "no module", lambda: TorchModel(3, ce, adam), "module"
    yield "a class of modules", lambda: TorchModel(nn.Linear, ce, adam), "module"
    yield "no optimizer", lambda: TorchModel(module, ce, None), "torch.optim.Adam"
    yield "the name of an optimizer", lambda: TorchModel(module, ce, "adam"), "torch.optim.Adam"
    yield "another module's", lambda: TorchModel(net(), ce, adam), "4 of its 4 parameters"
    yield "LBFGS", lambda: TorchModel(module, ce, torch.optim.LBFGS(module.parameters())), "closure"
    yield "a class of losses", lambda: TorchModel(module, nn.CrossEntropyLoss, adam), r"CrossEntropyLoss\(\)"
    yield "the name of a loss", lambda: TorchModel(module, "mse", adam), "loss"
    yield "no such device", lambda: TorchModel(module, ce, adam, device="cuda:99"), "device.*not there"
    yield "no device at all", lambda: TorchModel(module, ce, adam, device="gpu"), "device"
    yield "no such metric", lambda: TorchModel(module, ce, adam, ["acuracy"]), '"accuracy"'
    yield "no metric", lambda: TorchModel(module, ce, adam, [3]), "metrics"
    yield "amp", lambda: TorchModel(module, ce, adam, amp="int8"), "bfloat16"
    yield "clip_norm", lambda: TorchModel(module, ce, adam, clip_norm=0), "clip_norm"
    yield "accumulate", lambda: TorchModel(module, ce, adam, accumulate=0), "accumulate"
    yield "seed", lambda: TorchModel(module, ce, adam, seed=-1), "seed"
    yield "scheduler_step", lambda: TorchModel(module, ce, adam, scheduler_step="day"), "scheduler_step"
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(module.parameters(), lr=1.0), 1)
    yield "another's scheduler", lambda: TorchModel(module, ce, adam, scheduler=other), "another one"
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam)
    yield "a plateau", lambda: TorchModel(module, ce, adam, scheduler=plateau), "asynccb.callbacks"
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with torch.inference_mode():
        dead = nn.Linear(2, 2)
    yield "inference", lambda: TorchModel(dead, ce, torch.optim.SGD(dead.parameters())), "inference_mode"
    yield "meta", lambda: TorchModel(empty, ce, torch.optim.SGD(empty.parameters())), "no values"
    lazy = nn.LazyLinear(2)
    yield "lazy", lambda: TorchModel(lazy, ce, torch.optim.SGD(lazy.parameters())), "first pass"


@pytest.mark.parametrize(("make", "said"), [pytest.param(*rest, id=name) for name, *rest in refusals()])
def test_what_cannot_train_is_refused_when_it_is_made(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        make()


@pytest.mark.parametrize("given", [net(), torch.optim.SGD(net().parameters())], ids=["module", "optimizer"])
def test_a_bare_module_is_refused_with_the_way_out(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"TorchModel\(module, loss, optimizer\)"):
        Trainer(given)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ours: setattr(ours, "optimizer", torch.optim.SGD(ours.module.parameters())), "optimizer"),
        (lambda ours: setattr(ours, "module", net()), "module"),
        (lambda ours: ours.module.__setitem__(3, nn.Linear(8, 3)), "2 of its 4 parameters"),
    ],
    ids=["optimizer", "module", "layer"],
)
async def test_what_was_replaced_since_the_model_was_made_is_refused(change: Any, said: str) -> None:
    ours = model()
    change(ours)
    with pytest.raises(ArgumentError, match=said):
        await fit(ours)


def test_a_state_of_another_kind_of_optimizer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    adam, module = model(), net(seed=1)
    sgd = TorchModel(module, nn.CrossEntropyLoss(), torch.optim.SGD(module.parameters(), lr=0.1))
    adam.train_batch(Batch(X, Y, None, 40))
    before = weights(sgd)
    for name in ("whole.pt", "whole.h5"):
        adam.capture().save(tmp_path / name)
        with pytest.raises(FileRefused, match="Adam, this one of SGD"):
            sgd.load(tmp_path / name)
    assert weights(sgd) == before
    adam.capture().save(tmp_path / "weights.pt", weights_only=True)
    sgd.load(tmp_path / "weights.pt")
    assert weights(sgd) == weights(adam)


@pytest.mark.asyncio
async def test_class_weights_of_a_loss_that_averages_are_refused_before_the_first_hook() -> None:
    begun: list[Any] = []

    class Begins(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            begun.append(self)

    with pytest.raises(ArgumentError, match="class_weight"):
        await fit(model(), class_weight={0: 2.0}, callbacks=[Begins()])
    assert not begun
    await fit(model(loss=nn.CrossEntropyLoss(reduction="none")), class_weight={0: 2.0}, callbacks=[Begins()])
    assert begun


LOSSES = {
    "a number": (lambda output, target: 1.0, "must return a tensor"),
    "of another length": (lambda output, target: output.flatten(), "one for each of 40 samples"),
    "detached": (lambda output, target: output.detach().sum(), "no gradient"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_returns_no_scalar_of_the_graph_is_refused(kind: str) -> None:
    loss, said = LOSSES[kind]
    with pytest.raises(ArgumentError, match=said):
        model(loss=loss).train_batch(Batch(X, Y, None, 40))


@pytest.mark.asyncio
async def test_data_that_is_no_numbers_and_missing_targets_are_refused() -> None:
    words = np.array(["a"] * 40)
    for x, y in ((words, Y), (X, words), (X, None)):
        with pytest.raises(ArgumentError):
            await Trainer(model()).fit(x, y, verbose=0)


def test_without_torch_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"asynccb\[torch\]"):
        TorchModel(object(), None, None)


@pytest.mark.asyncio
async def test_a_module_trains_in_one_fit_at_a_time_and_nobody_else_reads_it() -> None:
    first = model()
    second, shares = model(first.module), model(nn.Sequential(first.module[0], nn.ReLU(), nn.Linear(8, 3)))
    went_on, told = asyncio.Event(), asyncio.Event()

    class Waits(Callback):
        lockstep = True

        async def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            went_on.set()
            await told.wait()

    run = Trainer(first).start(X, Y, batch_size=40, verbose=0, callbacks=[Waits()])
    await went_on.wait()
    for other in (second, shares):
        with pytest.raises(ModelBusy):
            await fit(other)
    with pytest.raises(ModelBusy):
        first.get_weights()
    told.set()
    await run
    await fit(second, epochs=1)
    assert len(first.get_weights()) == 4


def test_weights_are_set_from_arrays_and_from_tensors_of_any_type() -> None:
    ours, other = model(net(1).bfloat16()), net(2).bfloat16()
    ours.set_weights(list(other.state_dict().values()))
    assert all(map(torch.equal, ours.module.state_dict().values(), other.state_dict().values()))
    before = ours.get_weights()
    ours.set_weights([weight * 0 for weight in before])
    ours.set_weights(before)
    assert all(map(torch.equal, ours.module.state_dict().values(), other.state_dict().values()))


def test_complex_numbers_are_shown_and_predicted_whole() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.complex(torch.ones(6, 3), torch.full((6, 3), 2.0)))

        def forward(self, x: Any) -> Any:
            return (x.to(torch.complex64) @ self.weight).conj()

    ours = model(Complex(), loss=lambda output, target: output.abs().mean())
    assert (ours.get_weights()[0] == 1 + 2j).all()
    assert (ours.capture().arrays["weight"] == 1 + 2j).all()
    assert np.allclose(ours.predict_batch(Batch(X)), X.sum(1, keepdims=True) * (1 - 2j), atol=1e-5)


def test_weights_of_other_shapes_are_refused_and_nothing_changes() -> None:
    ours = model()
    before = weights(ours)
    with pytest.raises(ArgumentError, match="shapes"):
        ours.set_weights(list(itertools.islice(ours.get_weights(), 3)))
    assert weights(ours) == before
    assert adapt(ours) is ours
