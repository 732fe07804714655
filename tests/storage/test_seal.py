"""Damage is seen before the library sees the file."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import tracemalloc

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynccb.errors import FileRefused
from asynccb.models import Dense, Dropout, Sequential, load_model
from asynccb.models.files import expected, layout_of
from asynccb.storage import hdf5, reader, seal
from asynccb.storage.hdf5 import read_model_file
from asynccb.storage.seal import MARK, SIZE, check_seal, digesting


def make(units=4, seed=1):
    model = Sequential([Dense(units, input_dim=5), Dropout(0.1)], seed=seed)
    model.compile("adam", "mse")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file's bytes, and a place to put others."""
    path = tmp_path_factory.mktemp("seal") / "m.h5"
    make().save(path)
    return path.read_bytes(), path


def contents(model):
    return {name: array.tobytes() for name, array in model.capture().arrays.items()}


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(FileRefused) as caught:
        load_model(path)
    return str(caught.value)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(st.data())
@settings(max_examples=200)
def test_a_bit_that_flips_anywhere_is_refused_as_damage(saved, data):
    content, path = saved
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    assert "damaged" in refused(path, flipped(content, bit))


def test_every_bit_of_the_seal_counts(saved):
    content, path = saved
    for bit in range((len(content) - SIZE) * 8, len(content) * 8):
        assert "damaged" in refused(path, flipped(content, bit))


def test_without_the_seal_most_flips_load_wrong_numbers_silently(saved):
    """Negative control: the library notices next to nothing."""
    content, path = saved
    content = content[:-SIZE]
    path.write_bytes(content)
    whole, chance, silent = contents(load_model(path)), random.Random(0), 0
    with h5py.File(path) as file:
        start = file["layers/dense/vars/0"].id.get_offset()
    for _ in range(50):
        path.write_bytes(flipped(content, start * 8 + chance.randrange(5 * 4 * 4 * 8)))
        silent += contents(load_model(path)) != whole
    assert silent == 50


@given(st.data())
@settings(max_examples=100)
def test_a_file_that_was_cut_off_is_refused_or_complete(saved, data):
    content, path = saved
    length = data.draw(
        st.one_of(st.integers(0, len(content) - 1), st.integers(len(content) - 2 * SIZE, len(content) - 1))
    )
    if length == len(content) - SIZE:
        return  # the seal alone is missing: see below
    refused(path, content[:length])


def test_a_file_whose_seal_alone_was_cut_off_is_complete(saved):
    content, path = saved
    path.write_bytes(content[:-SIZE])
    assert contents(load_model(path)) == contents(make())


@pytest.mark.parametrize("added", [b"\0", b"x" * SIZE, b"x" * 10_000])
def test_bytes_added_behind_the_seal_are_refused(saved, added):
    content, path = saved
    assert "damaged" in refused(path, content + added)


def test_two_files_mixed_page_by_page_are_refused(saved):
    content, path = saved
    make(seed=2).save(path)
    other = path.read_bytes()
    assert len(other) == len(content)
    assert "damaged" in refused(path, content[:4096] + other[4096:])


def test_a_page_of_zeros_is_refused(saved):
    content, path = saved
    for start in range(0, len(content), 4096):
        zeros = content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]
        if zeros != content:
            refused(path, zeros)


def test_a_file_changed_in_place_by_another_program_is_refused_with_words_that_say_so(saved):
    content, path = saved
    path.write_bytes(content)
    with h5py.File(path) as file:
        offset = file["layers/dense/vars/1"].id.get_offset()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.float32(7).tobytes())
    with pytest.raises(FileRefused, match="or another program changed it in place"):
        load_model(path)


@pytest.mark.parametrize("grow", [False, True])
def test_a_file_edited_through_the_library_has_no_seal_and_is_read_without(saved, grow):
    content, path = saved
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        file["layers/dense/vars/1"][0] = 7
        if grow:
            file["mine"] = np.zeros(10_000)
    assert MARK not in path.read_bytes()
    assert load_model(path).get_weights()[1][0] == 7


def read_sealed(path):
    return read_model_file(path, lambda header: expected(layout_of(make().layers)), sealed=True)


def test_where_a_seal_is_needed_a_file_without_one_is_refused(saved):
    content, path = saved
    path.write_bytes(content)
    assert read_sealed(path).weights
    for cut in (content[:-SIZE], content[: -SIZE - 64], b"", content[: SIZE - 1]):
        path.write_bytes(cut)
        with pytest.raises(FileRefused, match="it has no seal"):
            read_sealed(path)
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        file["layers/dense/vars/1"][0] = 7
    with pytest.raises(FileRefused, match="it has no seal"):
        read_sealed(path)


def test_damage_never_reaches_the_library(saved, monkeypatch):
    content, path = saved
    monkeypatch.setattr(h5py, "File", lambda *args, **kwargs: pytest.fail("the library saw it"))
    refused(path, flipped(content, 8 * 50))
    refused(path, content[: len(content) - 7])


