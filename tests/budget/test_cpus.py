"""CPUs that may be used: affinity, and the lowest quota on the way up the control groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from asynccb.budget import cpus, usable_cpus
from asynccb.budget.cpus import _quota

if TYPE_CHECKING:
    from pathlib import Path

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def machine(root: Path, groups: str, mounts: str, **files: str) -> float | None:
    """The quota on a machine of these files; ``__`` is a slash in their names and ``_dot_`` a dot."""
    proc = root / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("22 1 0:21 / /proc rw - proc proc rw\n" + mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
    return _quota(proc, root)


def test_the_quota_of_ones_own_group_counts(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/job\n", V2, job__cpu_dot_max="150000 100000\n") == 1.5


def test_a_parents_lower_quota_counts(tmp_path: Path) -> None:
    files = {"a__cpu_dot_max": "200000 100000", "a__b__cpu_dot_max": "400000 100000"}
    assert machine(tmp_path, "0::/a/b\n", V2, **files) == 2.0


def test_max_is_no_quota(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/job\n", V2, job__cpu_dot_max="max 100000\n") is None


def test_the_first_version_counts_too(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct__job__cpu_dot_cfs_quota_us": "300000\n",
        "cpu,cpuacct__job__cpu_dot_cfs_period_us": "100000\n",
    }
    assert machine(tmp_path, "4:cpu,cpuacct:/job\n3:memory:/other\n0::/\n", V1, **files) == 3.0


def test_minus_one_is_no_quota(tmp_path: Path) -> None:
    files = {"cpu,cpuacct__cpu_dot_cfs_quota_us": "-1", "cpu,cpuacct__cpu_dot_cfs_period_us": "100000"}
    assert machine(tmp_path, "4:cpu,cpuacct:/\n", V1, **files) is None


def test_a_path_told_from_the_hosts_root_is_found_in_the_part_that_is_mounted(tmp_path: Path) -> None:
    mounts = V2.replace("0:26 / ", "0:26 /docker/abc ")
    files = {"inner__cpu_dot_max": "100000 100000", "cpu_dot_max": "200000 100000"}
    assert machine(tmp_path, "0::/docker/abc/inner\n", mounts, **files) == 1.0


def test_a_path_outside_of_what_is_mounted_is_that_of_the_mount(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/../elsewhere\n", V2, cpu_dot_max="200000 100000") == 2.0


@pytest.mark.parametrize("text", ["", "nonsense", "0 100000", "100000 0", "-5 100000", "1e5 100000"])
def test_a_file_that_makes_no_sense_is_no_quota(tmp_path: Path, text: str) -> None:
    assert machine(tmp_path, "0::/job\n", V2, job__cpu_dot_max=text) is None


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert _quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("affine", "quota", "usable"),
    [(8, None, 8), (8, 1.2, 2), (8, 0.1, 1), (2, 16.0, 2), (1, 0.5, 1)],
)
def test_the_fewer_of_both_rounded_up(
    monkeypatch: pytest.MonkeyPatch, affine: int, quota: float | None, usable: int
) -> None:
    monkeypatch.setattr(cpus, "_affine", lambda: affine)
    monkeypatch.setattr(cpus, "_quota", lambda proc, root: quota)
    assert usable_cpus() == usable


def test_affinity_counts_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    assert cpus._affine() == 3


def test_pythons_own_setting_counts_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 5, raising=False)
    assert cpus._affine() == 5


@pytest.mark.parametrize(("counted", "expected"), [(12, 12), (None, 1)])
def test_without_affinity_all_cpus_count(
    monkeypatch: pytest.MonkeyPatch, counted: int | None, expected: int
) -> None:
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert cpus._affine() == expected
