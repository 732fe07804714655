"""The state of a model that tells it as plain data, by ``state_dict`` and ``load_state_dict``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.errors import FileRefused
from asynccb.storage.hdf5 import Expected, ModelFile, ModelLayout, read_model_file, write_model_file
from asynccb.storage.packing import freeze

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from asynccb.models.arrays import Array
    from asynccb.storage.hdf5 import Header


class PlainState:
    """A copy of what ``state_dict`` answered; satisfies ``ModelState`` but for ``to_model``.

    Args:
        name: of the model's class.
        state: plain data; copied.

    Raises:
        TypeError: it is not plain; names the place.
    """

    def __init__(self, name: str, state: Mapping[str, Any]) -> None:
        self._name = name
        self._state: dict[str, Any] = freeze(state, f"{name}.state_dict()")

    @property
    def arrays(self) -> Mapping[str, Array]:
        """All arrays by their place in the state: ``"layers/0/kernel"``."""
        return dict(_arrays(self._state, ""))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an HDF5 file, atomically; blocks until it is durable. ``weights_only`` makes no difference.

        Raises:
            CheckpointWriteError: it could not be written; the file that stood there before is untouched.
        """
        write_plain(path, self._name, self._state, extra)

    def to_model(self) -> Any:
        raise NotImplementedError(f"{self._name} tells its state, but not how to make another one")


def write_plain(
    path: str | os.PathLike[str], name: str, state: Mapping[str, Any], extra: Mapping[str, Any] | None = None
) -> None:
    """Writes plain data for :func:`read_plain`, atomically; blocks until it is durable. No array is copied.

    Args:
        path: the file.
        name: of the model's class.
        state: the data.
        extra: more of it, beside the model.

    Raises:
        CheckpointWriteError: it could not be written; the file that stood there before is untouched.
    """
    empty = ModelLayout(name, json.dumps({"class_name": name}), None, (), None, ())
    write_model_file(path, ModelFile(empty, (), None, {"model": state, **(extra or {})}))


def read_plain(path: str, accept: Callable[[Mapping[str, Any]], object]) -> dict[str, Any]:
    """What :func:`write_plain` wrote.

    Args:
        path: the file.
        accept: given all that is ours in the file.

    Raises:
        FileRefused: the file is damaged, not safe, or holds no such state.
    """
    found: list[dict[str, Any]] = []

    def expect(header: Header) -> Expected:
        accept(header.extra)
        found.append(header.extra)
        return Expected({}, None)

    read_model_file(path, expect, sealed=True)
    state = found[-1].get("model")
    if not isinstance(state, dict):
        raise FileRefused(path, "it holds no model of this kind")
    return state


def _arrays(tree: Any, place: str) -> Iterator[tuple[str, Array]]:
    if isinstance(tree, dict):
        for key, part in tree.items():
            yield from _arrays(part, f"{place}/{key}" if place else key)
    elif isinstance(tree, list):
        for index, part in enumerate(tree):
            yield from _arrays(part, f"{place}/{index}")
    elif isinstance(tree, np.ndarray):
        view = tree.view()
        view.flags.writeable = False
        yield place, view
