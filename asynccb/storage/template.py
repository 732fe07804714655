"""The first save of a layout goes through HDF5 once; every save of it is header bytes and the arrays' memory.

A template is made in memory: the library builds all groups, attributes and datasets without storing an
element, so that the image is metadata alone. Into the header of each dataset goes the address that its
elements will have, behind the metadata, in the order and with the alignment of the arrays in memory. A model
that keeps its weights in one flat array is then written by one system call, however many weights there are.

Nobody has to believe this: the first file of a template is opened by the library, which must find every array
where it was put (:meth:`Template.prove`), before it gets its name. What does not fit, or is not found, is
written through the library as a whole.

Templates are kept for a few layouts: metadata only, never an array.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from asynccb.storage import layout as layouts
from asynccb.storage.records import ALIGNMENT, ModelFile, ModelLayout, padded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Buffer = bytes | memoryview

MOST_TEMPLATES = 8
MOST_BYTES = 32 << 20  # of headers; the newest is always kept

_UNDEFINED = 0xFFFF_FFFF_FFFF_FFFF
_LAYOUT_MESSAGE = 8
_OLDEST_SUPERBLOCK = b"\x89HDF\r\n\x1a\n\0"
_SUPERBLOCK_END = 40  # where the oldest superblock has the length of the file
_ZEROS = bytes(ALIGNMENT)


class Unfit(Exception):
    """This layout, or this library, does not fit a template."""


class Template:
    """The bytes of a layout's file without its arrays, and where these lie.

    Attributes:
        head: everything in front of the arrays.
        offsets: of the arrays, in the order of ``layout.specs()``; None for one without elements.
        state_at: offset of what is ours, None where there is nothing.
        size: bytes of the file.
        proved: whether the library has found the arrays of a file of this template.
    """

    def __init__(self, layout: ModelLayout, image: bytes, headers: list[int], capacity: int) -> None:
        """Takes the metadata as the library made it.

        Args:
            layout: what it was made for.
            image: the file, without the elements of any array.
            headers: address of the header of each dataset: the arrays, then what is ours if there is any.
            capacity: bytes of what is ours.

        Raises:
            Unfit: the image is not made as expected.
        """
        head, at = bytearray(image), padded(len(image))
        if not head.startswith(_OLDEST_SUPERBLOCK):
            raise Unfit("another version of the superblock")
        specs = layout.specs()
        self.offsets: list[int | None] = [None] * len(specs)
        for index in layout.order:
            if nbytes := specs[index].nbytes:
                self.offsets[index] = at
                _place(head, headers[index], at, nbytes)
                at += padded(nbytes)
        self.state_at: int | None = None
        if capacity:
            self.state_at = at
            _place(head, headers[-1], at, capacity)
            at += capacity
        struct.pack_into("<Q", head, _SUPERBLOCK_END, at)
        self.head, self.size, self.proved = bytes(head.ljust(padded(len(head)), b"\0")), at, False
        self._hole = self._find_hole(layout)

    def _find_hole(self, layout: ModelLayout) -> int | None:
        if layout.training_config is None:
            return None
        hole = layouts.HOLE.encode()
        if self.head.count(hole) != 1:
            raise Unfit("its learning rate is not in one place")
        return self.head.index(hole)

    def pieces(self, contents: ModelFile, state: Sequence[Buffer]) -> list[Buffer]:
        """The file in pieces, in order. The arrays are not copied.

        Raises:
            Unfit: an array is not in one piece in memory.
            ValueError: the arrays are not those of the layout.
        """
        pieces: list[Buffer] = []
        if self._hole is None:
            pieces.append(self.head)
        else:
            rate = layouts.learning_rate_text(contents.learning_rate).encode()
            head = memoryview(self.head)
            pieces += [head[: self._hole], rate, head[self._hole + len(rate) :]]
        size = len(self.head) + sum(map(len, state))
        for array in contents.memory:
            if not array.flags.c_contiguous:
                raise Unfit("an array is not contiguous")
            piece = array.data.cast("B")
            pieces.append(piece)
            size += len(piece)
            if gap := -len(piece) % ALIGNMENT:
                pieces.append(_ZEROS[:gap])
                size += gap
        if size != self.size:
            raise ValueError(f"the arrays do not fill the layout: {size} bytes, not {self.size}")
        return [*pieces, *state]

    def prove(self, path: str, layout: ModelLayout) -> None:
        """Lets the library open a file of this template. On the thread of HDF5.

        Raises:
            Unfit: it does not find every array where it was put.
        """
        import h5py

        try:
            with h5py.File(path, "r", locking=False) as file:
                for name, spec, offset in zip(
                    layouts.paths(layout), layout.specs(), self.offsets, strict=True
                ):
                    found = file[name]
                    if (found.shape, found.dtype.str, found.id.get_offset()) != (*spec, offset):
                        raise Unfit(f"{name} is not where it was put")
                if self.state_at is not None and file[layouts.STATE].id.get_offset() != self.state_at:
                    raise Unfit("the state is not where it was put")
        except (OSError, KeyError, RuntimeError, AttributeError) as error:
            raise Unfit(f"the library cannot read it: {error}") from error
        self.proved = True


def _place(head: bytearray, header: int, offset: int, nbytes: int) -> None:
    """Writes the address of a dataset's elements into its header, whose format is the first version's: a
    prefix of 16 bytes, then messages of type, length, flags and content."""
    version, _, messages, _, length = struct.unpack_from("<BBHII", head, header)
    if version != 1:
        raise Unfit("another version of a header")
    at, end = header + 16, header + 16 + length
    for _ in range(messages):
        if at + 8 > end:
            break
        kind, size = struct.unpack_from("<HH", head, at)
        if kind == _LAYOUT_MESSAGE:
            # version, class (1: contiguous), address, length
            if struct.unpack_from("<BBQQ", head, at + 8) != (3, 1, _UNDEFINED, nbytes):
                raise Unfit("another version of a dataset's layout")
            struct.pack_into("<Q", head, at + 10, offset)
            return
        at += 8 + size
    raise Unfit("a dataset's layout is not in its header")


def make(layout: ModelLayout, capacity: int) -> Template:
    """A new template. On the thread of HDF5.

    Raises:
        Unfit: see the class; arrays of other types than plain numbers in the machine's order of bytes too.
    """
    import h5py

    specs = layout.specs()
    for spec in specs:
        kind = np.dtype(spec.dtype)
        if kind.kind not in "iuf" or not kind.isnative:
            raise Unfit(f"arrays of type {spec.dtype}")
    made: dict[int, Any] = {}

    def dataset(group: Any, name: str, index: int) -> Any:
        spec = specs[index]
        made[index] = group.id, name.encode()
        return _empty(group, name, spec.shape, spec.dtype)

    try:
        with h5py.File(
            "asynccb template", "w", driver="core", backing_store=False, libver=layouts.OLDEST
        ) as file:
            layouts.build(file, layout, layout.training_config, dataset)
            if capacity:
                _empty(file, layouts.STATE, (capacity,), "|u1")
                made[len(specs)] = file.id, layouts.STATE.encode()
            file.flush()
            headers = [h5py.h5o.get_info(*made[index]).addr for index in sorted(made)]
            image = file.id.get_file_image()
    finally:
        made.clear()  # these are objects of the library too
    return Template(layout, image, headers, capacity)


def _empty(group: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """A contiguous dataset that has no place for its elements yet."""
    from h5py import Dataset, h5d, h5p, h5s, h5t

    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_LATE)
    plist.set_fill_time(h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    links = h5p.create(h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
    kind = h5t.py_create(np.dtype(dtype), logical=True)
    return Dataset(h5d.create(group.id, name.encode(), kind, space, plist, links))


class Templates:
    """The templates of the layouts saved last; any thread may ask."""

    def __init__(self, on_thread: Callable[[Callable[[], Template | None]], Template | None]) -> None:
        """``on_thread`` runs a function on the thread of HDF5 and returns its result."""
        self._on_thread = on_thread
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[ModelLayout, int], Template | None] = OrderedDict()

    def get(self, layout: ModelLayout, capacity: int) -> Template | None:
        """The template of a layout, made if it is new; None for one that does not fit."""
        key = layout, capacity
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        return self._on_thread(lambda: self._make(key))

    def refuse(self, layout: ModelLayout, capacity: int) -> None:
        """From now on this layout does not fit."""
        self._keep((layout, capacity), None)

    def _make(self, key: tuple[ModelLayout, int]) -> Template | None:
        with self._lock:
            if key in self._known:  # somebody who asked at the same time has it made
                return self._known[key]
        try:
            template = make(*key)
        except Exception:  # written as a whole, it works or says what is wrong
            template = None
        self._keep(key, template)
        return template

    def _keep(self, key: tuple[ModelLayout, int], template: Template | None) -> None:
        with self._lock:
            self._known[key] = template
            self._known.move_to_end(key)
            while len(self._known) > 1 and (
                len(self._known) > MOST_TEMPLATES
                or sum(len(kept.head) for kept in self._known.values() if kept) > MOST_BYTES
            ):
                self._known.popitem(last=False)
