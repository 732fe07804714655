"""CSVLogger: the bytes of its file."""

from __future__ import annotations

import asyncio
import csv
import inspect
import io
import math
import pickle
import warnings
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asynccb.callbacks.csv_logger import CSVLogger
from asynccb.callbacks.hooks import read_hooks
from asynccb.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Logs = dict[str, Any]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.csv"


@asynccontextmanager
async def training(
    logger: CSVLogger, metrics: list[str] | None = None, validation: bool = False
) -> AsyncIterator[CSVLogger]:
    logger.set_params({"metrics": metrics or [], "do_validation": validation})
    await logger.on_train_begin({})
    try:
        yield logger
    finally:
        await logger.on_train_end({})


async def write(logger: CSVLogger, *epochs: Logs, first: int = 0, **options: Any) -> bytes:
    """The bytes of the file after a training with these logs."""
    async with training(logger, **options):
        for epoch, logs in enumerate(epochs, first):
            await logger.on_epoch_end(epoch, logs)
    return Path(logger.filename).read_bytes()


def read(path: Path, separator: str = ",") -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter=separator))


def test_the_pages_parameters_keep_their_order_and_defaults() -> None:
    parameters = inspect.signature(CSVLogger).parameters
    assert {name: one.default for name, one in parameters.items()} == {
        "filename": inspect.Parameter.empty,
        "separator": ",",
        "append": False,
    }


def test_all_its_hooks_run_beside_the_training_and_lose_nothing() -> None:
    hooks = read_hooks(CSVLogger("log.csv"))
    assert (list(hooks.inline), sorted(hooks.beside)) == (
        [],
        ["on_epoch_end", "on_train_begin", "on_train_end"],
    )
    assert CSVLogger.overflow == "wait"


@pytest.mark.asyncio
async def test_the_bytes_are_those_of_keras(log: Path) -> None:
    written = await write(CSVLogger(log), {"loss": 0.5, "acc": 1}, {"loss": 0.25, "acc": 0.1})
    assert written == b"epoch,acc,loss\r\n0,1,0.5\r\n1,0.1,0.25\r\n"


@pytest.mark.asyncio
async def test_each_row_is_on_disk_when_its_epoch_is_over(log: Path) -> None:
    seen = []
    async with training(CSVLogger(log)) as logger:
        seen.append(log.read_bytes())
        for epoch in range(2):
            await logger.on_epoch_end(epoch, {"loss": 0.5})
            seen.append(log.read_bytes())
    assert seen == [b"", b"epoch,loss\r\n0,0.5\r\n", b"epoch,loss\r\n0,0.5\r\n1,0.5\r\n"]


def test_a_plain_buffered_file_would_have_nothing_on_disk_by_then(log: Path) -> None:
    with open(log, "w", newline="") as naive:
        csv.writer(naive).writerows([["epoch", "loss"], [0, 0.5]])
        assert log.read_bytes() == b""


@pytest.mark.asyncio
async def test_the_first_epoch_of_a_resumed_training_keeps_its_index(log: Path) -> None:
    assert await write(CSVLogger(log), {"loss": 0.5}, first=7) == b"epoch,loss\r\n7,0.5\r\n"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (1, "1"),
        (-0.5, "-0.5"),
        (0.1 + 0.2, "0.30000000000000004"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (True, "True"),
        (np.float32(0.1), "0.1"),
        (np.float64(-0.1), "-0.1"),
        (np.array(0.25), "0.25"),
        (np.array(-0.1, np.float32), "-0.1"),
        (Decimal("-1.50"), "-1.50"),
        (None, ""),
        ("text", "text"),
        ("a,b", '"a,b"'),
        ('say "so"', '"say ""so"""'),
        ("two\nlines", '"two\nlines"'),
        ([1.0, 2.0], '"""[1.0, 2.0]"""'),
        ((1, 2), '"""[1, 2]"""'),
        (np.array([1.0, 2.0]), '"""[1.0, 2.0]"""'),
        ([np.float64(0.5)], '"""[0.5]"""'),
        ([], '"""[]"""'),
    ],
)
async def test_values_become_the_cells_that_keras_writes(log: Path, value: object, cell: str) -> None:
    assert await write(CSVLogger(log), {"x": value}) == f"epoch,x\r\n0,{cell}\r\n".encode()


