"""How many CPUs this process may compute on: its affinity, and the quota of its control groups."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["usable_cpus"]


def usable_cpus() -> int:
    """CPUs that this process may use, at least 1: what its affinity allows (all of the machine's where the
    platform has none), and no more than the CPU quota of its control groups, rounded up.

    Both are read anew at each call, for both can be changed from outside.
    """
    quota = _quota(Path("/proc/self"), Path("/"))
    cpus = _affine()
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def _affine() -> int:
    """CPUs by affinity; Python's own setting (``-X cpu_count``) counts where it has one."""
    process_cpu_count = getattr(os, "process_cpu_count", None)  # Python 3.13
    if process_cpu_count is not None:
        return process_cpu_count() or 1
    try:
        return len(os.sched_getaffinity(0)) or 1
    except (AttributeError, OSError):  # macOS and Windows have no such call; a sandbox may forbid it
        return os.cpu_count() or 1


def _quota(proc: Path, root: Path) -> float | None:
    """The lowest CPU quota along the process's control group and its parents, in CPUs; None: there is none.

    A parent's quota holds for all of its children together, so the lowest of the way up counts.

    Args:
        proc: the folder of the process, ``/proc/self``.
        root: where the mount points are looked up, ``/``.
    """
    try:
        own = _groups((proc / "cgroup").read_text(errors="surrogateescape"))
        mounts = list(_mounts((proc / "mountinfo").read_text(errors="surrogateescape")))
    except OSError:  # no Linux, or /proc is not there
        return None
    quotas = []
    for mount in mounts:
        path = own.get(mount.version)
        if path is None:
            continue
        # Inside of a container the path may be told from the host's root, of which only a part is mounted.
        within = path.removeprefix(mount.root) if mount.root != "/" else path
        top = root / mount.point.lstrip("/")
        folder = top / within.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():
            folder = top
        for level in [folder, *folder.parents]:
            quotas.append(_read_v2(level) if mount.version == 2 else _read_v1(level))
            if level == top:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


class _Mount(NamedTuple):
    version: int
    root: str
    point: str


def _groups(text: str) -> dict[int, str]:
    """The process's path in the hierarchy of version 2, and in that of version 1 that counts CPU time."""
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            found[2] = path
        elif "cpu" in controllers.split(","):
            found[1] = path
    return found


def _mounts(text: str) -> Iterator[_Mount]:
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup2":
            yield _Mount(2, _unescaped(fields[3]), _unescaped(fields[4]))
        elif kind[0] == "cgroup" and "cpu" in kind[-1].split(","):
            yield _Mount(1, _unescaped(fields[3]), _unescaped(fields[4]))


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _read_v2(folder: Path) -> float | None:
    """``cpu.max``: "quota period" in microseconds, or "max period"."""
    words = _words(folder / "cpu.max")
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _read_v1(folder: Path) -> float | None:
    """A quota of -1 is none."""
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, ValueError):
        return []


def _ratio(quota: str, period: str) -> float | None:
    if not (quota.isdecimal() and period.isdecimal()) or int(quota) <= 0 or int(period) <= 0:
        return None
    return int(quota) / int(period)
