"""Who burns CPU while somebody else is timed.

Engines' thread pools spin for a while after an answer, ready for the next one. Where threads and processors are equally
many, whoever answers meanwhile is slowed down by far: so their end is waited for, and what is left of it is measured.
All of it needs Linux's ``/proc``; elsewhere nothing is waited for and nothing measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

__all__ = ["OWN", "Meter", "available_memory_bytes", "cpu_seconds", "settle"]

OWN = 0
"""Stands for this very process where a process group is meant."""
SETTLE_S = 2.0
"""Longest wait for thread pools that spin."""
WINDOW_S = 0.1
"""Time over which a group's share of a processor is measured; clocks of processes tick every 10 ms."""
BUSY_SHARE = 0.25
"""Share of one processor above which a group counts as busy: engines' idle threads wake up now and then."""

_PROC = Path("/proc")
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.0


def settle(groups: Collection[int], limit_s: float = SETTLE_S) -> set[int]:
    """Wait until no process of the groups computes.

    Args:
        groups: process groups, ``OWN`` among them for this process.
        limit_s: most seconds to wait.

    Returns:
        The groups that still compute after that time; none where it cannot be known.
    """
    if not groups or not (_PROC / "stat").exists():
        return set()
    deadline = time.perf_counter() + limit_s
    while True:
        start, before = time.perf_counter(), cpu_seconds(groups)
        time.sleep(WINDOW_S)
        after = cpu_seconds(groups)
        most = BUSY_SHARE * (time.perf_counter() - start)
        busy = {group for group in groups if after.get(group, 0.0) - before.get(group, 0.0) > most}
        if not busy or time.perf_counter() >= deadline:
            return busy


def cpu_seconds(groups: Collection[int]) -> dict[int, float]:
    """CPU seconds that the running processes of each group have spent so far; groups without any are left out."""
    found = {OWN: time.process_time()} if OWN in groups else {}
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        group = int(fields[2])
        if group in groups:
            found[group] = found.get(group, 0.0) + (int(fields[11]) + int(fields[12])) * _TICK_S
    return found


@dataclass(frozen=True)
class _Reading:
    clock_s: float
    machine_s: float
    group_s: float


class Meter:
    """Measures, from its construction on, how much everybody but one group computes.

    Args:
        group: the group that is left out, or ``OWN``.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._start = self._read()

    def foreign_cpus(self) -> float | None:
        """Processors that others kept busy on average since construction; None where it cannot be known."""
        start, now = self._start, self._read()
        if start is None or now is None or now.clock_s <= start.clock_s:
            return None
        others_s = (now.machine_s - start.machine_s) - (now.group_s - start.group_s)
        return max(0.0, others_s / (now.clock_s - start.clock_s))

    def _read(self) -> _Reading | None:
        machine_s = _machine_seconds()
        group_s = cpu_seconds([self._group]).get(self._group)
        if machine_s is None or group_s is None:
            return None
        return _Reading(time.perf_counter(), machine_s, group_s)


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where it cannot be known."""
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _machine_seconds() -> float | None:
    """CPU seconds of the whole machine so far, what its host took away included; None where it cannot be known."""
    try:
        line = (_PROC / "stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *rest = map(int, line.split()[1:9])
    return (user + nice + system + sum(rest)) * _TICK_S
