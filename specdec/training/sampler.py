"""Plain sampling of many rows at once, for writing texts: nobody drafts, so nothing has to be coupled to positions."""

from __future__ import annotations

import torch

from specdec.batch import Batch
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict, Verifier, make_verdict

MOST_CANDIDATES = 256
"""Tokens looked at in a row; a nucleus that holds more is cut to them. Sorting a whole vocabulary takes longer than
the target's pass."""

_GROUP = 16
"""Tokens of a vocabulary that are searched together."""

_ROWS = 8
"""Rows whose scores exist in float32 at the same time."""


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
        best, ids, log_sums = candidates(logits[:, 0], batch.params.temperature)
        failed = log_sums.isnan()
        probs = (best - log_sums.unsqueeze(1)).exp().masked_fill(failed.unsqueeze(1), 1.0)
        outside = probs.cumsum(-1) - probs >= batch.params.top_p  # the mass before a token already reaches top_p
        outside[:, 0] = False
        # Drawn in the order of the call's rows, whichever places of the batch they have by now.
        row_ids = torch.tensor([row.row_id for row in batch.rows], device=logits.device)
        order = row_ids.argsort()
        drawn = torch.multinomial(probs.masked_fill(outside, 0.0)[order], 1, generator=self._generator)
        chosen = torch.empty_like(drawn)
        chosen[order] = drawn
        tokens = ids.gather(1, chosen).squeeze(1).tolist()
        root = torch.zeros(len(batch), 1, dtype=torch.int64, device=tree.tokens.device)
        return make_verdict(tree, root, [0] * len(batch), tokens, failed.tolist())


def candidates(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The highest scores of each row, and what normalises them.

    Args:
        logits: ``[B, V]``.
        temperature: above 0.

    Returns:
        ``[B, C]`` float32 scores, descending, ``[B, C]`` int64 tokens, and ``[B]`` float32 logarithms of the sum of the
        exponentials of all of a row's scores, NaN where a logit is.
    """
    vocab_size = logits.shape[1]
    count, groups = min(MOST_CANDIDATES, vocab_size), vocab_size // _GROUP
    if groups <= count:
        best, ids = logits.topk(count)
    else:
        # The C highest logits are in the C groups with the highest tops: far fewer to search than a vocabulary.
        tops = logits[:, : groups * _GROUP].reshape(-1, _GROUP, groups).amax(1)
        chosen = tops.topk(count, sorted=False).indices  # [B, C]
        members = (chosen.unsqueeze(2) + torch.arange(_GROUP, device=logits.device) * groups).flatten(1)
        rest = torch.arange(groups * _GROUP, vocab_size, device=logits.device).expand(len(logits), -1)
        members = torch.cat([members, rest], dim=1)
        best, place = logits.gather(1, members).topk(count)
        ids = members.gather(1, place)
    log_sums = torch.empty(len(logits), device=logits.device)
    for start in range(0, len(logits), _ROWS):  # few rows at a time stay in a core's cache
        scores = logits[start : start + _ROWS].float() / temperature
        top = scores.amax(1, keepdim=True)
        log_sums[start : start + _ROWS] = scores.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))
    return best.float() / temperature, ids, log_sums
