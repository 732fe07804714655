"""A model's layers as the graph that TensorBoard draws, written by hand: no TensorFlow, no torch."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["graph_of"]

_ODD = re.compile(r"[^A-Za-z0-9_.\-]")


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
    from tensorboardX.proto.graph_pb2 import GraphDef
    from tensorboardX.proto.versions_pb2 import VersionDef

    root = _part(getattr(model, "name", None) or type(model).__name__)
    settings = [layer.get("config", {}) for layer in config.get("layers", ())]
    configs = {setting.get("name"): setting for setting in settings}
    shapes = _shapes(_input_shape(settings), layers)
    nodes = [_node(f"{root}/input", "Placeholder", shape=shapes[0])]
    for layer, shape in zip(layers, shapes[1:], strict=True):
        nodes += _layer_nodes(root, layer, nodes[-1].name, shape, configs.get(layer.name))
    graph: bytes = GraphDef(node=nodes, versions=VersionDef(producer=22)).SerializeToString()
    return graph


def _layer_nodes(root: str, layer: Any, before: str, shape: Any, config: Any) -> list[Any]:
    """The nodes of a layer's weights, and last the node that the next layer reads."""
    group, kind = f"{root}/{_part(layer.name)}", type(layer).__name__
    nodes = [
        _node(f"{group}/{_part(_last(weight))}", "VariableV2", shape=tuple(weight.shape))
        for weight in getattr(layer, "weights", ())
    ]
    name = f"{group}/{_part(kind)}" if nodes else group
    inputs = [before, *(node.name for node in nodes)]
    return [*nodes, _node(name, kind, inputs, shape, config)]


def _node(name: str, op: str, inputs: Sequence[str] = (), shape: Any = None, config: Any = None) -> Any:
    from tensorboardX.proto.attr_value_pb2 import AttrValue
    from tensorboardX.proto.node_def_pb2 import NodeDef
    from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

    attributes = {}
    if shape is not None:
        dims = [TensorShapeProto.Dim(size=-1 if size is None else int(size)) for size in shape]
        shapes = AttrValue.ListValue(shape=[TensorShapeProto(dim=dims)])
        attributes["_output_shapes"] = AttrValue(list=shapes)
    if config:
        attributes["config"] = AttrValue(s=json.dumps(config, default=str).encode())
    return NodeDef(name=name, op=op, input=inputs, attr=attributes)


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
