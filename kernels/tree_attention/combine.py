"""Parts of one softmax, attended to separately, put together exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(parts: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys as attention over their union (Juravsky et al. 2024, Hydragen, section 3.1).

    Args:
        parts: pairs of output ``[..., d_v]`` and log-sum-exp ``[...]`` of its scores, -inf for an empty set.
        dtype: of the output.

    Returns:
        The output in ``dtype`` and the log-sum-exp of the union; 0 and -inf where all sets are empty.
    """
    lse = torch.stack([part[1] for part in parts])
    best = lse.amax(0)
    weights = (lse - best.masked_fill(best == -torch.inf, 0.0)).exp()
    total = weights.sum(0)
    compute = torch.promote_types(dtype, torch.float32)
    out = sum((w.unsqueeze(-1) * part[0].to(compute) for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
    out = out / total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(-1)
    return out.to(dtype), best + total.log().masked_fill(total == 0, 0.0)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Outputs ``[B, H, n, d_v]`` once a key without value, of logit ``sinks[h]``, takes its share of the softmax."""
    share = torch.sigmoid(lse - sinks.to(lse.dtype).view(-1, 1))  # [B, H, n]
    return (out.to(share.dtype) * share.unsqueeze(-1)).to(out.dtype)
