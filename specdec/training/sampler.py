"""Plain sampling of many rows at once, for writing texts: nobody drafts, so nothing has to be coupled to positions."""

from __future__ import annotations

import torch

from specdec.batch import Batch
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict, Verifier, make_verdict

MOST_CANDIDATES = 256
"""Tokens looked at in a row; a nucleus that holds more is cut to them. Sorting a whole vocabulary takes longer than
the target's pass."""


class BatchSampler(Verifier):
    """Draws every row's next token at the call's temperature and top-p from one generator.

    Args:
        seed: of the generator; the same calls on the same machine give the same text.
    """

    name = "sampling"

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def accept(self, tree: TokenTree, logits: torch.Tensor, batch: Batch) -> Verdict:
        if tree.num_nodes != 1:
            raise ValueError(
                f"this sampler checks no drafts: use it with drafter 'none', not trees of {tree.num_nodes}"
            )
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        scores = logits[:, 0].float() / batch.params.temperature  # [B, V]
        failed = scores.isnan().any(-1)
        best, ids = scores.nan_to_num(0.0).topk(min(MOST_CANDIDATES, scores.shape[-1]))  # [B, C]
        probs = (best - scores.nan_to_num(0.0).logsumexp(-1, keepdim=True)).exp()
        outside = probs.cumsum(-1) - probs >= batch.params.top_p  # the mass before a token already reaches top_p
        outside[:, 0] = False
        chosen = torch.multinomial(probs.masked_fill(outside, 0.0), 1, generator=self._generator)
        tokens = ids.gather(1, chosen).squeeze(1).tolist()
        root = torch.zeros(len(batch), 1, dtype=torch.int64, device=tree.tokens.device)
        return make_verdict(tree, root, [0] * len(batch), tokens, failed.tolist())
