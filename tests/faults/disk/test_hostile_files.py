"""Files made to do harm are refused; nothing else is opened or run, and little memory is taken."""

from __future__ import annotations

import json
import signal

import pytest
from disk_faults import hostile
from disk_faults.hostile import ATTACKS, PATCHES

MEMORY = 1 << 30
"""Bytes that a process which loads such a file may have."""

SECONDS = 1.0
"""Seconds of processor time in which a mutant must be loaded or refused."""

NAMES = [*ATTACKS, *PATCHES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a good file and all hostile ones, which are numbered."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile.good(folder / "good.h5")
    good = (folder / "good.h5").read_bytes()
    for number, name in enumerate(NAMES):
        path = folder / f"{number}.h5"
        path.write_bytes(good)
        hostile.make(name, path)
    return folder


def test_hostile_files_are_refused_and_nothing_else_is_opened_or_run(server, corpus):
    results = {}
    for number, name in enumerate(NAMES):
        path = corpus / f"{number}.h5"
        answer = server.ask(
            "load_watched", memory=MEMORY, good=corpus / "good.h5", path=path, record=corpus / "record"
        )
        assert (answer.signal, answer.hangs) == (0, False), name
        results[name] = json.loads(answer.said[0])
    assert len(results) >= 75
    assert {name: it for name, it in results.items() if not it["found"].startswith("refused: ")} == {}
    assert {name: it for name, it in results.items() if it["opened"] or it["done"]} == {}
    assert max(it["peak"] for it in results.values()) < 200_000_000


def test_what_is_watched_for_is_seen(server, corpus):
    """Negative control: plain HDF5 opens other files, which only the interception of system calls sees."""
    names = ["data of memory", "link_to_a_file_of_the_system"]
    paths = [corpus / f"{NAMES.index(name)}.h5" for name in names]
    answer = server.ask("read_all_plainly", paths=paths, record=corpus / "record")
    opened = [json.loads(line) for line in answer.said]
    assert opened == [["/dev/zero"], ["/etc/passwd"]]


# ---------------------------------------------------------------- mutants


def loaded(server, corpus, count, seed):
    """The verdicts on so many mutants of a good file. After one that a child dies of, another goes on."""
    content, verdicts = (corpus / "good.h5").read_bytes(), []
    (corpus / "content").write_bytes(content)
    while len(verdicts) < count:
        answer = server.ask(
            "load_mutants",
            content=corpus / "content",
            folder=corpus,
            seed=seed,
            numbers=[len(verdicts), count],
            memory=MEMORY,
            seconds=SECONDS,
        )
        verdicts += answer.said
        if answer.signal == signal.SIGPROF:
            verdicts.append("out of time")
        elif answer.signal:
            verdicts.append("crashed")
    return verdicts


def check_mutants(server, corpus, count, seed):
    verdicts = loaded(server, corpus, count, seed)
    known = ("loaded", "refused", "crashed", "out of time")
    odd = [(number, it) for number, it in enumerate(verdicts) if it not in known]
    assert odd == [], f"seed {seed}: (number of the mutant, verdict)"
    assert len(verdicts) == count
    assert verdicts.count("refused") > count // 4
    # The library's own: it loops or crashes in what a seal that does not fit would have kept from it.
    assert verdicts.count("crashed") + verdicts.count("out of time") < count // 50


def test_changed_metadata_behind_a_seal_that_fits_is_loaded_or_refused(server, corpus):
    check_mutants(server, corpus, 400, seed=1)


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize("seed", range(2, 12))
def test_twenty_thousand_mutants_are_loaded_or_refused_or_end_their_own_process(server, corpus, seed):
    check_mutants(server, corpus, 2000, seed)
