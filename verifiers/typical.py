"""Typical acceptance (Cai et al. 2024, Medusa, section 3.3.2): lossy, longer paths for plausible text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.sampling import log_probs
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict, Verifier, make_verdict


@dataclass(frozen=True)
class TypicalConfig:
    """Options of typical acceptance; the published defaults disagree, so both are explicit.

    Attributes:
        epsilon: a token at least this probable is accepted whatever the entropy.
        delta: scales the threshold ``delta * exp(-entropy)`` of uncertain positions.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")


class TypicalVerifier(Verifier):
    """Accept x where ``p(x) > min(epsilon, delta * exp(-H(p)))`` and keep the longest accepted path; NOT lossless.

    Of paths of equal length the more probable is kept. The bonus token is drawn from p at the path's end.
    """

    name = "typical"
    lossless = False
    coupled = True

    def __init__(self, config: TypicalConfig | None = None) -> None:
        self.config = config or TypicalConfig()

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        num_rows, num_nodes = tree.tokens.shape
        # What padding and virtual nodes hold is ignored; the root's token is a valid index.
        tokens = torch.where(tree.acceptable, tree.tokens, tree.tokens[:, :1])
        seen = None if batch.seen is None else tree.seen_on_paths(batch.seen).flatten(0, 1)
        flat = log_probs(logits.flatten(0, 1), batch.params, seen)
        logp = flat.view(num_rows, num_nodes, -1)
        entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)  # [B, N]
        threshold = torch.minimum(torch.tensor(self.config.epsilon), self.config.delta * torch.exp(-entropy)).log()

        parents = tree.parents.clamp(min=0)
        rows = torch.arange(num_rows, device=logits.device).unsqueeze(1)
        own = logp[rows, parents, tokens]  # log p of each node's token at its parent
        passes = tree.acceptable & (own > threshold.gather(1, parents))
        passes[:, 0] = True
        ancestors = tree.ancestors
        accepted = tree.valid & (passes.unsqueeze(1) | ~ancestors).all(-1)
        own = own.masked_fill(~passes, 0.0)
        own[:, 0] = 0.0
        joint = (ancestors * own.unsqueeze(1)).sum(-1)
        # Float64, or the depth's share of the sum would round the probabilities away.
        rank = torch.where(accepted, tree.depth * 1e6 + joint.double().clamp(min=-1e5), -torch.inf)
        best = rank.argmax(1)
        ends = best.tolist()

        # NaN at an inner node accepts none of its children, so only where a path ends is there anything to see.
        failed = logp[rows[:, 0], best].isnan().any(-1).tolist()
        nodes = [ancestors[index, end].nonzero().squeeze(1).tolist() for index, end in enumerate(ends)]
        bonus = []
        for index, (row, end) in enumerate(zip(batch.rows, ends, strict=True)):
            noise = row.noise.gumbel(len(row.tokens) + len(nodes[index]) - 1)
            bonus.append(int((logp[index, end] + noise).argmax()))
        longest = max(len(path) for path in nodes)
        path = torch.tensor([path + [0] * (longest - len(path)) for path in nodes], device=logits.device)
        return make_verdict(tree, path, [len(path) - 1 for path in nodes], bonus, failed)
