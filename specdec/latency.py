"""L(n): how long a target's pass over n nodes takes on this machine, measured once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from specdec.drafters.weights import TargetFacts
from specdec.files import write_atomically
from specdec.kernels.build import source_digest
from specdec.kernels.decoder_layer import SOURCE
from specdec.kv_cache import KVCache
from specdec.panels import PanelWeight
from specdec.target import HFTarget
from specdec.tree import ROOT, TokenTree

NODES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (128, 512, 2048)
BATCHES = (1, 4)
DEFAULT_FOLDER = Path("~/.cache/specdec/latency")
SECONDS = 20.0
"""How long a measurement goes on taking further samples."""

_FORMAT = 1


@dataclass(frozen=True)
class LatencyCurve:
    """Milliseconds of a pass by batch size, cached tokens per row and nodes per row.

    Attributes:
        nodes: ascending.
        lengths: ascending.
        batches: ascending.
        milliseconds: ``[batches][lengths][nodes]``.

    Raises:
        ValueError: where an axis does not ascend from at least 1 (lengths: 0), the sizes do not fit, or a time is not
            a positive number.
    """

    nodes: tuple[int, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    milliseconds: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        for name, axis, least in (("nodes", self.nodes, 1), ("lengths", self.lengths, 0), ("batches", self.batches, 1)):
            if not axis or axis[0] < least or list(axis) != sorted(set(axis)):
                raise ValueError(f"{name} must ascend from at least {least}, got {list(axis)}")
        sizes = {(len(self.milliseconds), len(table), len(row)) for table in self.milliseconds for row in table}
        if sizes != {(len(self.batches), len(self.lengths), len(self.nodes))}:
            raise ValueError(
                f"milliseconds must be [{len(self.batches)}][{len(self.lengths)}][{len(self.nodes)}], got {sizes}"
            )
        for value in (value for table in self.milliseconds for row in table for value in row):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a pass takes a positive number of milliseconds, got {value}")

    @classmethod
    def simple(cls, milliseconds: dict[int, float]) -> LatencyCurve:
        """The curve of one batch size and length: nodes -> milliseconds."""
        nodes = tuple(sorted(milliseconds))
        return cls(nodes, (0,), (1,), ((tuple(milliseconds[n] for n in nodes),),))

    def at(self, nodes: float, batch: float = 1, length: float = 0) -> float:
        """Milliseconds, linear between what was measured and beyond it; below it as at its least.

        Where one batch size was measured, rows count alike: a batch of 4 with 2 nodes each as one row of 8.
        """
        if len(self.batches) == 1:
            nodes, batch = nodes * batch / self.batches[0], self.batches[0]
            if len(self.lengths) == 1:
                return _line(self.nodes, self.milliseconds[0][0], nodes)
        by_batch = []
        for table in self.milliseconds:
            by_length = [_line(self.nodes, row, nodes) for row in table]
            by_batch.append(_line(self.lengths, by_length, length))
        return _line(self.batches, by_batch, batch)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatencyCurve:
        """The curve that ``to_json`` described; raises ValueError where the values are none."""
        try:
            table = tuple(tuple(tuple(map(float, row)) for row in plane) for plane in values["milliseconds"])
            nodes, lengths, batches = (tuple(map(int, values[name])) for name in ("nodes", "lengths", "batches"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this describes no latency curve: {error!r}") from error
        return cls(nodes, lengths, batches, table)


def _line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Piecewise linear; constant below the first x, and beyond the last as between the last two, never falling."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    right = min(bisect_right(xs, x), len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    slope = (y1 - y0) / (x1 - x0)
    return y1 + max(slope, 0.0) * (x - x1) if x > x1 else y0 + slope * (x - x0)


@dataclass(frozen=True)
class LatencyKey:
    """What a curve holds for; where any of it changes, it is measured anew.

    Attributes:
        device: the processor's name.
        kernels: digest of the compiled layers' source, the compiler's flags and the CPU's instructions; "" elsewhere.
        threads: of a CPU; 0 elsewhere.
        torch: version.
        architecture: the model's class.
        fingerprint: of its weights, the same in every precision.
        precision: the weights' dtype.
        backend: which modules run: packed or quantized layers change it.
    """

    device: str
    kernels: str
    threads: int
    torch: str
    architecture: str
    fingerprint: str
    precision: str
    backend: str

    @classmethod
    def of(cls, target: HFTarget) -> LatencyKey:
        """The key of a target as it runs now."""
        on_cpu = target.device.type == "cpu"
        facts = TargetFacts.of(target)
        kinds = Counter(_kind(module) for module in target.model.modules())
        backend = hashlib.sha256(repr(sorted(kinds.items())).encode()).hexdigest()[:12]
        return cls(
            device=_cpu_name() if on_cpu else torch.cuda.get_device_name(target.device),
            kernels=source_digest(SOURCE) if on_cpu else "",
            threads=torch.get_num_threads() if on_cpu else 0,
            torch=torch.__version__,
            architecture=facts.architecture,
            fingerprint=facts.fingerprint,
            precision=str(target.dtype).removeprefix("torch."),
            backend=f"{type(target).__name__}-{backend}{'' if target.kv_bits is None else f'-kv{target.kv_bits}'}",
        )

    def path(self, folder: Path | None = None) -> Path:
        """The file of the curve."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return (folder or DEFAULT_FOLDER).expanduser() / f"{digest}.json"


