"""A damaged file is refused, or is read as it was saved: never as something else."""

from __future__ import annotations

import json
import random

import pytest
from disk_faults.jobs import verdict
from disk_faults.subjects import SUBJECTS

K = 7
NAME = "damaged"


def flipped(content, chance):
    """One bit."""
    changed = bytearray(content)
    changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def zeroed(content, chance):
    """One page that never reached the disk."""
    start = chance.randrange(len(content)) // 4096 * 4096
    end = min(start + 4096, len(content))
    return content[:start] + bytes(end - start) + content[end:]


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def swapped(content, chance):
    """Two sectors that took each other's place."""
    parts = [content[index : index + 512] for index in range(0, len(content), 512)]
    first = second = 0
    while parts[first] == parts[second]:
        first, second = chance.sample(range(len(parts) - 1), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return b"".join(parts)


def appended(content, chance):
    """Something behind the end: zeros, chance, the seal once more, the file once more."""
    more = (
        bytes(chance.randrange(1, 9000)),
        chance.randbytes(chance.randrange(1, 9000)),
        content[-56:],
        content,
    )
    return content + chance.choice(more)


def overwritten(content, chance):
    """A run of bytes from elsewhere in the file."""
    length = chance.randrange(2, 5000)
    start, source = (chance.randrange(len(content) - length) for _ in range(2))
    return content[:start] + content[source : source + length] + content[start + length :]


FAST = [(flipped, 2000), (zeroed, 500), (cut, 500)]
LONG = [
    (flipped, 20_000),
    (zeroed, 2500),
    (cut, 2500),
    (swapped, 2000),
    (appended, 1000),
    (overwritten, 2000),
]


def silently_wrong(folder, damage, trials, seed):
    """(refused, what was read from the others that is not what was saved)"""
    SUBJECTS[NAME].save(folder, K)
    content, refused, wrong = (folder / "model.h5").read_bytes(), 0, []
    for trial in range(trials):
        (folder / "model.h5").write_bytes(damage(content, random.Random(f"{seed} {trial}")))
        found = verdict(NAME, folder)
        if str(found).startswith("refused: "):
            refused += 1
        elif found != K:
            wrong.append((trial, found))
    return refused, wrong


def check(folder, damage, trials, seed):
    refused, wrong = silently_wrong(folder, damage, trials, seed)
    assert wrong == [], f"seed {seed}: (trial, what was found)"
    assert refused > trials * 0.9, "most of the damage was none"


@pytest.mark.parametrize(("damage", "trials"), FAST, ids=lambda it: getattr(it, "__name__", it))
def test_damage_is_refused_or_does_no_harm(folder, damage, trials):
    check(folder, damage, trials, seed=1)


@pytest.mark.long
@pytest.mark.timeout(140)
@pytest.mark.parametrize(("damage", "trials"), LONG, ids=lambda it: getattr(it, "__name__", it))
def test_damage_of_every_kind_is_refused_or_does_no_harm(folder, damage, trials):
    check(folder, damage, trials, seed=2)


def test_plain_hdf5_reads_most_of_the_same_flips_as_if_nothing_were(server, folder):
    """Negative control, in a process of its own: some of them crash the library."""
    SUBJECTS[NAME].save(folder, K)
    content, outcomes = (folder / "model.h5").read_bytes(), []
    for trial in range(40):
        (folder / "model.h5").write_bytes(flipped(content, random.Random(f"1 {trial}")))
        answer = server.ask("read_plainly", path=folder / "model.h5", k=K)
        outcomes.append(json.loads(answer.said[0]) if answer.said else "crashed")
    assert outcomes.count("wrong") > 15