@pytest.mark.asyncio
@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
async def test_a_text_that_a_spreadsheet_would_run_gets_an_apostrophe(log: Path, start: str) -> None:
    await write(CSVLogger(log), {"note": f"{start}cmd|' /C calc'!A0", "b": np.array(f"{start}1")})
    assert read(log)[1] == ["0", f"'{start}1", f"'{start}cmd|' /C calc'!A0"]


def test_csv_s_own_quoting_is_no_guard_against_formulas() -> None:
    naive = io.StringIO()
    csv.writer(naive, quoting=csv.QUOTE_ALL).writerow(["=1+1"])
    assert next(csv.reader([naive.getvalue()])) == ["=1+1"]


@pytest.mark.asyncio
async def test_a_column_that_a_spreadsheet_would_run_gets_one_too_and_keeps_its_values(log: Path) -> None:
    written = await write(CSVLogger(log), {"=1+1": 0.5}, {"=1+1": -0.25})
    assert written == b"epoch,'=1+1\r\n0,0.5\r\n1,-0.25\r\n"


@pytest.mark.asyncio
async def test_a_missing_key_is_na(log: Path) -> None:
    written = await write(CSVLogger(log), {"loss": 1.0, "val_loss": 2.0}, {"loss": 0.5}, {})
    assert written == b"epoch,loss,val_loss\r\n0,1.0,2.0\r\n1,0.5,NA\r\n2,NA,NA\r\n"


@pytest.mark.asyncio
async def test_a_first_epoch_without_validation_has_its_columns_all_the_same(log: Path) -> None:
    metrics = ["loss", "acc", "val_loss", "val_acc"]
    epochs = [
        {"loss": 1.0, "acc": 0.5, "lr": 0.1},
        {"loss": 0.5, "acc": 0.6, "lr": 0.1, "val_loss": 2.0, "val_acc": 0.4},
    ]
    written = await write(CSVLogger(log), *epochs, metrics=metrics, validation=True)
    assert written == (
        b"epoch,acc,loss,lr,val_acc,val_loss\r\n"
        b"0,0.5,1.0,0.1,NA,NA\r\n"
        b"1,0.6,0.5,0.1,0.4,2.0\r\n"
    )  # fmt: skip


@pytest.mark.asyncio
async def test_without_validation_no_column_is_invented_for_it(log: Path) -> None:
    written = await write(CSVLogger(log), {"loss": 1.0}, metrics=["loss", "val_loss"], validation=False)
    assert written == b"epoch,loss\r\n0,1.0\r\n"


@pytest.mark.asyncio
async def test_a_key_that_appears_later_is_told_once_and_changes_no_row(log: Path) -> None:
    epochs = [{"loss": 1.0}, {"loss": 0.5, "lr": 0.1}, {"loss": 0.4, "lr": 0.1, "auc": 0.7}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = await write(CSVLogger(log), *epochs)
    assert written == b"epoch,loss\r\n0,1.0\r\n1,0.5\r\n2,0.4\r\n"
    assert [(one.category, str(one.message)) for one in caught] == [
        (RuntimeWarning, f"CSVLogger: {log} has no column for {key}, which came too late")
        for key in ("lr", "auc")
    ]


@pytest.mark.asyncio
async def test_a_log_named_epoch_has_a_second_column_and_overrides_the_number(log: Path) -> None:
    assert await write(
        CSVLogger(log), {"epoch": 99, "loss": 1.0}
    ) == b"epoch,epoch,loss\r\n0,99,1.0\r\n".replace(b"0,99", b"99,99")


@pytest.mark.asyncio
async def test_logs_of_none_are_a_row_of_the_index(log: Path) -> None:
    async with training(CSVLogger(log)) as logger:
        await logger.on_epoch_end(0)
    assert log.read_bytes() == b"epoch\r\n0\r\n"


@pytest.mark.asyncio
async def test_a_second_training_overwrites_the_first(log: Path) -> None:
    logger = CSVLogger(log)
    await write(logger, {"loss": 1.0}, {"loss": 0.5})
    assert await write(logger, {"mae": 3.0}) == b"epoch,mae\r\n0,3.0\r\n"


@pytest.mark.asyncio
async def test_appending_twice_with_one_object_writes_one_header(log: Path) -> None:
    logger = CSVLogger(log, append=True)
    await write(logger, {"loss": 1.0})
    assert await write(logger, {"loss": 0.5}) == b"epoch,loss\r\n0,1.0\r\n0,0.5\r\n"


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [None, b""])
async def test_appending_to_nothing_writes_the_header(log: Path, before: bytes | None) -> None:
    if before is not None:
        log.write_bytes(before)
    assert await write(CSVLogger(log, append=True), {"loss": 1.0}) == b"epoch,loss\r\n0,1.0\r\n"


