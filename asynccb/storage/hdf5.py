"""HDF5: the one writer of model files, the door to the one reader, and the thread of the library.

What a file looks like stands in ``storage.layout``, how it is written without the library in
``storage.template``, what makes damage visible in ``storage.seal``.

h5py is imported when a file is first touched, and all its objects live and die on one thread, inside one job:
the library has one global lock, and an object's release takes it too, so one that the garbage collector finds
later could stop the event loop for a whole write.
"""

from __future__ import annotations

import os
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

from asynccb.storage import direct, layout
from asynccb.storage.atomic import atomic_write
from asynccb.storage.reader import read_contents
from asynccb.storage.records import (
    ALIGNMENT,
    LEARNING_RATE,
    ArraySpec,
    Contents,
    Expected,
    Header,
    LayerSpec,
    ModelFile,
    ModelLayout,
    Names,
)
from asynccb.storage.serial import SerialExecutor
from asynccb.storage.template import Template, Templates, Unfit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Buffer = bytes | memoryview

T = TypeVar("T")

__all__ = [
    "ALIGNMENT",
    "LEARNING_RATE",
    "ArraySpec",
    "Contents",
    "Expected",
    "Header",
    "LayerSpec",
    "ModelFile",
    "ModelLayout",
    "Names",
    "hdf5_thread",
    "read_model_file",
    "write_model_file",
]

# Templates, reads and what does not fit a template. The library has one global lock, so a second thread would
# only wait.
hdf5_thread = SerialExecutor("asynccb hdf5")


def _on_thread(job: Callable[[], T]) -> T:
    """Runs ``job`` on the thread of HDF5 and waits for it. Nothing of the library gets out of there."""

    def run() -> T:
        try:
            return job()
        except BaseException as error:
            # The frames of its traceback hold the library's objects, and would be freed on the caller's
            # thread.
            reached: BaseException | None = error
            while reached is not None:
                traceback.clear_frames(reached.__traceback__)
                reached = reached.__context__
            raise

    return hdf5_thread.call(run)


_templates = Templates(_on_thread)


def write_model_file(path: str | os.PathLike[str], contents: ModelFile) -> None:
    """Writes a model file, atomically and durably. Blocks. Equal contents give equal bytes.

    The first save of a layout waits for the thread of HDF5; later ones wait for nobody, and take no memory of
    the order of the arrays. Arrays that are not in one piece, or not in the machine's order of bytes, wait
    each time and take twice their memory.

    Raises:
        CheckpointWriteError: if it could not be written; what stood at ``path`` is untouched.
    """
    atomic_write(path, lambda temporary: _write(temporary, contents), synced=True)


def read_model_file(
    path: str | os.PathLike[str], expect: Callable[[Header], Expected], *, sealed: bool = False
) -> Contents:
    """Reads a model file, on the thread of HDF5; the caller waits for it.

    Args:
        path: the file.
        expect: is given what the file says of itself and answers with the shapes that the arrays must have.
            None of these is read or allocated before; what it raises goes to the caller.
        sealed: refuse a file without a seal, which another program may have taken away. Only what this
            package has written, and nobody has changed since, passes.

    Raises:
        FileNotFoundError: if there is no such file.
        FileRefused: for a file that is damaged, not safe, or does not hold exactly these shapes. Damage
            behind a seal is found before the library sees the file.
    """
    name = os.fspath(path)
    return read_contents(name, expect, _on_thread, sealed=sealed)


def _write(path: str, contents: ModelFile) -> None:
    """Writes a new file and makes it durable."""
    state = layout.state_pieces(contents.extra)
    template = _templates.get(contents.layout, sum(map(len, state)))
    if template is None or not _written_directly(path, template, contents, state):
        image = _on_thread(lambda: _made_by_library(contents, state))
        direct.write_sealed(path, [image], len(image), lambda: None)


def _written_directly(path: str, template: Template, contents: ModelFile, state: Sequence[Buffer]) -> bool:
    def prove() -> None:
        if not template.proved:
            _on_thread(lambda: template.prove(path, contents.layout))

    try:
        pieces = template.pieces(contents, state)
    except Unfit:  # these arrays; others of the layout may fit
        return False
    try:
        direct.write_sealed(path, pieces, template.size, prove)
    except Unfit:
        _templates.refuse(contents.layout, sum(map(len, state)))
        os.unlink(path)
        return False
    return True


def _made_by_library(contents: ModelFile, state: Sequence[Buffer]) -> bytes:
    """The whole file, in memory.

    The library is kept from the disk: what fails when it releases a dataset, whose numbers it writes then, is
    swallowed, and what fails when it closes a file has crashed the process later.
    """
    import h5py

    arrays, form = contents.arrays(), contents.layout

    def dataset(group: Any, name: str, index: int) -> Any:
        return group.create_dataset(name, data=arrays[index], track_times=False)

    training = form.training_config
    if training is not None:
        training = layout.fill_in(training, contents.learning_rate)
    with h5py.File("asynccb file", "w", driver="core", backing_store=False, libver=layout.OLDEST) as file:
        layout.build(file, form, training, dataset)
        if state:
            ours = file.create_dataset(layout.STATE, (sum(map(len, state)),), "|u1", track_times=False)
            at = 0
            for piece in state:
                ours[at : at + len(piece)] = memoryview(piece)
                at += len(piece)
        file.flush()
        image: bytes = file.id.get_file_image()
        return image
