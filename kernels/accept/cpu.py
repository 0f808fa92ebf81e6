"""Acceptance on the CPU: only nodes on the path are looked at, and each position's noise is made once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specdec.kernels.accept.acceptance import Acceptance
from specdec.sampling import keyed_gumbel


def accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None = None, temperature: float = 1.0
) -> Acceptance:
    """See ``specdec.kernels.accept.accept``."""
    _, num_nodes, vocab_size = logits.shape
    index = torch.arange(vocab_size)
    row_keys = None if keys is None else keys.tolist()
    rows = []
    for b, (drafted, above) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        children: dict[tuple[int, int], int] = {}
        for column in range(1, num_nodes):
            if above[column] >= 0:
                children.setdefault((above[column], drafted[column]), column)
        path = [0]
        while True:
            scores = logits[b, path[-1]]
            if row_keys is not None:
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
                scores = scores + keyed_gumbel(row_keys[b][len(path) - 1] & (1 << 64) - 1, index)
            best, bonus = scores.max(-1)  # NaN is the largest of all
            failed = math.isnan(float(best))
            child = None if failed else children.get((path[-1], int(bonus)))
            if child is None:
                rows.append((path, int(bonus), failed))
                break
            path.append(child)
    return Acceptance.from_rows(rows, num_nodes, logits.device)
