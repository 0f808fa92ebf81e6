"""Compiles what launchers launch for devices that are not there; arguments are meta tensors. Needs Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Shared memory a block may have (CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA, local data share)."""


@dataclass(frozen=True)
class Compiled:
    """One launch of a kernel.

    Attributes:
        name: the kernel function's name.
        key: equal for launches that share one binary.
        shared: bytes of shared memory a block takes.
        spilled: bytes of registers a thread spills.
        code: the assembly.
    """

    name: str
    key: str
    shared: int
    spilled: int
    code: str

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix instructions in the code: mma and wgmma of PTX, mfma of AMD."""
        return len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|v_mfma_)", self.code))


class _Driver:
    """What the launcher of Triton asks of a device."""

    def __init__(self, target: GPUTarget, number: int) -> None:
        self._target = target
        self._number = number

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number  # kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiled_launches(target: str) -> Iterator[list[Compiled]]:
    """Within the block kernels are compiled for ``target`` and not run; the list grows with each launch."""
    launches: list[Compiled] = []
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(_describe(self.__name__, kernel))
        return kernel

    number = 1000 + list(TARGETS).index(target)
    with (
        mock.patch.object(driver, "_active", _Driver(TARGETS[target], number)),
        mock.patch.object(jit.JITFunction, "run", compile_only),
    ):
        yield launches


def _describe(name: str, kernel: Any) -> Compiled:
    cuda = "ptx" in kernel.asm
    code = kernel.asm["ptx" if cuda else "amdgcn"]
    spilled = _cuda_spills(kernel.asm["cubin"]) if cuda else _amd_spills(code)
    return Compiled(name, kernel.hash, kernel.metadata.shared, spilled, code)


def _cuda_spills(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources: {usage!r}")
    return sum(int(size) for size in found.groups())


def _amd_spills(code: str) -> int:
    found = re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)
    if found is None:
        raise RuntimeError("the AMD assembly names no private segment")
    return int(found[1])
