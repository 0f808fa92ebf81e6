"""Matching in one go decides what the walk decides: random trees, repeated siblings, padding, virtual nodes, NaN."""

from __future__ import annotations

import pytest
import torch
from unit_rows import make_batch

from specdec.sampling import SamplingParams
from specdec.tree import PADDING, TokenTree
from specdec.verifiers.base import TreeWalk
from specdec.verifiers.match import accept_by_kernel

VOCAB = 5


@pytest.mark.parametrize("seed", range(40))
def test_it_decides_what_the_walk_decides(seed: int) -> None:
    torch.manual_seed(seed)
    rows, nodes = 3, 1 + seed % 9
    tokens = torch.randint(0, VOCAB, (rows, nodes))
    parents = torch.stack(
        [torch.tensor([-1] + [int(torch.randint(0, k, ())) for k in range(1, nodes)]) for _ in range(rows)]
    )
    virtual = torch.zeros(rows, nodes, dtype=torch.bool)
    if nodes > 2:
        parents[0, -1] = PADDING
        virtual[1, -1] = True
    tree = TokenTree(tokens, parents, virtual, torch.zeros(rows, nodes, 2))
    logits = torch.randn(rows, nodes, VOCAB)
    if seed % 4 == 0:
        logits[2, seed % nodes, 1] = torch.nan
    batch = make_batch([[3], [4], [1]], VOCAB, SamplingParams(temperature=0.0))
    walk = TreeWalk(tree, logits, batch)
    while walk.active:
        walk.choose(walk.scores().argmax(-1))
    walked, found = walk.verdict(), accept_by_kernel(tree, logits, batch, coupled=False)
    assert found.num_accepted == walked.num_accepted
    assert found.failed == walked.failed
    assert found.tokens == walked.tokens
    for row, count in enumerate(walked.num_accepted):
        assert torch.equal(found.path[row, : count + 1], walked.path[row, : count + 1])
