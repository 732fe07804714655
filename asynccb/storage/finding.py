"""Where a file has the arrays of a model: by number in our layout and Keras 3's, by name in the older one.

What is found here is compared with the shapes that the model needs, and read, by ``storage.reader``; both run
on the thread of HDF5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asynccb.errors import FileRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from asynccb.storage.records import Expected

    Wanted = list[tuple[Any, tuple[int, ...]]]  # datasets with the shapes that they must have

_WITHOUT_SLOTS = 2  # an optimizer that has not trained has its iteration and its learning rate


def by_number(path: str, file: Any, expected: Expected) -> tuple[Wanted, Wanted | None]:
    """Weights and the optimizer's arrays, from ``layers/<group>/vars`` and ``optimizer/vars``."""
    _check_groups(path, file.get("layers"), {name for name, shapes in expected.layers.items() if shapes})
    weights: Wanted = []
    for group, shapes in expected.layers.items():
        weights += _numbered(path, file, f"layers/{group}/vars", shapes)
    if expected.optimizer is None:
        return weights, None
    held = file.get("optimizer/vars")
    if expected.names is not None and (held is None or len(held) <= _WITHOUT_SLOTS < len(expected.optimizer)):
        return weights, None
    return weights, _numbered(path, file, "optimizer/vars", expected.optimizer)


def by_name(path: str, file: Any, expected: Expected) -> tuple[Wanted, Wanted | None]:
    """The same from ``model_weights/<layer>`` and ``optimizer_weights``, wherever in there they are."""
    assert expected.names is not None
    root = file.get("model_weights")
    if root is None:
        root = file  # a file of weights alone
    leaves: dict[str, dict[str, Any]] = {}
    for place, dataset in _leaves(path, root).items():
        layer, _, below = place.partition("/")
        leaves.setdefault(layer, {})[below] = dataset
    names = dict(expected.names.layers)
    _check_names(path, set(leaves), {name for name in names if names[name]})
    weights: Wanted = []
    places: list[str] = []
    shapes = [shape for group in expected.layers.values() for shape in group]
    for layer, kinds in expected.names.layers:
        for kind in kinds:
            place = _only(path, layer, kind, leaves[layer])
            weights.append((leaves[layer][place], shapes[len(weights)]))
            places.append(place)
    held = _leaves(path, file.get("optimizer_weights") or {})
    if expected.optimizer is None or len(held) <= _WITHOUT_SLOTS < len(expected.optimizer):
        return weights, None
    wanted = ["iteration", "learning_rate"]
    wanted += [f"{_plain(places[index]).replace('/', '_')}_{slot}" for slot, index in expected.names.slots]
    slots: Wanted = []
    for kind, shape in zip(wanted, expected.optimizer, strict=True):
        slots.append((held[_only(path, "optimizer_weights", kind, held)], shape))
    return weights, slots


def _check_groups(path: str, layers: Any, wanted: set[str]) -> None:
    """The layers with weights must be those of the model; a larger file is another model's."""
    held = set()
    for name in layers or ():
        group = layers[name].get("vars")
        if group is not None and len(group):
            held.add(name)
    _check_names(path, held, wanted)


def _check_names(path: str, held: set[str], wanted: set[str]) -> None:
    if held != wanted:
        missing, foreign = sorted(wanted - held), sorted(held - wanted)
        raise FileRefused(path, f"its layers are others: it lacks {missing} and has {foreign} beside")


def _numbered(path: str, file: Any, place: str, shapes: Sequence[tuple[int, ...]]) -> Wanted:
    group = file.get(place)
    held = 0 if group is None else len(group)
    if held != len(shapes):
        raise FileRefused(path, f"{place} holds {held} arrays, the model needs {len(shapes)}")
    # Loops in place of comprehensions, here and above: these would keep the library's objects in a closure,
    # which outlives its frame's clearing.
    found: Wanted = []
    for index, shape in enumerate(shapes):
        found.append((group[str(index)], shape))
    return found


def _leaves(path: str, root: Any) -> dict[str, Any]:
    """All datasets below ``root``, by their path in it."""
    import h5py

    found: dict[str, Any] = {}
    waiting, seen = [("", root)], set()
    while waiting:
        place, group = waiting.pop()
        for name in group:
            below = group[name]
            if hasattr(below, "shape"):
                found[place + name] = below
                continue
            address = h5py.h5o.get_info(below.id).addr
            if address in seen:
                raise FileRefused(path, f"{below.name} has several names")  # and may hold itself
            seen.add(address)
            waiting.append((f"{place}{name}/", below))
    return found


def _plain(name: str) -> str:
    return name.removesuffix(":0")  # as the first Keras wrote them


def _only(path: str, where: str, kind: str, places: Iterable[str]) -> str:
    """The one place whose last part is ``kind``."""
    found = [place for place in places if _plain(place).rpartition("/")[2] == kind]
    if len(found) != 1:
        raise FileRefused(path, f"{where} holds {len(found)} arrays of the name {kind}, the model needs one")
    return found[0]
