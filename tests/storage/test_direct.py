"""Pieces of memory become a file, whatever a system call does with them."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from asynccb.storage import direct
from asynccb.storage.direct import write_sealed
from asynccb.storage.seal import SIZE, check_seal

PIECES = [b"head", b"", bytes(range(256)) * 40, memoryview(b"x" * 64), b"tail"]
CONTENT = b"".join(PIECES)


def write(path, pieces=PIECES):
    write_sealed(str(path), pieces, sum(map(len, pieces)), lambda: None)
    content = path.read_bytes()
    check_seal(str(path))
    return content[:-SIZE]


def test_the_pieces_follow_each_other_and_a_seal_follows_them(tmp_path):
    assert write(tmp_path / "f") == CONTENT


@pytest.mark.parametrize("most", [1, 3, 4, 5, 1000, 10_000])
def test_a_call_that_writes_less_than_it_was_given_is_continued(tmp_path, monkeypatch, most):
    def short(descriptor, pieces, offset):
        return os.pwrite(descriptor, b"".join(pieces)[:most], offset)

    monkeypatch.setattr(os, "pwritev", short)
    assert write(tmp_path / "f", PIECES if most > 1 else [CONTENT[:100], b"", b"end"]) == (
        CONTENT if most > 1 else CONTENT[:100] + b"end"
    )


def test_a_call_that_writes_nothing_is_an_error_and_not_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda *args: 0)
    with pytest.raises(OSError, match="nothing was written"):
        write(tmp_path / "f")


def test_more_pieces_or_bytes_than_one_call_takes_are_several_calls(tmp_path, monkeypatch):
    calls, real = [], os.pwritev

    def pwritev(descriptor, pieces, offset):
        calls.append((len(pieces), sum(map(len, pieces))))
        return real(descriptor, pieces, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    many = [bytes([index % 256]) * 3 for index in range(2500)]
    assert write(tmp_path / "many", many) == b"".join(many)
    assert [count for count, _ in calls] == [1024, 1024, 453]  # with the seal
    calls.clear()
    monkeypatch.setattr(direct, "_MOST_BYTES", 100)
    assert write(tmp_path / "large") == CONTENT
    assert max(size for _, size in calls) == 100


def test_the_disk_works_on_a_large_file_while_its_digest_is_computed(tmp_path, monkeypatch):
    synced, real, behind = threading.Event(), os.fsync, []

    def fsync(descriptor):
        with open(tmp_path / "f", "rb") as file:
            behind.append(file.read()[size:].strip(b"\0"))
        real(descriptor)
        synced.set()

    class Late(bytes):
        def __len__(self):  # asked for in the digest's thread too, which so waits for the disk
            if threading.current_thread() is not threading.main_thread():
                assert synced.wait(30)
            return super().__len__()

    size = direct.BESIDE
    monkeypatch.setattr(os, "fsync", fsync)
    assert write(tmp_path / "f", [Late(size)]) == bytes(size)
    assert [len(seal) for seal in behind] == [0, SIZE]


def test_a_file_that_is_there_already_is_not_touched(tmp_path):
    (tmp_path / "f").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"somebody's"


def test_the_check_sees_the_whole_file_before_it_is_made_durable(tmp_path, monkeypatch):
    order, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), real(descriptor)))

    def check():
        order.append(os.path.getsize(tmp_path / "f"))

    write_sealed(str(tmp_path / "f"), PIECES, len(CONTENT), check)
    assert order == [len(CONTENT) + SIZE, "fsync"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "fsync"])
def test_an_error_of_a_call_goes_to_the_caller_and_the_file_is_closed(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f")


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f")
    assert os.path.getsize(tmp_path / "f") == 0


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_cannot_allocate_ahead_is_written_without(tmp_path, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert write(tmp_path / "f") == CONTENT


def test_a_platform_that_cannot_allocate_ahead_is_served_without(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert write(tmp_path / "f") == CONTENT


class Reluctant:
    """A file that takes what it is told to, one call after the other."""

    def __init__(self, *takes: int) -> None:
        self.takes, self.got = list(takes), b""

    def write(self, data: memoryview) -> int:
        count = self.takes.pop(0)
        self.got += bytes(data[:count])
        return count


def test_what_a_disk_takes_in_parts_is_written_whole_and_in_order() -> None:
    file = Reluctant(3, 1, 4)
    direct.write_all(file, b"12345678")  # type: ignore[arg-type]
    assert file.got == b"12345678"


def test_a_disk_that_takes_nothing_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(OSError, match="nothing was written"):
        direct.write_all(Reluctant(3, 0), b"12345678")  # type: ignore[arg-type]
