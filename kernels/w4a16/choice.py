"""Which implementation is fastest for a shape and a number of rows: measured once on a device and kept on disk.

The idea is that of FlashDecoding++ (Hong et al. 2024, section 5): a model has few weight shapes, so each can be
measured beforehand, and the choice at run time is a look-up by the number of rows.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from specdec.files import write_atomically
from specdec.kernels.w4a16.weight import Int4Weight

DEFAULT_FOLDER = Path("~/.cache/specdec/w4a16")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of rows that are measured."""
_FORMAT = 1


def device_name(device: torch.device) -> str:
    """What a table holds for: a GPU's name, or a CPU's kind, instruction set and threads; and PyTorch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{platform.processor() or platform.machine()} {capability}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def shape_name(weight: Int4Weight, dtype: torch.dtype) -> str:
    """What an entry of a table holds for: the inputs' type, N, K, the group size and the kind of offsets."""
    kind = "zeros" if weight.has_zero_points else "minima"
    precision = str(dtype).removeprefix("torch.")
    return f"{precision} {weight.num_outputs}x{weight.num_inputs} group {weight.group_size} {kind}"


@dataclass
class ChoiceTable:
    """The fastest implementation by shape and rows, of one device.

    Attributes:
        device: as ``device_name`` gives it.
        entries: per ``shape_name``, numbers of rows, ascending, and the fastest implementation at each.
    """

    device: str
    entries: dict[str, dict[int, str]] = field(default_factory=dict)

    def best(self, weight: Int4Weight, dtype: torch.dtype, num_rows: int) -> str | None:
        """The fastest at the next larger number of rows measured, beyond them at the largest; None for other shapes."""
        measured = self.entries.get(shape_name(weight, dtype))
        if not measured:
            return None
        return measured[min((rows for rows in measured if rows >= num_rows), default=max(measured))]

    def add(self, weight: Int4Weight, dtype: torch.dtype, fastest: Mapping[int, str]) -> None:
        """Enter what ``measure`` found, in place of what there was for the shape."""
        self.entries[shape_name(weight, dtype)] = dict(sorted(fastest.items()))

    def path(self, folder: Path | None = None) -> Path:
        """The table's file."""
        digest = hashlib.sha256(self.device.encode()).hexdigest()[:16]
        return (folder or DEFAULT_FOLDER).expanduser() / f"{digest}.json"

    def save(self, folder: Path | None = None) -> Path:
        """Keep the table on disk, whole or not at all; returns its file."""
        path = self.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, json.dumps({"format": _FORMAT, "device": self.device, "entries": self.entries}, indent=1)
        )
        return path

    @classmethod
    def load(cls, device: torch.device, folder: Path | None = None) -> ChoiceTable:
        """The table kept for a device as it is now; empty where there is none, or the file is damaged."""
        table = cls(device_name(device))
        try:
            found = json.loads(table.path(folder).read_text(encoding="utf-8"))
            if found["format"] == _FORMAT and found["device"] == table.device:
                table.entries = {
                    str(shape): {
                        int(rows): str(name) for rows, name in sorted(by_rows.items(), key=lambda e: int(e[0]))
                    }
                    for shape, by_rows in found["entries"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            table.entries = {}
        return table


def measure(
    weight: Int4Weight,
    dtype: torch.dtype,
    run: Callable[[Tensor, Int4Weight, str], Tensor],
    candidates: Callable[[int], Sequence[str]],
    rows: Sequence[int] = ROWS,
    rounds: int = 9,
    seconds: Callable[[Callable[[], Tensor]], float] | None = None,
) -> dict[int, str]:
    """The fastest implementation for each number of rows, by the median of interleaved rounds.

    Args:
        weight: on the device to measure.
        dtype: of the inputs.
        run: ``run(inputs, weight, implementation)``.
        candidates: the implementations worth trying for a number of rows.
        rows: numbers of rows.
        rounds: samples of each; one more warms up, and one that raises there is left out.
        seconds: how long a call takes; by default the clock around it, the device waited for.

    Raises:
        RuntimeError: where every candidate raises.
    """
    seconds = seconds or _timer(weight.codes.device)
    fastest = {}
    for num_rows in rows:
        inputs = torch.randn(num_rows, weight.num_inputs, device=weight.codes.device, dtype=torch.float32).to(dtype)
        samples: dict[str, list[float]] = {}
        for name in candidates(num_rows):
            try:
                run(inputs, weight, name)
            except Exception as error:  # too much shared memory for this device, say
                failure = error
            else:
                samples[name] = []
        if not samples:
            raise RuntimeError(
                f"no implementation of w4a16 runs {num_rows} rows of {shape_name(weight, dtype)}"
            ) from failure
        for _ in range(rounds):
            for name, kept in samples.items():
                kept.append(seconds(partial(run, inputs, weight, name)))
        fastest[num_rows] = min(samples, key=lambda name: median(samples[name]))
    return fastest


def _timer(device: torch.device) -> Callable[[Callable[[], Tensor]], float]:
    def seconds(call: Callable[[], Tensor]) -> float:
        if device.type != "cuda":
            start = perf_counter()
            call()
            return perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The cache of the device holds a weight; a layer's is not there when its turn comes.
        torch.empty(1 << 28, dtype=torch.uint8, device=device).zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0

    return seconds
