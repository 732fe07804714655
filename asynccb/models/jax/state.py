"""The state of a JAX model: its leaves by name, copies of them, and their way into a file and back."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import FileRefused
from asynccb.models.arrays import read_only
from asynccb.models.files import check_extension
from asynccb.models.names import numbered
from asynccb.models.plain import PlainState

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from asynccb.models.arrays import Array

OPTIMIZER = "optimizer/"


def framework() -> Any:
    """The module ``jax``.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import jax
    except ImportError as missing:
        raise ImportError("JaxModel needs JAX: pip install 'asynccb[jax]'") from missing
    return jax


class Leaves:
    """The leaves of a state.

    Attributes:
        values: the leaves, in JAX's order.
        structure: of the state.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self.values, self.structure = framework().tree.flatten(state)

    @property
    def names(self) -> list[str]:
        """The path of each leaf, such as ``params/dense/kernel``. What lies inside of an object of optax is
        the optimizer's, and so is what has the name ``opt_state``: it begins with ``optimizer/``."""
        with_path = framework().tree_util.tree_flatten_with_path
        nodes = with_path(self._state, is_leaf=_of_optax)[0]
        optimizers = {path for path, node in nodes if _of_optax(node)}
        names: dict[str, None] = {}
        for path, _ in with_path(self._state)[0]:
            parts = [_said(entry) for entry in path]
            slot = "opt_state" in parts or any(path[:end] in optimizers for end in range(len(path) + 1))
            names[numbered((OPTIMIZER if slot else "") + "/".join(parts), names, "#")] = None
        return list(names)

    def copied(self, *, numbers: bool = False) -> Any:
        """The state with copies of its arrays, which no later step can donate; arrays of numpy become JAX's,
        and with ``numbers`` Python's numbers too."""
        jnp = framework().numpy
        values = list(self.values)
        mine = [at for at, value in enumerate(values) if _on_device(value)]
        for at, copy in zip(mine, _copy([values[at] for at in mine]), strict=True):
            values[at] = copy
        for at, value in enumerate(values):
            if isinstance(value, (np.ndarray, np.generic)) or (numbers and _is_number(value)):
                values[at] = jnp.array(value)
        return self._with(values)

    def deleted(self) -> bool:
        """Whether a step to which the state was donated has used it up."""
        return any(value.is_deleted() for value in self.values if _on_device(value))

    def shapes(self) -> dict[str, Any]:
        """Type and shape of each array, by name."""
        return {
            name: [str(value.dtype), list(value.shape)]
            for name, value in zip(self.names, self.values, strict=True)
            if _on_device(value)
        }

    def arrays(self) -> dict[str, Array]:
        """Read-only arrays by name, the optimizer's last. Random keys are what they are made of, and types
        that numpy has not are float32 (or int8)."""
        named = zip(self.names, self.values, strict=True)
        found = {name: read_only(_widened(_host(value))) for name, value in named if _on_device(value)}
        return dict(sorted(found.items(), key=lambda item: item[0].startswith(OPTIMIZER)))

    def plain(self, *, weights_only: bool) -> dict[str, Any]:
        """What of it goes into a file: arrays and numbers by name."""
        return {
            name: _packed(_host(value)) if _on_device(value) else value
            for name, value in zip(self.names, self.values, strict=True)
            if (_on_device(value) or _is_number(value)) and not (weights_only and name.startswith(OPTIMIZER))
        }

    def told(self, path: str, saved: Mapping[str, Any], *, whole: bool) -> Any:
        """The state with what :meth:`plain` told in place of its own.

        Raises:
            FileRefused: it is of another state. Without ``whole`` the optimizer's part may be missing.
        """
        values = list(self.values)
        wanted = {
            name: at for at, name in enumerate(self.names) if _on_device(values[at]) or _is_number(values[at])
        }
        left = wanted.keys() - saved.keys()
        if unknown := sorted(saved.keys() - wanted.keys()):
            raise FileRefused(path, f"it holds {unknown[0]}, which this state has not")
        if missing := sorted(name for name in left if whole or not name.startswith(OPTIMIZER)):
            raise FileRefused(path, f"it does not hold {missing[0]}, which this state has")
        for name, value in saved.items():
            values[wanted[name]] = _unpacked(path, name, value, values[wanted[name]])
        return self._with(values)

    def weights(self) -> list[Array]:
        """Copies of the floating-point arrays outside of the optimizer's state."""
        return [np.array(self.values[at]) for at in self._weights()]

    def with_weights(self, arrays: Sequence[Array]) -> Any:
        """The state with these in their place.

        Raises:
            ValueError: another number of arrays, or other shapes.
        """
        values = list(self.values)
        for at, array in zip(self._weights(), arrays, strict=True):
            if np.shape(array) != values[at].shape:
                raise ValueError(f"{self.names[at]} has the shape {values[at].shape}, not {np.shape(array)}")
            values[at] = _placed(np.asarray(array, values[at].dtype), values[at])
        return self._with(values)

    def with_number(self, at: int, number: float) -> Any:
        """The state with a number in place of one leaf."""
        values = list(self.values)
        old = values[at]
        values[at] = _placed(np.full(old.shape, number, old.dtype), old) if _on_device(old) else number
        return self._with(values)

    def _weights(self) -> list[int]:
        jnp = framework().numpy
        return [
            at
            for at, (name, value) in enumerate(zip(self.names, self.values, strict=True))
            if _on_device(value)
            and jnp.issubdtype(value.dtype, jnp.floating)
            and not name.startswith(OPTIMIZER)
        ]

    def _with(self, values: list[Any]) -> Any:
        return framework().tree.unflatten(self.structure, values)


