"""A model's layers as the graph that TensorBoard draws, written by hand: no TensorFlow, no torch."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from asynccb.callbacks.tensorboard.records import encoded, field, varint

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["graph_of"]

_ODD = re.compile(r"[^A-Za-z0-9_.\-]")


class _Node(NamedTuple):
    """A NodeDef: name, operation, the nodes that it reads, and as attributes the shape of its output and its
    config."""

    name: str
    op: str
    inputs: Sequence[str] = ()
    shape: Any = None
    config: Any = None

    def encoded(self) -> bytes:
        names = [(1, self.name), (2, self.op), *((3, name) for name in self.inputs)]
        parts = [field(number, encoded(name)) for number, name in names]
        if self.shape is not None:
            # In a shape, an axis of any length is -1.
            axes = [field(2, b"\x08" + varint(-1 if size is None else int(size))) for size in self.shape]
            parts.append(_attribute("_output_shapes", field(1, field(7, b"".join(axes)))))
        if self.config:
            parts.append(_attribute("config", field(2, json.dumps(self.config, default=str).encode())))
        return b"".join(parts)


def _attribute(name: str, value: bytes) -> bytes:
    return field(5, field(1, name.encode()) + field(2, value))


def graph_of(model: Any) -> bytes | None:
    """The serialized GraphDef of a model that is a row of layers.

    Each layer is a node ``<model>/<layer>``; where it has weights, a group with a node for each of them. The
    edges carry the shapes where the layers tell them.

    Returns:
        None for a model without ``layers`` and ``get_config()``, and for one whose layers branch.
    """
    layers = getattr(model, "layers", None)
    config = _config(model)
    if not isinstance(layers, (list, tuple)) or not layers or config is None or "input_layers" in config:
        return None
    root = _part(getattr(model, "name", None) or type(model).__name__)
    settings = [layer.get("config", {}) for layer in config.get("layers", ())]
    configs = {setting.get("name"): setting for setting in settings}
    shapes = _shapes(_input_shape(settings), layers)
    nodes = [_Node(f"{root}/input", "Placeholder", shape=shapes[0])]
    for layer, shape in zip(layers, shapes[1:], strict=True):
        nodes += _layer_nodes(root, layer, nodes[-1].name, shape, configs.get(layer.name))
    return b"".join(field(1, node.encoded()) for node in nodes) + field(4, b"\x08\x16")  # producer 22


def _layer_nodes(root: str, layer: Any, before: str, shape: Any, config: Any) -> list[_Node]:
    """The nodes of a layer's weights, and last the node that the next layer reads."""
    group, kind = f"{root}/{_part(layer.name)}", type(layer).__name__
    nodes = [
        _Node(f"{group}/{_part(_last(weight))}", "VariableV2", shape=tuple(weight.shape))
        for weight in getattr(layer, "weights", ())
    ]
    name = f"{group}/{_part(kind)}" if nodes else group
    inputs = [before, *(node.name for node in nodes)]
    return [*nodes, _Node(name, kind, inputs, shape, config)]


def _config(model: Any) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = model.get_config()
    except (AttributeError, NotImplementedError):  # Keras' subclassed models raise the latter
        return None
    inner: dict[str, Any] = config.get("config", config)
    return inner


def _input_shape(settings: Sequence[dict[str, Any]]) -> Any:
    """The shape of one sample; None where the config does not begin with it."""
    shape = settings[0].get("batch_shape") if settings else None
    return None if shape is None else tuple(shape[1:])


def _shapes(shape: Any, layers: Sequence[Any]) -> list[Any]:
    """The shape before the first layer and behind each; None from where it is not known."""
    shapes = [_batch(shape)]
    for layer in layers:
        if shape is not None and callable(getattr(layer, "output_shape", None)):
            shape = layer.output_shape(shape)
        else:
            shape = None
        shapes.append(_batch(shape))
    return shapes


def _batch(shape: Any) -> Any:
    return None if shape is None else (None, *shape)


def _last(weight: Any) -> str:
    return str(weight.name).rsplit("/", 1)[-1]


def _part(name: str) -> str:
    """``name`` as a part of a node's name: a slash would open a group, the reader refuses other oddities."""
    part = _ODD.sub("_", name)
    return part if part[:1].isalnum() else f".{part}"
