"""The state of a ``TorchModel``: where it lies, a copy of it, and its way into a file and back.

A state is a tree as torch's ``state_dict()`` methods answer it. Here it is taken apart::

    tree of tensors and numbers  ── split ──  the tree with a Leaf for each tensor, and the tensors
    Leaf and a flat numpy array  ── join ───  the tree again, of numpy arrays: plain data for a file
    plain data                   ── thaw ───  the tree again, of tensors

so that the tensors can be copied beside the training, while the numbers were copied at the moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asynccb.errors import ArgumentError, FileRefused
from asynccb.models.plain import read_plain, write_plain
from asynccb.storage.atomic import atomic_write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from asynccb.models.arrays import Array

PICKLED, SAFETENSORS = (".pt", ".pth"), ".safetensors"
_OF_OTHERS = (".bin", ".ckpt")
WEIGHTS = ("weights", "loss")
"""The parts of a state that a file of weights has."""

_FORMAT = "asynccb.TorchModel"
_PAIRS, _TENSOR = "asynccb pairs", "asynccb tensor"
_NUMPY = re.compile(r"float(16|32|64)|u?int(8|16|32|64)|bool")
"""Types of torch that numpy has too; the bytes of all others are kept."""


class Leaf(NamedTuple):
    """Stands in a tree for a tensor: its place among the tensors, type (``"float32"``) and shape."""

    at: int
    dtype: str
    shape: tuple[int, ...]


def split(tree: Any, tensors: list[Any], where: str = "TorchModel") -> Any:
    """A copy of ``tree`` with a :class:`Leaf` for each tensor; these are appended to ``tensors``.

    Raises:
        TypeError: something in it is neither a tensor nor plain data; names the place.
    """
    import torch

    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return Leaf(len(tensors) - 1, str(tree.dtype).removeprefix("torch."), tuple(tree.shape))
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Mapping):
        parts = {key: split(value, tensors, f"{where}.{key}") for key, value in tree.items()}
        return (
            parts if all(type(key) is str for key in parts) else {_PAIRS: [[*pair] for pair in parts.items()]}
        )
    if isinstance(tree, (list, tuple)):
        return [split(value, tensors, f"{where}[{at}]") for at, value in enumerate(tree)]
    raise TypeError(
        f"{where} is of type {type(tree).__module__}.{type(tree).__qualname__}: a state is made of tensors, "
        "numbers, texts, lists and dicts"
    )


def join(tree: Any, arrays: Sequence[Array]) -> Any:
    """Plain data: the tree with the array of each leaf, in its shape; not copied."""
    if isinstance(tree, Leaf):
        if _NUMPY.fullmatch(tree.dtype):
            return arrays[tree.at].reshape(tree.shape)
        return {_TENSOR: tree.dtype, "shape": list(tree.shape), "bytes": arrays[tree.at]}
    if isinstance(tree, dict):
        return {key: join(value, arrays) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join(value, arrays) for value in tree]
    return tree


def thaw(plain: Any) -> Any:
    """Tensors, and dicts with the keys that they had, from plain data; they own their memory.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError, AttributeError: it is not of a torch model.
    """
    import torch

    if isinstance(plain, np.ndarray):
        return torch.from_numpy(np.array(plain, order="C"))
    if isinstance(plain, dict):
        if _PAIRS in plain:
            return {key: thaw(value) for key, value in plain[_PAIRS]}
        if _TENSOR in plain:
            return _tensor_of(plain["bytes"], plain[_TENSOR], plain["shape"])
        return {key: thaw(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [thaw(value) for value in plain]
    return plain


def _tensor_of(data: Array, dtype: str, shape: Sequence[int]) -> Any:
    import torch

    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype} is no type of tensors")
    return torch.from_numpy(np.array(data)).view(kind).reshape(tuple(shape))


def like(now: Any, saved: Any) -> Any:
    """``saved`` with tuples, and other kinds of dicts, where ``now`` has them: files keep lists and dicts."""
    if isinstance(now, Mapping) and isinstance(saved, dict):
        made = {key: like(now.get(key), value) for key, value in saved.items()}
        return made if type(now) is dict else type(now)(made)  # type: ignore[call-arg]
    if isinstance(now, (list, tuple)) and isinstance(saved, list):
        known = [*now, *[None] * (len(saved) - len(now))]
        parts = [like(mine, value) for mine, value in zip(known, saved, strict=False)]
        return tuple(parts) if type(now) is tuple else parts
    return saved


# Memory --------------------------------------------------------------------------------------------------


def flat(tensor: Any) -> Array:
    """A flat numpy array on the memory of a contiguous tensor of the CPU: its elements, or their bytes where
    numpy has no such type."""
    import torch

    row = tensor.detach().reshape(-1)
    if _NUMPY.fullmatch(str(row.dtype).removeprefix("torch.")):
        array: Array = row.numpy()
    else:
        array = row.view(torch.uint8).numpy()
    return array


def copied(tensor: Any) -> Array:
    """:func:`flat` of a copy."""
    return flat(tensor.detach().to("cpu", copy=True).contiguous())


def can_be_shown(tensor: Any) -> bool:
    """Whether numpy can look at its memory as :func:`flat` does."""
    import torch

    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and bool(tensor.is_contiguous())
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def shown(tensor: Any) -> Array:
    """A tensor as a read-only array in its shape: its own memory where that is possible; float32 where numpy
    has no such type."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        array: Array = tensor.numpy().view()
    except TypeError:  # bfloat16 and the like
        array = tensor.float().numpy().view()
    array.flags.writeable = False
    return array


