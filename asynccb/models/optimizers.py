"""Optimizers with the formulas and defaults of Keras 3; ``updates`` takes them over the arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.names import lookup
from asynccb.models.updates import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array


def _fraction(argument: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ArgumentError(argument, value, "must lie between 0 and 1")
    return float(value)


class SGD(Optimizer):
    """Gradient descent, with momentum (Polyak 1964) or Nesterov momentum (Sutskever et al. 2013).

    ``m = momentum * m - lr * g``; then ``p += m``, or with nesterov ``p += momentum * m - lr * g``.

    Args:
        learning_rate: default 0.01.
        momentum: default 0.0.
        nesterov: default False.
    """

    def __init__(self, learning_rate: float = 0.01, momentum: float = 0.0, nesterov: bool = False) -> None:
        super().__init__(learning_rate)
        self.momentum = _fraction("momentum", momentum)
        self.nesterov = bool(nesterov)

    def slot_names(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}

    @property
    def by_rows(self) -> bool:
        return not self.momentum

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        np.multiply(g, self._learning_rate, out=a)
        if not self.momentum:
            np.subtract(p, a, out=p)
            return
        (m,) = slots
        np.multiply(m, self.momentum, out=m)
        np.subtract(m, a, out=m)
        if self.nesterov:
            np.subtract(p, a, out=p)
            np.multiply(m, self.momentum, out=a)
            np.add(p, a, out=p)
        else:
            np.add(p, m, out=p)


class RMSprop(Optimizer):
    """Hinton, lecture 6e (2012): the gradient over the root of its running mean square.

    ``v = rho * v + (1 - rho) * g**2``; ``p -= lr * g / sqrt(v + epsilon)``; ``centered`` subtracts the square
    of the running mean from ``v``; ``momentum`` gathers the steps.

    Args:
        learning_rate: default 0.001.
        rho: default 0.9.
        momentum: default 0.0.
        epsilon: default 1e-7.
        centered: default False.
    """

    def __init__(
        self,
        learning_rate: float = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
    ) -> None:
        super().__init__(learning_rate)
        self.rho = _fraction("rho", rho)
        self.momentum = _fraction("momentum", momentum)
        self.epsilon = float(epsilon)
        self.centered = bool(centered)

    def slot_names(self) -> tuple[str, ...]:
        extra = (("momentum",) if self.momentum else ()) + (("average_gradient",) if self.centered else ())
        return ("velocity", *extra)

    def get_config(self) -> dict[str, Any]:
        own = {"rho": self.rho, "momentum": self.momentum, "epsilon": self.epsilon, "centered": self.centered}
        return {**super().get_config(), **own}

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        v = slots[0]
        np.multiply(g, g, out=a)
        np.multiply(a, 1.0 - self.rho, out=a)
        np.multiply(v, self.rho, out=v)
        np.add(v, a, out=v)
        if self.centered:
            mean = slots[-1]
            np.multiply(mean, self.rho, out=mean)
            np.multiply(g, 1.0 - self.rho, out=a)
            np.add(mean, a, out=mean)
            np.multiply(mean, mean, out=a)
            np.subtract(v, a, out=a)
            np.add(a, self.epsilon, out=a)
        else:
            np.add(v, self.epsilon, out=a)
        np.sqrt(a, out=a)
        np.divide(g, a, out=a)
        np.multiply(a, self._learning_rate, out=a)
        if self.momentum:
            m = slots[1]
            np.multiply(m, self.momentum, out=m)
            np.add(m, a, out=m)
            a = m
        np.subtract(p, a, out=p)


class Adagrad(Optimizer):
    """Duchi et al. 2011: ``s += g**2``; ``p -= lr * g / sqrt(s + epsilon)``; ``s`` starts at 0.1.

    Args:
        learning_rate: default 0.001.
        initial_accumulator_value: default 0.1.
        epsilon: default 1e-7.
    """

    def __init__(
        self, learning_rate: float = 0.001, initial_accumulator_value: float = 0.1, epsilon: float = 1e-7
    ) -> None:
        super().__init__(learning_rate)
        self.initial_accumulator_value = float(initial_accumulator_value)
        self.epsilon = float(epsilon)
        self.slot_initial = self.initial_accumulator_value

    def slot_names(self) -> tuple[str, ...]:
        return ("accumulator",)

    def get_config(self) -> dict[str, Any]:
        own = {"initial_accumulator_value": self.initial_accumulator_value, "epsilon": self.epsilon}
        return {**super().get_config(), **own}

    @property
    def by_rows(self) -> bool:
        # An accumulator of zero would turn a gradient of zero into 0 / 0.
        return self.initial_accumulator_value + self.epsilon > float(np.finfo(np.float32).tiny)

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        (s,) = slots
        np.multiply(g, g, out=a)
        np.add(s, a, out=s)
        np.add(s, self.epsilon, out=a)
        np.sqrt(a, out=a)
        np.divide(g, a, out=a)
        np.multiply(a, self._learning_rate, out=a)
        np.subtract(p, a, out=p)


class Adam(Optimizer):
    """Kingma and Ba 2015, in the form that puts both bias corrections into the step size.

    ``m += (1 - beta_1) * (g - m)``; ``v += (1 - beta_2) * (g**2 - v)``;
    ``p -= lr * sqrt(1 - beta_2**t) / (1 - beta_1**t) * m / (sqrt(v) + epsilon)``.

    Args:
        learning_rate: default 0.001.
        beta_1: default 0.9.
        beta_2: default 0.999.
        epsilon: default 1e-7.
    """

    slots_by_variable = True

    def __init__(
        self, learning_rate: float = 0.001, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-7
    ) -> None:
        super().__init__(learning_rate)
        self.beta_1 = _fraction("beta_1", beta_1)
        self.beta_2 = _fraction("beta_2", beta_2)
        self.epsilon = float(epsilon)

    def slot_names(self) -> tuple[str, ...]:
        return ("momentum", "velocity")

    def get_config(self) -> dict[str, Any]:
        own = {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}
        return {**super().get_config(), **own}

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        (m, v), t = slots, self.iterations
        np.subtract(g, m, out=a)
        np.multiply(a, 1.0 - self.beta_1, out=a)
        np.add(m, a, out=m)
        np.multiply(g, g, out=a)
        np.subtract(a, v, out=a)
        np.multiply(a, 1.0 - self.beta_2, out=a)
        np.add(v, a, out=v)
        np.sqrt(v, out=a)
        np.add(a, self.epsilon, out=a)
        np.divide(m, a, out=a)
        rate = self._learning_rate * math.sqrt(1.0 - self.beta_2**t) / (1.0 - self.beta_1**t)
        np.multiply(a, rate, out=a)
        np.subtract(p, a, out=p)


class AdamW(Adam):
    """Loshchilov and Hutter 2019: Adam, with ``p -= lr * weight_decay * p`` before each update.

    Args:
        learning_rate: default 0.001.
        weight_decay: default 0.004; applied to every trainable tensor.
        beta_1: default 0.9.
        beta_2: default 0.999.
        epsilon: default 1e-7.
    """

    def __init__(
        self,
        learning_rate: float = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon)
        self.weight_decay = float(weight_decay)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "weight_decay": self.weight_decay}

    def step(self, p: Array, g: Array, a: Array, slots: Sequence[Array]) -> None:
        np.multiply(p, self._learning_rate * self.weight_decay, out=a)
        np.subtract(p, a, out=p)
        super().step(p, g, a, slots)


CLASSES: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "RMSprop": RMSprop,
    "Adagrad": Adagrad,
    "Adam": Adam,
    "AdamW": AdamW,
}
_BY_NAME: Mapping[str, Callable[..., Optimizer]] = {
    name: kind for title, kind in CLASSES.items() for name in (title, title.lower())
}


def get(optimizer: str | Optimizer | object) -> Optimizer:
    """The optimizer itself, or a new one of this name with its defaults.

    Raises:
        ArgumentError: for an unknown name (it suggests the nearest), or a class in place of an instance.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        name = optimizer.__name__
        raise ArgumentError("optimizer", optimizer, "is a class, not an instance", f"Write {name}()")
    made: Optimizer = lookup("optimizer", optimizer, _BY_NAME)()
    return made


def from_config(config: Mapping[str, Any]) -> Optimizer:
    """An optimizer from ``{"class_name": ..., "config": {...}}``.

    Raises:
        ArgumentError: for an unknown class or unknown settings.
    """
    kind = lookup("optimizer", config.get("class_name"), CLASSES)
    settings = dict(config.get("config") or {})
    allowed = kind().get_config()
    # Keras writes a few settings that have no meaning here at their defaults; anything else would change the
    # training.
    neutral = {key for key, value in settings.items() if key not in allowed and value in (None, False, "", 0)}
    ignored = {"name", "ema_momentum", "loss_scale_factor"} | neutral
    if unknown := sorted(set(settings) - set(allowed) - ignored):
        raise ArgumentError("optimizer", unknown, f"{config['class_name']} has no such settings")
    return kind(**{key: value for key, value in settings.items() if key in allowed})


def to_config(optimizer: Optimizer) -> dict[str, Any]:
    """The form that Keras 3 reads back with ``deserialize``."""
    return {
        "module": "keras.optimizers",
        "class_name": type(optimizer).__name__,
        "config": optimizer.get_config(),
        "registered_name": None,
    }
