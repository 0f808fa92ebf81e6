"""Random trees, of which the target would take some way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.accept import noise_keys
from specdec.kernels.accept.reference import node_depth, noise
from specdec.sampling import PositionNoise


@dataclass(frozen=True)
class AcceptCase:
    """Operands of one call; ``rows`` is the noise behind the keys, ``positions`` where each row's first choice is."""

    logits: Tensor
    tokens: Tensor
    parents: Tensor
    keys: Tensor | None
    temperature: float
    rows: list[PositionNoise]
    positions: list[int]

    def operands(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
        """The arguments of ``accept``."""
        keys = None if self.keys is None else self.keys.to(device)
        return self.logits.to(device), self.tokens.to(device), self.parents.to(device), keys, self.temperature


def accept_case(
    batch_size: int, num_nodes: int, vocab_size: int, dtype: torch.dtype, temperature: float | None, seed: int = 0
) -> AcceptCase:
    """Three nodes in five hold what is chosen at their parent; without a temperature it is chosen greedily."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_nodes, vocab_size, generator=generator).to(dtype)
    parents = torch.full((batch_size, num_nodes), -1)
    for b in range(batch_size):
        for column in range(1, num_nodes):
            parents[b, column] = int(torch.randint(max(0, column - 4), column, (), generator=generator))
    rows = [PositionNoise(0xFEDCBA9876543210 + b, torch.arange(vocab_size)) for b in range(batch_size)]
    positions = [3 + 1000 * b for b in range(batch_size)]
    keys = None
    scores = logits.float()
    if temperature is not None:
        depth = node_depth(parents)
        keys = noise_keys(rows, positions, int(depth.max()) + 1)
        scores = scores / temperature + noise(keys, depth, vocab_size)
    wanted = scores.argmax(-1).gather(1, parents.clamp(min=0))
    other = torch.randint(0, vocab_size, parents.shape, generator=generator)
    tokens = torch.where(torch.rand(parents.shape, generator=generator) < 0.6, wanted, other)
    return AcceptCase(logits, tokens, parents, keys, temperature or 1.0, rows, positions)