class JaxState:
    """A copy of a JaxModel's state at one moment; satisfies ``ModelState``.

    It lies on the device until it is asked for; then it is fetched, once.

    Args:
        state: the copy; nobody else has it.
        rebuild: makes a model of a state.
    """

    def __init__(self, state: Any, rebuild: Callable[[Any], Any]) -> None:
        self._state, self._rebuild = state, rebuild
        self._lock = threading.Lock()
        self._arrays: dict[str, Array] | None = None

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Read-only arrays by name: weights first, then ``optimizer/...``."""
        with self._lock:
            if self._arrays is None:
                self._arrays = Leaves(self._state).arrays()
            return self._arrays

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an HDF5 file, atomically; blocks until it is durable. :meth:`JaxModel.load` reads it.

        Args:
            path: ends in ``.h5`` or ``.hdf5``.
            weights_only: leaves out the optimizer's state.
            extra: plain data that goes into the file beside.

        Raises:
            ArgumentError: for another extension.
            CheckpointWriteError: it could not be written; the file that stood there before is untouched.
        """
        name = check_extension(path)
        told = {"leaves": Leaves(self._state).plain(weights_only=weights_only)}
        PlainState("JaxModel", told).save(name, extra=extra)

    def to_model(self) -> Any:
        """A new JaxModel of the same functions with this state."""
        return self._rebuild(self._state)


def _of_optax(node: Any) -> bool:
    return type(node).__module__.partition(".")[0] == "optax"


def _said(entry: Any) -> str:
    for kind in ("key", "idx", "name"):
        if hasattr(entry, kind):
            return str(getattr(entry, kind))
    return str(entry)


def _on_device(value: Any) -> bool:
    return isinstance(value, framework().Array)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))


def _is_key(value: Any) -> bool:
    jax = framework()
    return bool(jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key))


def _copy(values: list[Any]) -> list[Any]:
    """Copies on the device, in one dispatch. Those of several devices are copied one by one, where they
    lie."""
    jax = framework()
    if len({value.sharding for value in values if hasattr(value, "sharding")}) > 1:
        return [jax.numpy.copy(value) for value in values]
    return list(_copier()(values))


@cache
def _copier() -> Any:
    jax = framework()
    return jax.jit(lambda values: [jax.numpy.copy(value) for value in values])


def _host(value: Any) -> Array:
    """An array's numbers; those that a random key is made of."""
    jax = framework()
    found: Array = np.asarray(jax.random.key_data(value) if _is_key(value) else value)
    return found


def _is_plain(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize in (1, 2, 4, 8)


def _widened(array: Array) -> Array:
    if _is_plain(array.dtype) or array.dtype.kind == "c":
        return array
    return array.astype(np.int8 if "int" in array.dtype.name else np.float32)


def _packed(array: Array) -> Array:
    """As it goes into a file, which knows no types but numpy's real ones: the bytes of the others."""
    return array if _is_plain(array.dtype) else np.frombuffer(array.tobytes(), np.uint8)


def _unpacked(path: str, name: str, saved: Any, live: Any) -> Any:
    """What takes the place of the live leaf.

    Raises:
        FileRefused: it is of another kind, type or shape.
    """
    if not _on_device(live):
        if type(saved) is not type(live):
            raise FileRefused(path, f"{name} is a {type(saved).__name__}, not a {type(live).__name__}")
        return saved
    if not isinstance(saved, np.ndarray):
        raise FileRefused(path, f"{name} is a {type(saved).__name__}, not an array")
    # Of the live one no more than its kind: a step that failed may have left it deleted.
    like = framework().eval_shape(framework().random.key_data, live) if _is_key(live) else live
    nbytes = like.size * like.dtype.itemsize
    if not _is_plain(like.dtype) and saved.dtype == np.uint8 and saved.nbytes == nbytes:
        saved = np.frombuffer(saved.tobytes(), like.dtype).reshape(like.shape)
    if (saved.dtype, saved.shape) != (like.dtype, like.shape):
        told = f"{name} is {saved.dtype}{list(saved.shape)} there, {like.dtype}{list(like.shape)} here"
        raise FileRefused(path, told)
    return _placed(saved, live)


def _placed(array: Array, live: Any) -> Any:
    """A JAX array of these numbers, as the live one is: where it lies, a key, or of a type that gives way."""
    jax = framework()
    if _is_key(live):
        made = jax.random.wrap_key_data(jax.numpy.array(array), impl=jax.random.key_impl(live))
    elif live.weak_type and not array.ndim:
        return jax.numpy.asarray(array.item())
    else:
        # A copy: the memory of numpy has an owner, who may go on changing it.
        made = jax.numpy.array(array)
    return jax.device_put(made, live.sharding) if getattr(live, "committed", True) else made
