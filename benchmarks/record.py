"""Where and with what a benchmark ran, files written whole or not at all, and the journal of a run in progress."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from specdec.files import write_atomically

CPU_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
"""Instruction sets that decide how fast a pass can be."""


def machine(device: torch.device) -> dict[str, Any]:
    """CPU, its instruction sets, usable cores, threads, memory in GiB, GPU, system, and the load now."""
    model, flags = _cpu()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": model,
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "os": platform.platform(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> tuple[str, set[str]]:
    """Model name and flags, from Linux where it is Linux."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = found.get("flags", found.get("Features", ""))
    return found.get("model name") or platform.processor() or platform.machine(), set(flags.split())


def versions() -> dict[str, str | None]:
    """Versions of Python and the packages that matter; None for a package that is missing."""
    from specdec import __version__

    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"specdec": __version__}


def commit() -> str | None:
    """The source's commit, with "-dirty" where tracked files differ from it; None outside a checkout."""
    import specdec

    source = Path(specdec.__file__).resolve()
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    sha, changes = _git(source.parent, "rev-parse", "HEAD"), _git(source.parent, "status", "--porcelain", "-uno")
    return sha if sha is None or not changes else f"{sha}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process had so far: allocated on the GPU, else resident, loading of the weights included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document atomically."""
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


class Journal:
    """Lines of a run in progress, ``OUT.partial.jsonl``: the header first, then what was finished, on disk at once.

    Args:
        out: the file the run will end in.
        header: what the run was asked for; a run can only be resumed with the same.
    """

    def __init__(self, out: Path, header: Mapping[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.partial.jsonl")
        self._header = json.loads(json.dumps(header))

    def start(self, entries: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the header and the entries kept of an interrupted run, replacing what is there."""
        write_atomically(self.path, "".join(_line(entry) for entry in (self._header, *entries)))

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add entries; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(entry) for entry in entries))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Entries of an interrupted run; a last line that was torn is left out.

        Raises:
            ValueError: when the header differs, naming what differs, or a line inside is malformed, naming its number.
        """
        lines = self.path.read_bytes().split(b"\n")
        entries = []
        for number, raw in enumerate(lines, start=1):
            if number == len(lines):  # nothing, or a line without its end
                break
            try:
                entries.append(json.loads(raw))
            except ValueError as error:
                if number < len(lines) - 1:
                    raise ValueError(f"{self.path}, line {number} is malformed: {error}") from error
        if not entries:
            return []
        differing = differences(entries[0], self._header)
        if differing:
            raise ValueError(f"{self.path} is of another run, it cannot be resumed: {'; '.join(differing)}")
        return entries[1:]

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def interrupted(journal: Journal | None, resume: bool) -> list[dict[str, Any]]:
    """Entries of an interrupted run that is to be resumed; none where there was none.

    Args:
        journal: of the run that begins; None where its result is not written.
        resume: whether to go on with what is there.

    Raises:
        ValueError: for a run that was not to be resumed, or is another (see ``Journal.read``), and where nothing could
            be there to resume.
    """
    if journal is None:
        if resume:
            raise ValueError("there is nothing to resume without a file to write the result to")
        return []
    if journal.path.exists() and not resume:
        raise ValueError(f"{journal.path} holds an interrupted run: resume it, or delete that file")
    return journal.read() if journal.path.exists() else []


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, one text per leaf, as ``settings.seed: 0 before, 1 now``."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys()):
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [f"{name}: {before!r} before, {now!r} now"]