@pytest.mark.asyncio
async def test_appended_rows_keep_to_the_columns_of_the_file(log: Path) -> None:
    log.write_bytes(b"epoch,val_loss,loss\r\n0,2.0,1.0\r\n")
    written = await write(CSVLogger(log, append=True), {"loss": 0.5}, first=1, metrics=["loss"])
    assert written == b"epoch,val_loss,loss\r\n0,2.0,1.0\r\n1,NA,0.5\r\n"


@pytest.mark.asyncio
@pytest.mark.parametrize("line_end", [b"", b"\n", b"\r\n"])
async def test_a_last_line_without_its_end_is_ended_first(log: Path, line_end: bytes) -> None:
    log.write_bytes(b"epoch,loss\r\n0,9" + line_end)
    written = await write(CSVLogger(log, append=True), {"loss": 0.5}, first=1)
    assert written == b"epoch,loss\r\n0,9" + (line_end or b"\r\n") + b"1,0.5\r\n"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("before", "missing"),
    [
        (b"epoch,a\r\n0,9\r\n", "loss"),
        (b"epoch;loss\r\n0;9\r\n", "epoch, loss"),
        (b"loss,acc\r\n9,9\r\n", "epoch"),
        (b"\n", "epoch, loss"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "epoch, loss"),
        (b"x" * 200_000, "epoch, loss"),
    ],
)
async def test_appending_under_another_header_is_refused_before_the_first_batch(
    log: Path, before: bytes, missing: str
) -> None:
    log.write_bytes(before)
    with pytest.raises(ArgumentError) as refusal:
        await write(CSVLogger(log, append=True), {"loss": 1.0}, metrics=["loss", "val_loss"])
    assert str(refusal.value) == (
        f"append=True: {log} has another header, without {missing}. "
        "Give another filename, or append=False to overwrite it"
    )
    assert log.read_bytes() == before


@pytest.mark.asyncio
async def test_validation_needs_its_columns_in_the_old_header_too(log: Path) -> None:
    log.write_bytes(b"epoch,loss\r\n0,9\r\n")
    with pytest.raises(ArgumentError, match="without val_loss"):
        await write(CSVLogger(log, append=True), metrics=["loss", "val_loss"], validation=True)


@pytest.mark.asyncio
async def test_a_file_that_a_spreadsheet_saved_with_a_byte_order_mark_can_be_appended_to(log: Path) -> None:
    log.write_bytes(b"\xef\xbb\xbfepoch,loss\r\n0,9\r\n")
    written = await write(CSVLogger(log, append=True), {"loss": 0.5}, first=1, metrics=["loss"])
    assert written == b"\xef\xbb\xbfepoch,loss\r\n0,9\r\n1,0.5\r\n"


@pytest.mark.asyncio
async def test_a_key_that_the_old_header_lacks_is_told(log: Path) -> None:
    log.write_bytes(b"epoch,loss\r\n0,9\r\n")
    with pytest.warns(RuntimeWarning, match="no column for lr"):
        written = await write(CSVLogger(log, append=True), {"loss": 0.5, "lr": 0.1}, metrics=["loss"])
    assert written == b"epoch,loss\r\n0,9\r\n0,0.5\r\n"


@pytest.mark.asyncio
@pytest.mark.parametrize("separator", [";", "\t", "|", " ", "."])
async def test_the_separator_is_any_one_character(log: Path, separator: str) -> None:
    await write(CSVLogger(str(log), separator), {"loss": 0.5, "note": f"a{separator}b"})
    assert read(log, separator) == [["epoch", "loss", "note"], ["0", "0.5", f"a{separator}b"]]


@pytest.mark.parametrize("separator", ["", ";;", None, 3])
def test_a_separator_that_is_not_one_character_is_a_type_error_at_once(separator: Any) -> None:
    with pytest.raises(TypeError):
        CSVLogger("log.csv", separator)


