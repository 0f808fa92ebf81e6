"""Acceptance by equality: the target chooses a token at a node, and a child that holds it is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.tree import TokenTree
from specdec.verifiers.base import TreeWalk, Verdict, Verifier


class GreedyVerifier(Verifier):
    """The target takes its most probable token; the text equals greedy decoding token for token."""

    name = "greedy"

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        walk = TreeWalk(tree, logits, batch)
        while walk.active:
            walk.choose(walk.scores().argmax(-1))
        return walk.verdict()


class CoupledVerifier(Verifier):
    """The target takes ``argmax(log p + g)``, g being Gumbel noise keyed by (seed, position).

    This samples from p exactly, and the text for a seed is the same with any drafter, tree or batch, or with none
    (Daliri et al. 2024, "Coupling without communication and drafter-invariant speculative decoding").
    """

    name = "coupled"
    coupled = True

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        walk = TreeWalk(tree, logits, batch)
        while walk.active:
            noise = torch.stack([row.noise.gumbel(len(row.tokens) + walk.depth) for row in batch.rows])
            walk.choose((walk.scores() + noise).argmax(-1))
        return walk.verdict()
