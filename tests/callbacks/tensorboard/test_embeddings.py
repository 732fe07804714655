"""Embeddings: what TensorBoard's own projector serves of them, and what is refused before a training."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import text_format
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from asynccb.callbacks.tensorboard import embeddings as embeddings_room
from asynccb.callbacks.tensorboard.embeddings import Projector, chosen_layers
from asynccb.errors import ArgumentError, CheckpointWriteError
from asynccb.models import Dense, Embedding, Flatten, Sequential

if TYPE_CHECKING:
    from pathlib import Path

WORDS = "the\ncat\nsat\non\n"


def model(name: str | None = None) -> Sequential:
    return Sequential([Embedding(4, 3, input_length=2, name=name), Flatten(), Dense(2)], seed=1)


class Page:
    """The projector of real TensorBoard, without TensorFlow."""

    def __init__(self, folder: Path) -> None:
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
        provider = MultiplexerDataProvider(multiplexer, str(folder))
        self.plugin = ProjectorPlugin(TBContext(data_provider=provider, logdir=str(folder)))

    def get(self, route: str, **query: str) -> Any:
        answer = Client(self.plugin.get_plugin_apps()[route]).get("/", query_string={"run": ".", **query})
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return answer

    def embeddings(self) -> list[dict[str, Any]]:
        info: list[dict[str, Any]] = json.loads(self.get("/info").get_data())["embeddings"]
        return info

    def tensor(self, name: str) -> Any:
        (shape,) = [e["tensorShape"] for e in self.embeddings() if e["tensorName"] == name]
        return np.frombuffer(self.get("/tensor", name=name).get_data(), "<f4").reshape(shape)

    def metadata(self, name: str) -> str:
        text: str = self.get("/metadata", name=name).get_data(as_text=True)
        return text


def saved(folder: Path, tables: dict[int, Any], metadata: Any = None, of: Sequential | None = None) -> Page:
    chosen = chosen_layers(of or model(), None, metadata, str(folder))
    projector = Projector(str(folder), "run", chosen)
    projector.prepare()
    for epoch, table in tables.items():
        projector.save(epoch, {chosen[0].weight: table})
    return Page(folder)


# ---------------------------------------------------------------- what the page shows


def test_the_page_shows_each_save_under_its_epoch_the_newest_first(tmp_path: Path) -> None:
    tables = {epoch: np.random.default_rng(epoch).normal(size=(4, 3)).astype("f4") for epoch in (0, 2)}
    page = saved(tmp_path, tables)
    assert json.loads(page.get("/runs").get_data()) == ["."]
    shown = [(e["tensorName"], e["tensorShape"]) for e in page.embeddings()]
    assert shown == [("embedding.ckpt-2", [4, 3]), ("embedding.ckpt-0", [4, 3])]
    for epoch, table in tables.items():
        assert page.tensor(f"embedding.ckpt-{epoch}").tolist() == table.tolist()


TABLES = {
    "zeros": np.zeros((4, 3)),
    "a first row of zeros": np.concatenate((np.zeros((1, 3)), np.random.default_rng(0).normal(size=(3, 3)))),
    "letters": np.full((4, 3), np.frombuffer(b"abcd", "<f4")[0]),
    "a line end first": np.full((4, 3), np.frombuffer(b"\n\xff\xff\x3f", "<f4")[0]),
    "nan and infinities": np.array([[np.nan, np.inf, -np.inf]] * 4),
    "doubles": np.random.default_rng(0).normal(size=(4, 3)),
    "Fortran order": np.asfortranarray(np.random.default_rng(0).normal(size=(4, 3))),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_any_table_comes_back_although_the_page_guesses_its_format(tmp_path: Path, table: Any) -> None:
    page = saved(tmp_path, {0: table})
    assert np.array_equal(page.tensor("embedding.ckpt-0"), table.astype("f4"), equal_nan=True)


def test_a_table_becomes_text_a_few_rows_at_a_time_and_no_row_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embeddings_room, "_TOGETHER", 7)
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    pieces = list(embeddings_room._as_text(values))
    assert [piece.count(b"\n") for piece in pieces] == [2, 2, 2, 2]
    lines = b"".join(pieces).decode().splitlines()
    assert [[float(number) for number in line.split("\t")] for line in lines] == values.tolist()


def test_control_zeros_as_plain_bytes_break_the_page(tmp_path: Path) -> None:
    (tmp_path / "zeros.bin").write_bytes(np.zeros((4, 3), "<f4").tobytes())
    (tmp_path / "projector_config.pbtxt").write_text(
        'embeddings { tensor_name: "z" tensor_shape: 4 tensor_shape: 3 tensor_path: "zeros.bin" }'
    )
    with pytest.raises(ValueError, match="could not convert string to float"):
        Page(tmp_path).embeddings()


def test_the_last_five_saves_are_kept_and_named(tmp_path: Path) -> None:
    page = saved(tmp_path, dict.fromkeys(range(8), np.full((4, 3), 0.1)))
    assert [e["tensorName"] for e in page.embeddings()] == [f"embedding.ckpt-{n}" for n in (7, 6, 5, 4, 3)]
    kept = [f"embedding.ckpt-{n}.bin" for n in (3, 4, 5, 6, 7)]
    assert sorted(os.listdir(tmp_path / "projector" / "run")) == kept


def test_a_kept_file_that_somebody_removed_does_no_harm(tmp_path: Path) -> None:
    projector = Projector(str(tmp_path), "run", chosen_layers(model(), None, None, str(tmp_path)))
    for epoch in range(6):
        projector.save(epoch, {"embedding/embeddings": np.full((4, 3), 0.1)})
        (tmp_path / "projector" / "run" / "embedding.ckpt-0.bin").unlink(missing_ok=True)
    assert len(os.listdir(tmp_path / "projector" / "run")) == 5


def test_two_trainings_in_one_folder_leave_each_others_tables_alone(tmp_path: Path) -> None:
    chosen = chosen_layers(model(), None, None, str(tmp_path))
    for run, number in (("one", 0.1), ("two", 0.2)):
        Projector(str(tmp_path), run, chosen).save(0, {"embedding/embeddings": np.full((4, 3), number)})
    assert Page(tmp_path).tensor("embedding.ckpt-0")[0, 0] == np.float32(0.2)
    assert (tmp_path / "projector/one/embedding.ckpt-0.bin").stat().st_size == 48


def test_odd_names_are_shown_as_they_are_and_lead_out_of_no_folder(tmp_path: Path) -> None:
    layer = SimpleNamespace(name='../a "b"\\é', weights=[SimpleNamespace(shape=(2, 2), path="w")])
    odd = SimpleNamespace(layers=[layer])
    projector = Projector(str(tmp_path), "run", chosen_layers(odd, [layer.name], None, str(tmp_path)))
    projector.save(0, {"w": np.full((2, 2), 0.1)})
    assert [e["tensorName"] for e in Page(tmp_path).embeddings()] == [f"{layer.name}.ckpt-0"]
    assert sorted(os.listdir(tmp_path)) == ["projector", "projector_config.pbtxt"]


def test_a_save_that_fails_leaves_the_page_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projector = Projector(str(tmp_path), "run", chosen_layers(model(), None, None, str(tmp_path)))
    projector.save(0, {"embedding/embeddings": np.full((4, 3), 0.1)})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("asynccb.storage.atomic.os.fsync", full)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            projector.save(1, {"embedding/embeddings": np.full((4, 3), 0.2)})
    assert [e["tensorName"] for e in Page(tmp_path).embeddings()] == ["embedding.ckpt-0"]
    projector.save(2, {"embedding/embeddings": np.full((4, 3), 0.3)})
    shown = [e["tensorName"] for e in Page(tmp_path).embeddings()]
    assert shown == ["embedding.ckpt-2", "embedding.ckpt-0"]


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize("given", ["words.tsv", {"embedding": "words.tsv"}], ids=["for all", "by layer"])
def test_metadata_in_the_folder_of_the_logs_is_shown_from_there(tmp_path: Path, given: Any) -> None:
    (tmp_path / "words.tsv").write_text(WORDS)
    page = saved(tmp_path, {0: np.full((4, 3), 0.1), 1: np.full((4, 3), 0.2)}, given)
    assert [e["metadataPath"] for e in page.embeddings()] == ["words.tsv"] * 2
    assert page.metadata("embedding.ckpt-1") == WORDS


def test_metadata_from_elsewhere_is_copied_to_where_the_page_may_read_it(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "words.tsv").write_text(WORDS)
    page = saved(logs, {0: np.full((4, 3), 0.1)}, tmp_path / "words.tsv")
    assert page.metadata("embedding.ckpt-0") == WORDS


def test_a_link_that_leads_out_of_the_folder_is_copied_too(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "words.tsv").write_text(WORDS)
    (logs / "words.tsv").symlink_to(tmp_path / "words.tsv")
    assert saved(logs, {0: np.full((4, 3), 0.1)}, "words.tsv").metadata("embedding.ckpt-0") == WORDS


def test_columns_have_a_header_which_is_no_row(tmp_path: Path) -> None:
    table = "word\tcount\n" + "".join(f"{word}\t1\n" for word in WORDS.split())
    (tmp_path / "words.tsv").write_text(table + "\n")
    assert (
        saved(tmp_path, {0: np.full((4, 3), 0.1)}, "words.tsv").metadata("embedding.ckpt-0").startswith(table)
    )


@pytest.mark.parametrize("text", [WORDS + "mat\n", "word\n" + WORDS, "the\ncat\n\non\n", ""])
def test_metadata_with_another_number_of_lines_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "words.tsv").write_text(text)
    with pytest.raises(ArgumentError, match=r"embeddings_metadata='words.tsv': has \d lines, .* has 4"):
        chosen_layers(model(), None, "words.tsv", str(tmp_path))


def test_metadata_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"embeddings_metadata='none.tsv': is no file"):
        chosen_layers(model(), None, {"embedding": "none.tsv"}, str(tmp_path))


def test_metadata_of_a_layer_that_is_not_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"embeddings_metadata='embeding': .* Did you mean \"embedding\""):
        chosen_layers(model(), None, {"embeding": "words.tsv"}, str(tmp_path))


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("names", [None, []])
def test_every_embedding_layer_is_chosen_unless_layers_are_named(tmp_path: Path, names: Any) -> None:
    (chosen,) = chosen_layers(model(), names, None, str(tmp_path))
    assert (chosen.layer, chosen.weight, chosen.shape) == ("embedding", "embedding/embeddings", (4, 3))


def test_any_layer_with_a_table_can_be_named(tmp_path: Path) -> None:
    (chosen,) = chosen_layers(model(), ["dense"], None, str(tmp_path))
    assert (chosen.layer, chosen.weight, chosen.shape) == ("dense", "dense/kernel", (6, 2))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["embeding"], r"is no layer of the model. Did you mean \"embedding\""), (["flatten"], "not two axes")],
)
def test_a_layer_that_has_nothing_to_show_is_refused(tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"embeddings_layer_names='{names[0]}': .*{message}"):
        chosen_layers(model(), names, None, str(tmp_path))


def test_a_model_without_embeddings_has_none(tmp_path: Path) -> None:
    assert chosen_layers(Sequential([Dense(2, input_dim=2)]), None, None, str(tmp_path)) == []
    assert chosen_layers(object(), None, None, str(tmp_path)) == []


def test_the_configuration_is_what_the_pages_own_parser_reads(tmp_path: Path) -> None:
    (tmp_path / "words.tsv").write_text(WORDS)
    saved(tmp_path, {3: np.full((4, 3), 0.1)}, "words.tsv", of=model("words"))
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    assert embedding.tensor_name == "words.ckpt-3"
    assert embedding.tensor_path == "projector/run/words.ckpt-3.bin"
    assert list(embedding.tensor_shape) == [4, 3]
    assert embedding.metadata_path == "words.tsv"
