"""The least time a pass can take: bytes that must be read over the bandwidth they can be read with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.latency import measure_curve
from specdec.memory import storage_key, storages
from specdec.target import HFTarget

CURVE_NODES = (1, 4, 8, 16, 32, 64)
CURVE_CONTEXT = 512
_MIB = 2**20


@dataclass(frozen=True)
class Roofline:
    """What bounds a pass.

    Attributes:
        bandwidth_gb_s: read bandwidth, 1e9 bytes per second.
        weight_bytes: bytes of weights a pass reads.
        kv_bytes_per_token: bytes of keys and values per cached token.
    """

    bandwidth_gb_s: float
    weight_bytes: int
    kv_bytes_per_token: int

    def floor_ms(self, context_tokens: float) -> float:
        """Milliseconds to read the weights and that many cached tokens once."""
        return (self.weight_bytes + self.kv_bytes_per_token * context_tokens) / self.bandwidth_gb_s / 1e6


def measure_roofline(target: HFTarget) -> Roofline:
    """The bounds of a target on this machine, with the threads in use."""
    weights = weight_bytes(target.model)
    return Roofline(measure_bandwidth(target.device, weights), weights, kv_bytes_per_token(target))


def measure_bandwidth(device: torch.device, num_bytes: int, repeats: int = 5) -> float:
    """Read bandwidth in GB/s: the best of a few reads of a buffer as large as the weights, 64 MiB to 1 GiB.

    The size matters: what fits the last-level cache is read faster, weights as much as this buffer.
    """
    rows = max(64 * _MIB, min(num_bytes, 1024 * _MIB)) // (4 * 4096)
    buffer, vector = torch.ones(rows, 4096, device=device), torch.ones(4096, device=device)
    reads: tuple[Callable[[], Tensor], ...] = (buffer.sum, lambda: buffer @ vector)
    best = min(_seconds(read, device) for _ in range(repeats + 1) for read in reads)
    return buffer.nbytes / best / 1e9


def _seconds(read: Callable[[], Tensor], device: torch.device) -> float:
    _synchronise(device)
    start = perf_counter()
    read()
    _synchronise(device)
    return perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, shared storages once, less an input embedding table of its own.

    Of such a table a pass reads a row per token; a table tied to the output head is read whole. Of a mixture of
    experts all experts count, so that its fraction of the roofline is an upper bound.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = storages([*model.parameters(), *model.buffers()])
    if storage_key(embedding) != storage_key(head):
        sizes.pop(storage_key(embedding), None)
    return sum(sizes.values())


@torch.inference_mode()
def kv_bytes_per_token(target: HFTarget) -> int:
    """Bytes of keys and values per token, all layers together."""
    cache = target.new_cache(1, 1)
    target.extend([[0]], cache)
    return cache.num_bytes


def latency_curve(target: HFTarget, repeats: int = 5) -> list[tuple[int, float]]:
    """Pairs of tree nodes and milliseconds of a pass, over 512 cached tokens or what the model's context has."""
    curve = measure_curve(target, CURVE_NODES, (CURVE_CONTEXT,), (1,), rounds=repeats)
    return [(nodes, curve.at(nodes, length=CURVE_CONTEXT)) for nodes in curve.nodes]