@pytest.mark.parametrize("separator", ['"', "\n", "\r"])
def test_a_separator_that_no_reader_could_tell_from_a_quote_or_line_end_is_refused(separator: str) -> None:
    with pytest.raises(ValueError, match=r"separator|delimiter"):
        CSVLogger("log.csv", separator)


@pytest.mark.asyncio
async def test_missing_folders_are_created(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "runs" / "1" / "log.csv")
    assert await write(logger, {"loss": 1.0}) == b"epoch,loss\r\n0,1.0\r\n"


@pytest.mark.asyncio
async def test_a_file_name_without_a_folder_is_one_of_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await write(CSVLogger("training.log"), {"loss": 1.0})
    assert (tmp_path / "training.log").read_bytes() == b"epoch,loss\r\n0,1.0\r\n"


@pytest.mark.asyncio
async def test_a_file_that_cannot_be_opened_is_an_error_before_the_first_batch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    with pytest.raises(IsADirectoryError):
        await logger.on_train_begin({})
    await logger.on_train_end({})  # comes after a failed start too, and has nothing to close


@pytest.mark.asyncio
async def test_a_training_without_epochs_leaves_an_empty_file(log: Path) -> None:
    log.write_bytes(b"old")
    assert await write(CSVLogger(log)) == b""


def test_a_file_left_open_by_a_training_whose_loop_was_closed_is_closed_by_the_next(log: Path) -> None:
    logger = CSVLogger(log)

    async def abandoned() -> None:
        await logger.on_train_begin({})
        await logger.on_epoch_end(0, {"loss": 1.0})

    asyncio.run(abandoned())
    assert log.read_bytes() == b"epoch,loss\r\n0,1.0\r\n"
    assert asyncio.run(write(logger, {"loss": 2.0})) == b"epoch,loss\r\n0,2.0\r\n"


@pytest.mark.asyncio
async def test_a_full_disk_reaches_whoever_awaits_the_row() -> None:
    full = CSVLogger("/dev/full")
    await full.on_train_begin({})
    with pytest.raises(OSError, match="No space left"):
        await full.on_epoch_end(0, {"loss": 1.0})
    await full.on_train_end({})  # nothing is left to be written


@pytest.mark.asyncio
async def test_rows_of_many_epochs_queued_at_once_stand_in_their_order(log: Path) -> None:
    async with training(CSVLogger(log)) as logger:
        await asyncio.gather(*(logger.on_epoch_end(epoch, {"loss": 0.0}) for epoch in range(50)))
    assert [row[0] for row in read(log)] == ["epoch", *map(str, range(50))]


def test_an_idle_logger_pickles(log: Path) -> None:
    copy = pickle.loads(pickle.dumps(CSVLogger(log, ";", True)))
    assert (copy.filename, copy.separator, copy.append) == (str(log), ";", True)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.one_of(st.floats(), st.integers(), texts)


def expected(value: object) -> str:
    if isinstance(value, str):
        return f"'{value}" if value[:1] in tuple("=+-@\t\r\n") else value
    return str(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    logs=st.dictionaries(texts.filter(lambda key: key != "epoch"), values, min_size=1, max_size=4),
    separator=st.characters(exclude_categories=["Cs"], exclude_characters='"\r\n'),
)
def test_any_keys_values_and_separator_are_read_back_as_they_were(
    log: Path, logs: Logs, separator: str
) -> None:
    asyncio.run(write(CSVLogger(log, separator), logs))
    header, row = read(log, separator)
    assert dict(zip(header, row, strict=True)) == {
        "epoch": "0",
        **{expected(key): expected(value) for key, value in logs.items()},
    }


@pytest.mark.asyncio
async def test_numbers_survive_the_round_trip_through_pandas_exactly(log: Path) -> None:
    losses = [0.1 + 0.2, math.nan, -math.inf, 5e-324, -1e308]
    await write(CSVLogger(log), *({"loss": loss} for loss in losses))
    frame = pd.read_csv(log, converters={"loss": float})
    assert list(frame.columns) == ["epoch", "loss"]
    np.testing.assert_array_equal(frame["loss"].to_numpy(), losses)


@pytest.mark.asyncio
async def test_half_a_surrogate_pair_does_not_cost_the_row(log: Path) -> None:
    assert await write(CSVLogger(log), {"note": "a\ud800b"}) == b"epoch,note\r\n0,a\\ud800b\r\n"
