"""A small module of PyTorch's, trained on one half of the digits and tuned on the other: first a new head on
layers that are frozen, then all of it. Its weights go into a file that ``torch.load`` reads.

Needs torch and scikit-learn. Prints, among others::

    digits 0 to 4: accuracy ...
    a new head: accuracy ... (165 parameters)
    all layers: accuracy ... (6405 parameters)
    tuned.pt has 0.weight, 0.bias, 2.weight, 2.bias, 4.weight, 4.bias
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

from asynccb import History, Trainer
from asynccb.callbacks import EarlyStopping, ModelCheckpoint
from asynccb.models import TorchModel


async def train(module: Any, x: Any, y: Any, rate: float, *callbacks: Any) -> tuple[History, int]:
    """What can be trained of the module, at this rate; the best weights stay."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    model = TorchModel(module, nn.CrossEntropyLoss(), optimizer, ["accuracy"], scheduler=schedule, seed=1)
    stopping = EarlyStopping("val_loss", patience=5, restore_best_weights=True)
    history = await Trainer(model, seed=1).fit(
        x, y, epochs=20, validation_split=0.2, verbose=0, callbacks=[*callbacks, stopping]
    )
    return history, sum(parameter.numel() for parameter in trainable)


def accuracy(history: History) -> str:
    return f"accuracy {max(history.history['val_accuracy']):.3f}"


async def main() -> None:
    digits = load_digits()
    x, y = digits.data / 16, digits.target
    low = y < 5
    torch.manual_seed(1)
    body = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]

    history, _ = await train(nn.Sequential(*body, nn.Linear(32, 5)), x[low], y[low], 0.01)
    print(f"digits 0 to 4: {accuracy(history)}")

    module = nn.Sequential(*body, nn.Linear(32, 5))
    for layer in body:
        layer.requires_grad_(False)
    history, parameters = await train(module, x[~low], y[~low] - 5, 0.03)
    print(f"a new head: {accuracy(history)} ({parameters} parameters)")

    module.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned.pt"
        best = ModelCheckpoint(tuned, "val_loss", save_best_only=True, save_weights_only=True)
        history, parameters = await train(module, x[~low], y[~low] - 5, 0.003, best)
        print(f"all layers: {accuracy(history)} ({parameters} parameters)")
        names = torch.load(tuned, weights_only=True)
        print(f"{tuned.name} has {', '.join(names)}")


if __name__ == "__main__":
    asyncio.run(main())
