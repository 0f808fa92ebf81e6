"""Acceptance by equality: the target chooses a token at a node, and a child that holds it is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.kernels.accept import accept, noise_keys
from specdec.tree import PADDING, TokenTree
from specdec.verifiers.base import TreeWalk, Verdict, Verifier


class GreedyVerifier(Verifier):
    """The target takes its most probable token; the text equals greedy decoding token for token."""

    name = "greedy"

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        if batch.seen is None:
            return match_at_once(tree, logits)
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
        if batch.seen is None and not batch.params.filters:
            positions, levels = [len(row.tokens) for row in batch.rows], int(tree.draft_depth.max()) + 1
            keys = noise_keys([row.noise for row in batch.rows], positions, levels)
            return match_at_once(tree, logits, keys.to(logits.device), batch.params.temperature)
        walk = TreeWalk(tree, logits, batch)
        while walk.active:
            noise = torch.stack([row.noise.gumbel(len(row.tokens) + walk.depth) for row in batch.rows])
            walk.choose((walk.scores() + noise).argmax(-1))
        return walk.verdict()


def match_at_once(tree: TokenTree, logits: Tensor, keys: Tensor | None = None, temperature: float = 1.0) -> Verdict:
    """Matching where the logits are: the host waits for a device once, however deep the trees.

    Args:
        tree: the tree the target checked.
        logits: ``[B, N, V]``, nothing to be changed in them.
        keys: as ``specdec.kernels.accept.accept`` has them; greedy without.
        temperature: read with ``keys``.
    """
    found = accept(logits, tree.tokens, tree.parents.masked_fill(~tree.acceptable, PADDING), keys, temperature)
    drafted = tree.tokens.gather(1, found.path)
    rows = torch.cat([found.packed[:, :3], drafted], dim=1).tolist()
    counts = [row[0] for row in rows]
    failed = [bool(row[2]) for row in rows]
    tokens = [row[4 : 4 + row[0]] + ([] if bad else [row[1]]) for row, bad in zip(rows, failed, strict=True)]
    return Verdict(found.path[:, : max(counts) + 1], counts, tokens, failed)
