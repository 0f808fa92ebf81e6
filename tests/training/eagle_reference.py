"""EAGLE's module run over a whole text and, token by token, over a draft behind it: no cache, no tree, no batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.heads import OutputHead
from specdec.drafters.layer import Attend
from specdec.target import HFTarget
from specdec.tree import TokenTree

TREE = TokenTree(
    torch.tensor([[0, 11, 12, 13, 14, 15, 16, 17]]).repeat(2, 1),
    torch.tensor([[-1, 0, 0, 2, 1, 2, 5, 3], [-1, 0, 0, 1, 1, 2, 3, 4]]),
)
"""A tree for either of two rows; its levels start at columns 0, 1, 3 and 6."""
LEVELS = [(0, 1), (1, 3), (3, 6), (6, 8)]


def growing_attention() -> Attend:
    """Attention over everything seen so far: causal within a call, all of the calls before it."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        before = sum(keys.shape[2] for keys, _ in seen)
        seen.append((key, value))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
        visible = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(before)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, enable_gqa=True)

    return attend


@torch.no_grad()
def from_scratch(drafter: EagleDrafter, target: HFTarget, text: Sequence[int], path: Sequence[int]) -> Tensor:
    """``[V']`` logits after a draft ``path`` that follows ``text``."""
    module, table = drafter.module, target.model.get_input_embeddings().weight
    features = target.extend([text[:-1]], target.new_cache(1, len(text)), drafter.features).features
    attend = growing_attention()
    positions = torch.arange(len(text) - 1).unsqueeze(0)
    state = module(module.fuse(features), table[torch.tensor([text[1:]])], positions, attend)[:, -1:]
    for place, token in enumerate(path, len(text) - 1):
        state = module(state, table[torch.tensor([[token]])], torch.tensor([[place]]), attend)
    head: Any = module.output or OutputHead(target, module.vocabulary)
    logits: Tensor = head(module.read(state))[0, 0]
    return logits


def check_levels(
    drafter: EagleDrafter, target: HFTarget, texts: Sequence[Sequence[int]], which: Sequence[int] = (0, 1)
) -> None:
    """Logits at every node of ``TREE``, level by level, are those from scratch; ``which`` are the tree's rows."""
    rows = torch.tensor(which)
    for level, (start, end) in enumerate(LEVELS, 1):
        tree = TokenTree(TREE.tokens[rows][:, :end], TREE.parents[rows][:, :end])
        logits = drafter.logits(tree, start, level)
        assert logits.shape[:2] == (len(texts), end - start)
        for row, text in enumerate(texts):
            for column in range(start, end):
                node, path = column, []
                while node > 0:
                    path.append(int(tree.tokens[row, node]))
                    node = int(tree.parents[row, node])
                expected = from_scratch(drafter, target, text, path[::-1])
                torch.testing.assert_close(logits[row, column - start], expected, rtol=1e-9, atol=1e-9)
