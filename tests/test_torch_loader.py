"""PyTorch's DataLoader as training and validation data of the numpy model."""

from __future__ import annotations

import numpy as np
import pytest

from asynccb import Trainer
from asynccb.models import Dense, Sequential

pytestmark = pytest.mark.heavy


@pytest.mark.asyncio
async def test_a_data_loader_trains_and_validates_as_the_same_arrays_do() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    y = x.sum(axis=1, keepdims=True)

    def model() -> Sequential:
        built = Sequential([Dense(1, input_dim=4)], seed=1)
        built.compile("sgd", "mse")
        return built

    def loader() -> DataLoader:
        return DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=10)

    loaded = await Trainer(model()).fit(loader(), epochs=3, verbose=0, validation_data=loader())
    plain = await Trainer(model()).fit(
        x, y, batch_size=10, epochs=3, verbose=0, shuffle=False, validation_data=(x, y)
    )
    assert loaded.history == plain.history
