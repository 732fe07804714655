"""Optimizers with the formulas and defaults of Keras 3, on one flat array of all parameters.

One update is a handful of numpy calls whatever the number of tensors, and allocates nothing: parameters,
gradients and slots are flat arrays of equal length, and two scratch arrays take what is in between.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from asynccb.errors import ArgumentError
from asynccb.models.arrays import aligned
from asynccb.models.names import lookup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asynccb.models.arrays import Array


class Optimizer:
    """Base class: the learning rate, the count of updates, and the slots.

    Args:
        learning_rate: step size; ``lr`` and ``learning_rate`` are one settable float.

    Attributes:
        iterations: updates made.
        slots: slot name -> flat array, in the order in which Keras keeps them; empty until the model is
            built.
    """

    slot_initial: float = 0.0
    slots_by_variable: ClassVar[bool] = (
        False  # files: all slots of one variable together (Adam), or slot by slot
    )

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.iterations = 0
        self.slots: dict[str, Array] = {}
        self._params: Array | None = None
        self._owner: weakref.ref[object] | None = None

    @property
    def learning_rate(self) -> float:
        """The step size, a Python float."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = float(value)

    @property
    def lr(self) -> float:
        """The same as ``learning_rate``."""
        return self._learning_rate

    @lr.setter
    def lr(self, value: float) -> None:
        self._learning_rate = float(value)

    @property
    def name(self) -> str:
        """The name by which ``compile`` knows this optimizer."""
        return type(self).__name__.lower()

    def slot_names(self) -> tuple[str, ...]:
        """Slots that these settings need."""
        return ()

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments; Keras 3 takes the same ones."""
        return {"learning_rate": self._learning_rate}

    def build(self, params: Array, grads: Array) -> None:
        """Binds the optimizer to a model's flat arrays; slots of equal size are kept."""
        self._params, self._grads = params, grads
        self._one, self._two = aligned(params.size, params.dtype), aligned(params.size, params.dtype)
        kept = self.slots
        self.slots = {}
        for name in self.slot_names():
            old = kept.get(name)
            if old is not None and old.size == params.size and old.dtype == params.dtype:
                self.slots[name] = old
            else:
                self.slots[name] = aligned(params.size, params.dtype, fill=self.slot_initial)

    def claim(self, model: object) -> None:
        """Makes ``model`` the one that this optimizer serves.

        Raises:
            ArgumentError: if it serves another model that is still alive: its slots belong to those weights.
        """
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not model:
            fix = "Make one optimizer per model"
            raise ArgumentError("optimizer", self, "serves another model already", fix)
        self._owner = weakref.ref(model)

    def update(self) -> None:
        """Overwrites the parameters by the gradients."""
        self.iterations += 1
        params = self._params
        assert params is not None, "build comes first"
        self.step(params, self._grads, self._one, self._two)

    def step(self, p: Array, g: Array, a: Array, b: Array) -> None:
        """One update of ``p`` by ``g``; ``a``, ``b`` are scratch; ``iterations`` counts this one already."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        # Bound arrays are views of a model's memory: a copy of the optimizer is bound anew by its own model.
        unbound = ("_params", "_grads", "_one", "_two", "_owner")
        state = {key: value for key, value in vars(self).items() if key not in unbound}
        return {
            **state,
            "slots": {name: slot.copy() for name, slot in self.slots.items()},
            "_params": None,
            "_owner": None,
        }


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

    def step(self, p: Array, g: Array, a: Array, b: Array) -> None:
        np.multiply(g, self._learning_rate, out=a)
        if not self.momentum:
            np.subtract(p, a, out=p)
            return
        m = self.slots["momentum"]
        np.multiply(m, self.momentum, out=m)
        np.subtract(m, a, out=m)
        if self.nesterov:
            np.multiply(m, self.momentum, out=b)
            np.subtract(b, a, out=b)
            np.add(p, b, out=p)
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

    def step(self, p: Array, g: Array, a: Array, b: Array) -> None:
        v = self.slots["velocity"]
        np.multiply(g, g, out=a)
        np.multiply(a, 1.0 - self.rho, out=a)
        np.multiply(v, self.rho, out=v)
        np.add(v, a, out=v)
        if self.centered:
            mean = self.slots["average_gradient"]
            np.multiply(mean, self.rho, out=mean)
            np.multiply(g, 1.0 - self.rho, out=a)
            np.add(mean, a, out=mean)
            np.multiply(mean, mean, out=a)
            np.subtract(v, a, out=a)
            np.add(a, self.epsilon, out=a)
        else:
            np.add(v, self.epsilon, out=a)
        np.sqrt(a, out=a)
        np.multiply(g, self._learning_rate, out=b)
        np.divide(b, a, out=b)
        if self.momentum:
            m = self.slots["momentum"]
            np.multiply(m, self.momentum, out=m)
            np.add(m, b, out=m)
            b = m
        np.subtract(p, b, out=p)


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

    def step(self, p: Array, g: Array, a: Array, b: Array) -> None:
        s = self.slots["accumulator"]
        np.multiply(g, g, out=a)
        np.add(s, a, out=s)
        np.add(s, self.epsilon, out=a)
        np.sqrt(a, out=a)
        np.multiply(g, self._learning_rate, out=b)
        np.divide(b, a, out=b)
        np.subtract(p, b, out=p)


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

    def step(self, p: Array, g: Array, a: Array, b: Array) -> None:
        m, v, t = self.slots["momentum"], self.slots["velocity"], self.iterations
        np.subtract(g, m, out=a)
        np.multiply(a, 1.0 - self.beta_1, out=a)
        np.add(m, a, out=m)
        np.multiply(g, g, out=a)
        np.subtract(a, v, out=a)
        np.multiply(a, 1.0 - self.beta_2, out=a)
        np.add(v, a, out=v)
        np.sqrt(v, out=a)
        np.add(a, self.epsilon, out=a)
        rate = self._learning_rate * math.sqrt(1.0 - self.beta_2**t) / (1.0 - self.beta_1**t)
        np.multiply(m, rate, out=b)
        np.divide(b, a, out=b)
        np.subtract(p, b, out=p)


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

    def step(self, p: Array, g: Array, a: Array, b: Array) -> None:
        np.multiply(p, self._learning_rate * self.weight_decay, out=a)
        np.subtract(p, a, out=p)
        super().step(p, g, a, b)


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
    ignored = {"name", "ema_momentum", "loss_scale_factor", "gradient_accumulation_steps"} | neutral
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
