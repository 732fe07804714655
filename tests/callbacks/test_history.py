"""History: what it records, and that it can be read at any time."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest

from asynccb.callbacks.history import History
from asynccb.errors import Failure
from asynccb.events import FrozenLogs, Logs


def trained(*epochs: dict[str, object], first: int = 0) -> History:
    history = History()
    history.on_train_begin({})
    for epoch, logs in enumerate(epochs, first):
        history.on_epoch_end(epoch, logs)
    return history


def test_every_key_of_the_logs_becomes_a_list_over_the_epochs() -> None:
    history = trained({"val_loss": 3.0, "loss": 2.0, "lr": 0.1}, {"val_loss": 2.5, "loss": 1.5, "lr": 0.1})
    assert history.epoch == [0, 1]
    assert history.history == {"val_loss": [3.0, 2.5], "loss": [2.0, 1.5], "lr": [0.1, 0.1]}
    assert list(history.history) == ["val_loss", "loss", "lr"]


def test_epochs_are_the_indices_of_the_hooks() -> None:
    assert trained({"loss": 1.0}, first=7).epoch == [7]


def test_a_key_that_some_epoch_lacks_has_a_shorter_list_while_rows_keep_it_with_its_epoch() -> None:
    history = trained({"loss": 2.0}, {"loss": 1.0, "val_loss": 5.0}, {"loss": 0.5})
    assert history.history == {"loss": [2.0, 1.0, 0.5], "val_loss": [5.0]}
    assert history.rows() == [
        {"epoch": 0, "loss": 2.0},
        {"epoch": 1, "loss": 1.0, "val_loss": 5.0},
        {"epoch": 2, "loss": 0.5},
    ]


def test_the_index_stands_first_in_a_row_and_wins_over_a_log_of_its_name() -> None:
    history = trained({"loss": 2.0, "epoch": 99})
    assert list(history.rows()[0].items()) == [("epoch", 0), ("loss", 2.0)]
    assert history.history["epoch"] == [99]


def test_rows_belong_to_who_asked_for_them() -> None:
    history = trained({"loss": 2.0})
    history.rows()[0]["loss"] = 0.0
    history.rows().clear()
    assert history.rows() == [{"epoch": 0, "loss": 2.0}]


def test_a_change_of_the_logs_after_the_hook_does_not_reach_the_record() -> None:
    logs = Logs(loss=2.0)
    history = trained(logs)
    logs["loss"] = 0.0
    logs.freeze()
    assert isinstance(logs, FrozenLogs)
    assert history.rows() == [{"epoch": 0, "loss": 2.0}]


def test_a_training_starts_with_nothing_of_the_one_before() -> None:
    history = trained({"loss": 2.0})
    history.outcome, history.reason = "stopped", "by hand"
    history.failures.append(Failure("CSVLogger", "on_epoch_end", 0, OSError()))
    history.on_train_begin({})
    assert (history.history, history.epoch, history.rows()) == ({}, [], [])
    assert (history.outcome, history.reason, history.failures) == (None, None, [])


def test_logs_of_none_are_an_epoch_without_values() -> None:
    history = History()
    history.on_epoch_end(0)
    assert (history.epoch, history.history, history.rows()) == ([0], {}, [{"epoch": 0}])


def read_all(history: History) -> int:
    for values in history.history.values():
        values.copy()
    for row in history.rows():
        assert len(row) == 2 + row["epoch"] % 2
    return len(history.epoch)


def test_it_can_be_read_from_another_thread_while_it_grows() -> None:
    history, faults = trained(), []

    def reader() -> None:
        try:
            while read_all(history) < 3000:
                pass
        except (AssertionError, RuntimeError) as fault:
            faults.append(fault)

    thread = threading.Thread(target=reader)
    thread.start()
    for epoch in range(3000):
        history.on_epoch_end(epoch, {"loss": 1.0} | ({f"key{epoch}": 1.0} if epoch % 2 else {}))
    thread.join()
    assert faults == []


def test_somebody_who_iterates_over_the_history_is_not_disturbed_by_a_new_key() -> None:
    history = trained({"loss": 2.0})
    keys = iter(history.history)
    naive = dict(history.history)
    naive_keys = iter(naive)
    history.on_epoch_end(1, {"loss": 1.0, "lr": 0.1})
    assert list(keys) == ["loss"]
    naive["lr"] = [0.1]
    with pytest.raises(RuntimeError, match="changed size"):  # one dict that grows would disturb them
        next(naive_keys)


def test_a_resumed_history_has_every_value_as_it_was() -> None:
    before = trained(
        {"val_loss": 3.0, "loss": np.float32(0.1), "each": np.arange(2)}, {"loss": 1, "name": None, "lr": 0.1}
    )
    after = trained()
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert repr(after.rows()) == repr(before.rows())
    assert repr(after.history) == repr(before.history)
    assert (after.epoch, type(after.history["loss"][0])) == ([0, 1], np.float32)
    after.on_epoch_end(2, {"loss": 0.5})
    assert len(before.rows()) == 2
