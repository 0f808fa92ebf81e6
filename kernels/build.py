"""Compiling a kernel's C source with the system's compiler, once per processor and source."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("~/.cache/specdec/kernels")
"""Where compiled libraries are kept."""

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
"""Sums keep their order: no flag here may allow the compiler to change it."""


class NotBuilt(RuntimeError):
    """There is no library, with the reason."""


def load_library(source: Path, folder: Path | None = None, options: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a C source and the headers beside it, compiled where that was not done before.

    The compiler is ``$CC``, ``cc``, ``gcc`` or ``clang``, whichever is found first.

    Args:
        source: the file.
        folder: where the library is kept, ``FOLDER`` unless given.
        options: of the compiler, after ``FLAGS``.

    Raises:
        NotBuilt: without a compiler, or where it fails.
    """
    library = (folder or FOLDER).expanduser() / f"{source.stem}-{source_digest(source, options)}.so"
    if not library.exists():
        _compile(source, library, options)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NotBuilt(f"{library} cannot be loaded: {error}") from error


def find_library(source: Path, options: Sequence[str] = ()) -> ctypes.CDLL | None:
    """``load_library``'s; None where there is none."""
    try:
        return load_library(source, options=options)
    except NotBuilt:
        return None


def source_digest(source: Path, options: Sequence[str] = ()) -> str:
    """16 hex digits of all a library is made by: source, headers beside it, flags, the processor's instructions."""
    code = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
    return hashlib.sha256(b"\0".join([*code, " ".join([*FLAGS, *options]).encode(), _processor()])).hexdigest()[:16]


def _compile(source: Path, library: Path, options: Sequence[str]) -> None:
    names = [name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotBuilt(f"no C compiler ({', '.join(names)}) is installed")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *FLAGS, *options, "-o", str(made), str(source), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise NotBuilt(f"{compiler} failed on {source.name}: {done.stderr.strip()[-500:]}")
            made.replace(library)  # another process may do the same at the same time
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{source.name} could not be compiled: {error}") from error


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)})).encode()
