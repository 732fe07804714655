"""Files that an earlier asynccb wrote are read for ever.

``golden/`` holds one for each version of the format, compressed with ``gzip -n -9``. The file of the newest
version is what :func:`write` writes; that of version 0, which had no number and no arrays in what is ours,
was written by the same lines before there was ``extra``. A new version gets a new file; the old ones stay.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest

from asynccb.models import Dense, Dropout, Sequential, load_model
from asynccb.models.files import expected, layout_of, to_records
from asynccb.storage.hdf5 import read_model_file, write_model_file
from asynccb.storage.layout import STATE
from asynccb.storage.packing import pack
from asynccb.storage.records import FORMAT

GOLDEN = Path(__file__).with_name("golden")

RESUME = {
    "history": {"loss": [0.5, 0.25]},
    "step": 12,
    "nothing": None,
    "nan": float("nan"),
    "$": {"$x": True},
    "large": 1 << 2000,
    "best": [np.arange(3, dtype=">i2"), np.array(1.5), np.float32(0.1)],
}


def model():
    made = Sequential([Dense(2, input_dim=3), Dropout(0.5)], seed=1)
    made.compile("sgd", "mse")
    made.set_weights([np.arange(6, dtype=np.float32).reshape(3, 2) / 8, np.array([-1.5, 0.25], np.float32)])
    made.optimizer.lr = 0.375
    return made


def write(path):
    records = to_records(model().capture(), weights_only=False)
    write_model_file(path, records._replace(extra={**records.extra, "resume": RESUME}))


@pytest.fixture(params=range(FORMAT + 1))
def version(request):
    return request.param


@pytest.fixture
def path(tmp_path, version):
    path = tmp_path / "golden.h5"
    path.write_bytes(gzip.decompress((GOLDEN / f"format-{version}.h5.gz").read_bytes()))
    return path


def extra_of(path):
    seen = []
    layout = layout_of(model().layers)
    read_model_file(path, lambda header: (seen.append(header.extra), expected(layout))[1], sealed=True)
    return seen[0]


def test_the_model_comes_back(path):
    found, wanted = load_model(path), model()
    assert found.get_config() == wanted.get_config()
    assert [w.tobytes() for w in found.get_weights()] == [w.tobytes() for w in wanted.get_weights()]
    assert found.optimizer.lr == 0.375
    assert found.capture().random == wanted.capture().random


def test_what_is_ours_comes_back(path, version):
    found, wanted = extra_of(path), {"random": model().capture().random}
    if version >= 1:
        wanted["resume"] = RESUME
    assert b"".join(pack(found)) == b"".join(pack(wanted))


def test_the_newest_of_them_is_what_is_written_now(tmp_path):
    """So that no change of the format goes without a number and a file of its own."""
    write(tmp_path / "now.h5")
    (tmp_path / "then.h5").write_bytes(gzip.decompress((GOLDEN / f"format-{FORMAT}.h5.gz").read_bytes()))
    with h5py.File(tmp_path / "now.h5") as now, h5py.File(tmp_path / "then.h5") as then:
        assert now[STATE][()].tobytes() == then[STATE][()].tobytes()
        assert sorted(now) == sorted(then)
