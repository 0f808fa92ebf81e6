"""Bytes: what tensors take, what is free, and sizes in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("i", 1024), ("", 1000))
}


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device; None where that is not known."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        pass
    limited = _container_bytes(Path("/sys/fs/cgroup"))
    if limited is not None:
        found.append(limited)
    return max(0, min(found)) if found else None


def _container_bytes(folder: Path) -> int | None:
    """Bytes a container's limit leaves; files that were read and can be dropped count as free. None without a limit."""
    try:
        limit, used, stat = (
            (folder / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        dropped = sum(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
        return int(limit) - int(used) + dropped
    except (OSError, ValueError, IndexError):
        return None


def parse_size(text: str | int) -> int:
    """Bytes from "2GiB", "500 MB" or a number; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = None if match is None else next((u for u in _UNITS if u.lower() == match[2].lower()), None)
    if match is None or unit is None or float(match[1]) == 0:
        raise ValueError(f"a size is a number above 0 and a unit, such as 2GiB or 500MB, got {text!r}")
    return int(float(match[1]) * _UNITS[unit])


def size_text(count: int | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "any amount"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count = count / 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


def storages(tensors: Iterable[Tensor]) -> dict[Any, int]:
    """Bytes by storage, shared ones once."""
    held = (part for tensor in tensors for part in _parts(tensor))
    return {storage_key(tensor): _num_bytes(tensor) for tensor in held if tensor.device.type != "meta"}


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages."""
    return sum(storages(tensors).values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's numbers: torchao's weights wrap several."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def storage_key(tensor: Tensor) -> Any:
    """What tensors that share their memory have in common."""
    # Packed layouts (oneDNN) have no storage to ask for.
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _num_bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.strided:
        return tensor.untyped_storage().nbytes()
    return tensor.numel() * tensor.element_size()