def _kind(module: nn.Module) -> str:
    """A module's class and what it holds: quantizers may leave the class and change the weight's."""
    held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tensors = sorted(f"{name}:{type(tensor).__name__}:{tensor.dtype}" for name, tensor in held)
    if isinstance(module, PanelWeight):
        tensors.append(f"groups of {module.group}")
    return f"{type(module).__module__}.{type(module).__name__}({', '.join(tensors)})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load_curve(key: LatencyKey, folder: Path | None = None) -> LatencyCurve | None:
    """The curve on disk for a key; None where there is none, or the file is damaged or of another key."""
    try:
        found = json.loads(key.path(folder).read_text(encoding="utf-8"))
        if found["format"] != _FORMAT or found["key"] != asdict(key):
            return None
        return LatencyCurve.from_json(found["curve"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_curve(curve: LatencyCurve, key: LatencyKey, folder: Path | None = None) -> Path:
    """Keep a curve on disk; returns its file."""
    path = key.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"format": _FORMAT, "key": asdict(key), "curve": curve.to_json()}, indent=1))
    return path


@torch.inference_mode()
def measure_curve(
    target: HFTarget,
    nodes: Sequence[int] = NODES,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = BATCHES,
    rounds: int = 7,
    seconds: float = SECONDS,
) -> LatencyCurve:
    """Milliseconds of passes over stars of n nodes, the lower quartile of some.

    A round takes every combination once, so that a slow spell of the machine touches all of them alike; what others do
    on it only adds to a time. The first round warms up and is not counted. What the model's context has no room for is
    left out.

    Args:
        target: the model.
        nodes: per row.
        lengths: cached tokens per row; their values do not matter, so nothing is prefilled.
        batches: rows.
        rounds: samples per combination.
        seconds: no further round begins after that; the second one always does.
    """
    limit = target.max_context
    nodes = [n for n in nodes if limit is None or n < limit]
    longest = None if limit is None else limit - nodes[-1]
    lengths = sorted({length if longest is None else max(1, min(length, longest)) for length in lengths})
    samples: dict[tuple[int, int, int], list[float]] = {}
    start = perf_counter()
    trees = {n: star(n, target.vocab_size, target.device) for n in nodes}
    for round_ in range(rounds + 1):
        for batch in batches:
            cache = target.new_cache(batch, lengths[-1] + nodes[-1])
            target.extend([[0]] * batch, cache)
            for length in lengths:
                cache.advance([length - cache.max_length] * batch)
                for n in nodes:
                    ms = _pass_ms(target, trees[n], cache)
                    if round_ > 0:
                        samples.setdefault((batch, length, n), []).append(ms)
        if round_ > 0 and perf_counter() - start > seconds:
            break

    def quartile(values: list[float]) -> float:
        return sorted(values)[len(values) // 4]

    table = tuple(tuple(tuple(quartile(samples[b, k, n]) for n in nodes) for k in lengths) for b in batches)
    return LatencyCurve(tuple(nodes), tuple(lengths), tuple(batches), table)


def star(nodes: int, vocab_size: int, device: torch.device) -> TokenTree:
    """A tree of one row whose nodes all hang below the root."""
    tokens = torch.arange(nodes, device=device).unsqueeze(0) % vocab_size
    parents = torch.zeros_like(tokens)
    parents[:, 0] = ROOT
    return TokenTree(tokens, parents)


def _pass_ms(target: HFTarget, tree: TokenTree, cache: KVCache) -> float:
    size = cache.batch_size  # a new tree each time: what it derives from its parents is part of a pass
    tree = TokenTree(tree.tokens.repeat(size, 1), tree.parents.repeat(size, 1))
    _synchronise(target.device)
    start = perf_counter()
    target.forward(tree, cache)
    _synchronise(target.device)
    return 1000.0 * (perf_counter() - start)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