def test_a_file_made_by_the_library_is_sealed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5._templates, "get", lambda *args: None)
    make().save(tmp_path / "m.h5")
    content = (tmp_path / "m.h5").read_bytes()
    assert content[-SIZE:].startswith(MARK)
    assert "damaged" in refused(tmp_path / "m.h5", flipped(content, 8 * 3000))


def test_a_seal_says_length_and_digest(tmp_path):
    path, content = tmp_path / "f", b"content" * 1_000_000
    path.write_bytes(content + seal.seal(len(content), digest_of([content])))
    content = path.read_bytes()
    assert content[-SIZE:-32] == MARK + (7_000_000).to_bytes(8, "little")
    assert content[-32:] == hashlib.sha256(content[:-SIZE]).digest()
    check_seal(str(path))


def test_a_file_without_a_seal_passes(tmp_path):
    for content in (b"", b"short", b"x" * 1000):
        (tmp_path / "f").write_bytes(content)
        check_seal(str(tmp_path / "f"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    pipe = tmp_path / "m.h5"
    os.mkfifo(pipe)
    refusals = []

    def read():
        with pytest.raises(FileRefused, match="it is a pipe or a device") as caught:
            check_seal(str(pipe))
        refusals.append(caught.value)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(10)
    assert refusals


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs a device")
def test_a_device_is_refused():
    with pytest.raises(FileRefused, match="it is a pipe or a device"):
        check_seal("/dev/zero")


def test_a_file_replaced_between_its_check_and_its_reading_is_checked_again(tmp_path, monkeypatch):
    path, real, checks = tmp_path / "m.h5", check_seal, []
    make().save(path)

    def check(name, **asked):
        checks.append(real(name, **asked))
        if len(checks) == 1:
            make(seed=2).save(path)
        return checks[-1]

    monkeypatch.setattr(reader, "check_seal", check)
    assert contents(load_model(path)) == contents(make(seed=2))
    assert len(checks) == 2


def test_a_file_that_is_replaced_without_end_is_refused(tmp_path, monkeypatch):
    path, real = tmp_path / "m.h5", check_seal
    make().save(path)

    def check(name, **asked):
        checked = real(name, **asked)
        make().save(path)
        return checked

    monkeypatch.setattr(reader, "check_seal", check)
    with pytest.raises(FileRefused, match="again and again"):
        load_model(path)


# ---------------------------------------------------------------- the digest


def digest_of(pieces):
    with digesting(pieces, sum(map(len, pieces))) as digest:
        return digest()


@pytest.mark.parametrize("sizes", [[10], [0, 3, 0], [300_000] * 30, [2_000_000, 5, 2_000_000], [1000] * 9000])
def test_it_is_that_of_all_pieces_in_order(sizes):
    chance = np.random.default_rng(0)
    pieces = [chance.integers(0, 256, size, np.uint8).data for size in sizes]
    assert digest_of(pieces) == hashlib.sha256(b"".join(pieces)).digest()


@pytest.mark.parametrize(("size", "where"), [(2 << 20, "asynccb digest"), (1000, "MainThread")])
def test_a_large_one_is_computed_beside_the_writing_and_a_small_one_before_it(size, where):
    seen = set()

    class Spy(bytes):
        def __len__(self):
            seen.add(threading.current_thread().name)
            return size

    with digesting([Spy(size)], size) as digest:
        digest()
    assert seen == {where}


def test_a_writing_that_fails_waits_until_nobody_reads_the_memory():
    reading, go_on, left = threading.Event(), threading.Event(), []

    class Slow(bytes):
        def __len__(self):
            reading.set()
            go_on.wait(30)
            left.append(True)
            return 0

    def fail():
        with digesting([Slow()], 2 << 20):
            reading.wait(30)
            threading.Timer(0, go_on.set).start()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert left


def test_without_a_second_thread_it_is_computed_in_the_first(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert digest_of([bytes(2 << 20)]) == hashlib.sha256(bytes(2 << 20)).digest()


def test_what_goes_wrong_in_the_second_thread_is_raised_where_the_digest_is_wanted(monkeypatch):
    class Broken(bytes):
        def __len__(self):
            raise MemoryError

    with digesting([Broken()], 2 << 20) as digest, pytest.raises(MemoryError):
        digest()


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ([1000] * 20_000, 5),
        ([400_000] * 100, 10),  # the arrays of a framework's model
        ([300_000, 24, 12, 5_000_000, 5_000_000, 100], 4),  # ours: header, rate, two flat arrays, state
        ([30_000, 900_000, 100], 3),
    ],
)
def test_many_small_pieces_are_few_blocks_and_large_ones_are_not_copied(sizes, blocks):
    pieces = [bytes(size) for size in sizes]
    found = [(len(block), block in pieces) for block in seal._blocks(pieces, sum(sizes))]
    assert sum(size for size, _ in found) == sum(sizes)
    assert len(found) == blocks
    assert all(own for size, own in found if size > 4 << 20)


def test_no_more_memory_is_taken_for_gathering_than_the_small_pieces_fill():
    pieces = [bytes(100_000), bytes(64 << 20), bytes(50_000)]
    tracemalloc.start()
    try:
        for _ in seal._blocks(pieces, sum(map(len, pieces))):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 150_000 <= peak < 160_000
