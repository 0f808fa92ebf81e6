"""Acceptance written out: the target's choice at every node first, then the walk."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.accept.acceptance import Acceptance
from specdec.sampling import keyed_gumbel


def accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None = None, temperature: float = 1.0
) -> Acceptance:
    """See ``specdec.kernels.accept.accept``."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if keys is not None:
        scores = scores / temperature + noise(keys, node_depth(parents), logits.shape[-1]).to(scores.device)
    num_nodes = logits.shape[1]
    choice, unknown = scores.argmax(-1).tolist(), scores.isnan().any(-1).tolist()
    rows = []
    for drafted, above, chosen, bad in zip(tokens.tolist(), parents.tolist(), choice, unknown, strict=True):
        path = [0]
        while not bad[path[-1]]:
            wanted = chosen[path[-1]]
            children = (c for c in range(1, num_nodes) if above[c] == path[-1] and drafted[c] == wanted)
            child = next(children, None)
            if child is None:
                break
            path.append(child)
        rows.append((path, chosen[path[-1]], bad[path[-1]]))
    return Acceptance.from_rows(rows, num_nodes, logits.device)


def node_depth(parents: Tensor) -> Tensor:
    """``[B, N]`` int64 on the host: edges from the root; 0 for nodes without a parent."""
    depth: list[list[int]] = []
    for row in parents.tolist():
        depth.append([])
        for parent in row:
            depth[-1].append(depth[-1][parent] + 1 if parent >= 0 else 0)
    return torch.tensor(depth)


def noise(keys: Tensor, depth: Tensor, vocab_size: int) -> Tensor:
    """``[B, N, V]`` float32 Gumbel noise on the host; each node has that of its depth."""
    index = torch.arange(vocab_size)
    levels = [[keyed_gumbel(key & (1 << 64) - 1, index) for key in row] for row in keys.tolist()]
    return torch.stack([torch.stack([row[d] for d in deep]) for row, deep in zip(levels, depth.tolist(), strict=True)])
