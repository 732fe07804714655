"""Files made to do harm: each begins as a good one, is changed through HDF5, and is sealed as ours are.

``ATTACKS`` has them by name. What ``tests/storage/test_reader.py`` already tries is not here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t, h5z

from asynccb.models import Dense, Dropout, Sequential
from asynccb.storage.seal import SIZE, seal

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    Attack = Callable[[h5py.File], object]

KERNEL = "layers/dense/vars/0"
SHAPE = (5, 4)

ATTACKS: dict[str, Attack] = {}
PATCHES: dict[str, Callable[[bytes], bytes]] = {}
"""Those that change bytes that HDF5 would not write."""


def good(path: Path) -> None:
    """The file that all begin with."""
    model = Sequential([Dense(4, input_dim=5), Dropout(0.5)], seed=1)
    model.compile("adam", "mse", ["mae"])
    model.save(path)


def make(name: str, path: Path) -> None:
    """Makes a hostile file of a good one."""
    if name in PATCHES:
        resealed(path, PATCHES[name](path.read_bytes()[:-SIZE]))
        return
    with h5py.File(path, "r+") as file:
        ATTACKS[name](file)
    resealed(path, path.read_bytes())


def resealed(path: Path, content: bytes) -> None:
    """Writes the content and a seal that fits."""
    path.write_bytes(content + seal(len(content), hashlib.sha256(content).digest()))


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


# ---------------------------------------------------------------- in place of an array


def in_place_of_the_kernel(
    kind: Any, settings: Callable[[Any], object] | None = None, *, shape: Any = SHAPE
) -> Attack:
    """A dataset of this type and these creation properties."""

    def change(file: h5py.File) -> None:
        del file[KERNEL]
        plist = h5p.create(h5p.DATASET_CREATE)
        if settings is not None:
            settings(plist)
        space = h5s.create(h5s.NULL) if shape is None else h5s.create_simple(shape)
        h5d.create(file.id, KERNEL.encode(), kind, space, plist)

    return change


def opaque() -> Any:
    kind = h5t.create(h5t.OPAQUE, 4)
    kind.set_tag(b"pickle")
    return kind


def chunked(*filters: tuple[int, int, tuple[int, ...]]) -> Callable[[Any], None]:
    def settings(plist: Any) -> None:
        plist.set_chunk(SHAPE)
        for code, flags, values in filters:
            plist.set_filter(code, flags, values)

    return settings


FLOAT = h5t.IEEE_F32LE
ATTACKS |= {
    "opaque": in_place_of_the_kernel(opaque()),
    "enum": in_place_of_the_kernel(h5t.py_create(h5py.enum_dtype({"A": 0, "B": 1}, "i4"), logical=True)),
    "boolean": in_place_of_the_kernel(h5t.py_create(np.dtype("?"), logical=True)),
    "complex": in_place_of_the_kernel(h5t.py_create(np.dtype("c8"))),
    "array of arrays": in_place_of_the_kernel(h5t.array_create(FLOAT, (1 << 10, 1 << 10))),
    "bitfield": in_place_of_the_kernel(h5t.STD_B32LE),
    "fixed string": in_place_of_the_kernel(h5t.py_create(np.dtype("S4"))),
    "time": in_place_of_the_kernel(h5t.UNIX_D32LE),
    "region reference": in_place_of_the_kernel(h5t.STD_REF_DSETREG),
    "object reference": in_place_of_the_kernel(h5t.STD_REF_OBJ),
    "rows of references": in_place_of_the_kernel(h5t.vlen_create(h5t.STD_REF_OBJ)),
    "compound of a row": in_place_of_the_kernel(
        h5t.py_create(np.dtype([("a", h5py.vlen_dtype("f4"))]), logical=True)
    ),
    "no space": in_place_of_the_kernel(FLOAT, shape=None),
    "compact": in_place_of_the_kernel(FLOAT, lambda plist: plist.set_layout(h5d.COMPACT)),
    "shuffled": in_place_of_the_kernel(FLOAT, chunked((h5z.FILTER_SHUFFLE, 0, ()))),
    "checksummed": in_place_of_the_kernel(FLOAT, chunked((h5z.FILTER_FLETCHER32, 0, ()))),
    "compressed by a plugin": in_place_of_the_kernel(FLOAT, chunked((32008, h5z.FLAG_OPTIONAL, (1, 2)))),
    "compressed again and again": in_place_of_the_kernel(
        FLOAT, chunked(*[(h5z.FILTER_DEFLATE, 0, (9,))] * 16)
    ),
    "32 dimensions": in_place_of_the_kernel(FLOAT, shape=(1,) * 32),
    "data of many files": in_place_of_the_kernel(
        FLOAT, lambda plist: [plist.set_external(f"/proc/self/fd/{n}".encode(), 0, 8) for n in range(10)]
    ),
    "data of memory": in_place_of_the_kernel(FLOAT, lambda plist: plist.set_external(b"/dev/zero", 0, 80)),
}  # fmt: skip


@attack
def virtual_of_itself(file):
    del file[KERNEL]
    layout = h5py.VirtualLayout(SHAPE, "f4")
    layout[:] = h5py.VirtualSource(".", KERNEL, SHAPE)
    file.create_virtual_dataset(KERNEL, layout)


@attack
def a_kernel_that_is_the_whole_file(file):
    """A group, behind which everything is once more."""
    del file[KERNEL]
    file[KERNEL] = file["/"]


# ---------------------------------------------------------------- links


@attack
def soft_links_in_a_ring(file):
    file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")


@attack
def soft_link_that_climbs(file):
    file["up"] = h5py.SoftLink("../../../../etc/passwd")


@attack
def link_to_a_file_of_the_system(file):
    file["optimizer/more"] = h5py.ExternalLink("/etc/passwd", "/")


@attack
def link_to_itself_as_another_file(file):
    file["vars/self"] = h5py.ExternalLink(file.filename, "/")


@attack
def a_named_type_beside_the_arrays(file):
    file["layers/dense/vars/type"] = np.dtype("f4")


@attack
def names_that_climb(file):
    h5g.create(file["layers"].id, b"..")
    file["layers/../vars/0"] = np.ones(SHAPE, np.float32)


@attack
def a_name_of_sixty_thousand_characters(file):
    file["layers"].create_group("n" * 60_000).create_group("vars")["0"] = np.zeros(3, np.float32)


@attack
def a_layer_that_is_its_own_layer(file):
    file["layers/dense/vars/2"] = file["layers"]


# ---------------------------------------------------------------- numbers where numbers go


def optimizer_number(index: int, value: Any) -> Attack:
    def change(file: h5py.File) -> None:
        del file[f"optimizer/vars/{index}"]
        file[f"optimizer/vars/{index}"] = value

    return change


ATTACKS |= {
    "an iteration without end": optimizer_number(0, np.float32(np.inf)),
    "an iteration that is no number": optimizer_number(0, np.float32(np.nan)),
    "a rate of words": optimizer_number(1, np.bytes_(b"os.system")),
}


# ---------------------------------------------------------------- what the configuration says


def configured(attribute: str, change: Callable[[Any], Any]) -> Attack:
    """The JSON of an attribute, changed: ``change`` is given it as read, and may answer with a text."""

    def apply(file: h5py.File) -> None:
        value = json.loads(file.attrs[attribute])
        changed = change(value)
        del file.attrs[attribute]
        file.attrs[attribute] = changed if isinstance(changed, str) else json.dumps(value)

    return apply


def layer(**settings: Any) -> Attack:
    """Settings of the first layer."""
    return configured("model_config", lambda config: config["config"]["layers"][1]["config"].update(settings))


def entry(**fields: Any) -> Attack:
    """What stands around them."""
    return configured("model_config", lambda config: config["config"]["layers"][1].update(fields))


def shape_of(*batch_shape: Any) -> Attack:
    return configured(
        "model_config",
        lambda config: config["config"]["layers"][0]["config"].update(batch_shape=list(batch_shape)),
    )


def kind_of_numbers(dtype: Any) -> Attack:
    return configured("model_config", lambda config: config["asynccb"].update(dtype=dtype))


def trained(**fields: Any) -> Attack:
    return configured("training_config", lambda config: config.update(fields))


def optimizer(**fields: Any) -> Attack:
    return configured("training_config", lambda config: config["optimizer_config"].update(fields))


def many_layers(count: int) -> Attack:
    row = {"class_name": "Dropout", "config": {"rate": 0.5}}
    return configured("model_config", lambda config: config["config"]["layers"].extend([row] * count))


CALL = {
    "module": "os",
    "class_name": "system",
    "config": {"command": "touch owned"},
    "registered_name": "os>system",
}

ATTACKS |= {
    "a layer that is a call": entry(**CALL),
    "a layer named as a function": entry(class_name="os.system"),
    "a layer named as a module": entry(class_name="builtins.eval", module="builtins"),
    "a layer whose class is an object": entry(class_name=CALL),
    "a layer whose class is a list": entry(class_name=["Dense"]),
    "a layer of Python's own": entry(class_name="__class__"),
    "settings that are a list": entry(config=["units", 4]),
    "settings that are words": entry(config="units"),
    "an activation that is a call": layer(activation="__import__('os').system"),
    "an activation that is an object": layer(activation=CALL),
    "an initializer that is a call": layer(kernel_initializer="os.system"),
    "a setting that is none": layer(__init__="os.system"),
    "a setting of Python's own": layer(__class__="os.system"),
    "no units": layer(units=0),
    "fewer than no units": layer(units=-4),
    "units without end": layer(units=float("inf")),
    "units beyond all integers": layer(units=1 << 200),
    "units in words": layer(units="4"),
    "units in a list": layer(units=[4]),
    "units in a tree": layer(units={"a": {"b": 4}}),
    "a petabyte of units": configured(
        "model_config",
        lambda config: config["config"]["layers"].extend(
            [{"class_name": "Dense", "config": {"units": 1 << 25, "name": f"d{n}"}} for n in range(2)]
        ),
    ),
    "a shape beyond all memory": shape_of(None, 1 << 62),
    "a shape beyond all integers": shape_of(None, 1 << 200),
    "a shape below zero": shape_of(None, -5),
    "a shape of words": shape_of(None, "5"),
    "a shape of shapes": shape_of(None, [5]),
    "a shape of nothing": shape_of(None, None),
    "a shape of fractions": shape_of(None, 5.5),
    "an empty shape": shape_of(),
    "numbers that are objects": kind_of_numbers("O"),
    "numbers that are pointers": kind_of_numbers("(4294967296,4294967296)f4"),
    "numbers that are records": kind_of_numbers("f4,O"),
    "numbers of a gigabyte each": kind_of_numbers("V1000000000"),
    "numbers of a name": kind_of_numbers("os.system"),
    "an optimizer that is a call": optimizer(**CALL),
    "an optimizer named as a function": optimizer(class_name="subprocess.Popen"),
    "an optimizer that is words": trained(optimizer_config="os.system"),
    "a loss that is a call": trained(loss="os.system"),
    "a loss that is an object": trained(loss=CALL),
    "a metric that is a call": trained(metrics=["os.system"]),
    "metrics that are an object": trained(metrics=CALL),
    "no layers": configured("model_config", lambda config: config["config"].update(layers=[])),
    "layers that are a number": configured("model_config", lambda config: config["config"].update(layers=4)),
    "layers that are objects": configured(
        "model_config", lambda config: config["config"].update(layers={"a": 1})
    ),
    "twenty thousand layers": many_layers(20_000),
    "a million empty layers": configured(
        "model_config", lambda config: config["config"].update(layers=[{}] * 1_000_000)
    ),
    "JSON of nothing but brackets": configured(
        "model_config", lambda config: "[" + "[]," * 4_000_000 + "[]]"
    ),
    "JSON of nothing but braces": configured(
        "model_config", lambda config: '{"config":{"layers":[' + "{}," * 4_000_000 + "{}]}}"
    ),
    "a number of a million digits": configured(
        "model_config", lambda config: json.dumps(config).replace('"units": 4', f'"units": {"9" * 1_000_000}')
    ),
    "half a character": entry(class_name="\ud800"),
}  # fmt: skip


@attack
def a_config_of_references(file):
    del file.attrs["model_config"]
    value = np.empty(1, object)
    value[0] = np.array([file.ref], h5py.ref_dtype)
    file.attrs.create("model_config", value, dtype=h5py.vlen_dtype(h5py.ref_dtype))


@attack
def a_config_that_is_a_reference(file):
    del file.attrs["model_config"]
    file.attrs["model_config"] = file["layers"].ref


@attack
def a_config_of_nothing(file):
    del file.attrs["model_config"]
    file.attrs["model_config"] = h5py.Empty("S1")


@attack
def a_config_of_bytes_that_are_no_text(file):
    del file.attrs["model_config"]
    file.attrs["model_config"] = np.bytes_(b'{"a": "\xff\xfe"}')


# ---------------------------------------------------------------- size


@attack
def a_chain_of_ten_thousand_groups(file):
    group = file["vars"].id
    for _ in range(10_000):
        group = h5g.create(group, b"g")


def many_links(count: int) -> Attack:
    """So many names for one group, in one place."""

    def change(file: h5py.File) -> None:
        group, target = file["vars"].id, file["layers"].id
        for number in range(count):
            group.links.create_hard(b"l%d" % number, target, b".")

    return change


ATTACKS["three hundred thousand names"] = many_links(300_000)


# ---------------------------------------------------------------- bytes


def patch(function: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    PATCHES[function.__name__] = function
    return function


def _replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


@patch
def dimensions_without_end(content):
    return _replaced(content, struct.pack("<QQ", *SHAPE), struct.pack("<QQ", 1 << 62, 4))


@patch
def data_behind_the_end(content):
    at = content.index(struct.pack("<Q", 80))  # the length of the kernel, behind its address
    return content[: at - 8] + struct.pack("<Q", 1 << 40) + content[at:]


@patch
def a_file_that_claims_to_be_longer(content):
    return content[:40] + struct.pack("<Q", 1 << 60) + content[48:]


@patch
def a_root_that_is_nowhere(content):
    return content[:64] + struct.pack("<Q", 1 << 50) + content[72:]


@patch
def nothing_but_a_seal(content):
    return b""


@patch
def another_version(content):
    return content[:8] + b"\x09" + content[9:]


def mutant(sealed: bytes, chance: random.Random) -> bytes:
    """The content of a good file with some changes in what is not numbers of the model."""
    content = bytearray(sealed[:-SIZE])
    end = content.index(np.float32(0.001).tobytes())  # the arrays begin about there
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(end - 8)
        match chance.randrange(5):
            case 0:
                content[at] ^= 1 << chance.randrange(8)
            case 1:
                content[at] = chance.randrange(256)
            case 2:
                size = chance.choice((1, 2, 4, 8))
                value = chance.choice(
                    (0, 1, 0x7F, 0x80, at, len(content), 1 << 31, (1 << 63) - 1, (1 << 64) - 1)
                )
                content[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            case 3:
                source = chance.randrange(end - 8)
                content[at : at + 8] = content[source : source + 8]
            case 4:
                length = chance.randrange(1, 64)
                content[at : at + length] = bytes(length)
    return bytes(content)