def optimizer_part(at: int) -> str:
    """The part of a state that an optimizer has."""
    return f"optimizer{at or ''}"


def slot_names(module: Any, optimizer: Any) -> list[str]:
    """Names of an optimizer's parameters, in its order: those of the module, numbers for all others."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [names.get(id(parameter), f"{at}") for at, parameter in enumerate(own)]


# A copy --------------------------------------------------------------------------------------------------


class TorchState:
    """A ``ModelState``: the state of a ``TorchModel`` at one moment.

    Args:
        name: of the module's class, for files that tell it.
        tree: from :func:`split`: ``weights`` and, where there are such things, ``loss``, ``optimizer``,
            ``scheduler``, ``scaler``, ``gradients``, ``random`` and numbers.
        arrays: what its leaves stand for; they may be filled later, and are never written to again.
        slots: for each optimizer, names of its parameters in its order. The state of the first is
            ``optimizer`` of the tree, that of others ``optimizer1``, ``optimizer2``, ...
        rebuild: makes a model of the thawed tree.
    """

    def __init__(
        self,
        name: str,
        tree: dict[str, Any],
        arrays: Sequence[Array],
        slots: Sequence[Sequence[str]],
        rebuild: Callable[[dict[str, Any]], Any],
    ) -> None:
        self._name = name
        self._tree = tree
        self._arrays = arrays
        self._slots = slots
        self._rebuild = rebuild

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The tensors of the weights by torch's names (``"0.weight"``), then those of the optimizer:
        ``"optimizer/0.weight/exp_avg"``, of a second one ``"optimizer/1/0.weight/exp_avg"``. What numpy has
        no type for is shown as float32."""
        return {name: self._array(leaf) for name, leaf in self._named()}

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a file, atomically; blocks until it is durable. The end of its name says of which kind:

        - ``.pt`` and ``.pth``: for ``torch.load(path, weights_only=True)``. With ``weights_only`` it is the
          module's ``state_dict()``, else a dict of it (``"weights"``) and of the other states.
        - ``.safetensors``: always the weights alone; needs safetensors.
        - all others: HDF5, which keeps everything.

        Raises:
            ArgumentError: ``extra`` for a file that is not HDF5, or an ending of another format.
            CheckpointWriteError: it could not be written; the file that stood there before is untouched.
            ImportError: safetensors is not installed.
        """
        ending = check_path(path)
        if extra and (ending in PICKLED or ending == SAFETENSORS):
            raise ArgumentError("path", os.fspath(path), "a backup is an HDF5 file", "Give it the ending .h5")
        if ending == SAFETENSORS:
            save_file, weights = _safetensors().save_file, self._thawed(WEIGHTS[:1])["weights"]
            about = {"format": "pt", "model": self._name}
            atomic_write(path, lambda temporary: save_file(weights, temporary, about))
        elif ending in PICKLED:
            import torch

            whole = self._thawed(WEIGHTS[:1] if weights_only else self._tree)
            held = whole["weights"] if weights_only else {"format": _FORMAT, **whole}
            atomic_write(path, lambda temporary: torch.save(held, temporary))
        else:
            kept = {part: self._tree[part] for part in self._tree if not weights_only or part in WEIGHTS}
            write_plain(path, "TorchModel", join(kept, self._arrays), extra)

    def to_model(self) -> Any:
        """A ``TorchModel`` of its own module, optimizer and scheduler with this state.

        Raises:
            ArgumentError: the module, or what came with it, could not be copied.
        """
        return self._rebuild(self._thawed(self._tree))

    def _thawed(self, parts: Sequence[str] | dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = thaw(join({part: self._tree[part] for part in parts}, self._arrays))
        return found

    def _named(self) -> Iterator[tuple[str, Leaf]]:
        for part in WEIGHTS:
            for name, leaf in self._tree.get(part, {}).items():
                if isinstance(leaf, Leaf):
                    yield (name if part == "weights" else f"{part}/{name}"), leaf
        for at, slots in enumerate(self._slots):
            states = self._tree[optimizer_part(at)]["state"]
            for index, state in states[_PAIRS] if _PAIRS in states else states.items():
                for slot, leaf in state.items():
                    if isinstance(leaf, Leaf):
                        yield f"optimizer/{f'{at}/' if at else ''}{slots[index]}/{slot}", leaf

    def _array(self, leaf: Leaf) -> Array:
        found = self._arrays[leaf.at]
        if not _NUMPY.fullmatch(leaf.dtype):
            return shown(_tensor_of(found, leaf.dtype, leaf.shape))
        array = found.reshape(leaf.shape)
        array.flags.writeable = False
        return array


def check_path(path: str | os.PathLike[str], *, weights_only: bool = False) -> str:
    """The ending of a file's name, which says of which kind it becomes; all kinds hold weights alone too.

    Raises:
        ArgumentError: one that stands for another format.
        ImportError: it needs safetensors, which is not installed.
    """
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending in _OF_OTHERS:
        fix = "Give it the ending .pt, .safetensors or .h5"
        raise ArgumentError("path", os.fspath(path), "not written in this format", fix)
    if ending == SAFETENSORS:
        _safetensors()
    return ending


def read_state(path: str, accept: Callable[[Mapping[str, Any]], object] | None = None) -> dict[str, Any]:
    """What :meth:`TorchState.save` wrote: tensors on the CPU. No code in a file is run.

    Args:
        path: the file.
        accept: given all that is ours in it; then it must be a backup.

    Returns:
        A dict with ``weights`` at least.

    Raises:
        FileNotFoundError: there is no such file.
        FileRefused: it is damaged, not safe, or holds something else.
        ImportError: for ``.safetensors``, safetensors is not installed.
    """
    ending = os.path.splitext(path)[1].lower()
    if accept is not None or (ending != SAFETENSORS and ending not in PICKLED):
        held = read_plain(path, accept or (lambda extra: None))
        try:
            found = thaw(held)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise FileRefused(path, f"it holds no state of a torch model: {error}") from error
    else:
        found = _unpickled(path) if ending in PICKLED else {"weights": _read_safetensors(path)}
    if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
        raise FileRefused(path, "it holds no weights of a torch model")
    return found


def _unpickled(path: str) -> Any:
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises what its readers of archives and of pickles raise
        raise FileRefused(
            path, f"torch cannot load it with weights_only=True: {type(error).__name__}"
        ) from error
    return held if isinstance(held, dict) and held.get("format") == _FORMAT else {"weights": held}


def _read_safetensors(path: str) -> Any:
    library = _safetensors()
    try:
        return library.load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise FileRefused(path, f"safetensors cannot load it: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('.safetensors needs safetensors: pip install "asynccb[torch]"') from error
    return safetensors.torch
