"""Speculative sampling: draft tokens are accepted by comparing the target's and the draft's probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.batch import Batch, Row
from specdec.sampling import log_probs
from specdec.tree import SiblingSampling, TokenTree
from specdec.verifiers.base import Verdict, Verifier, make_verdict


@dataclass(frozen=True)
class RejectionConfig:
    """Options of the rejection policy.

    Attributes:
        siblings: how drafters that sample should draw the children of a node. Drafters that only rank candidates are
            served as well: a fixed candidate x is accepted with probability p(x).
    """

    siblings: SiblingSampling = "without_replacement"


class RejectionVerifier(Verifier):
    """Leviathan et al. 2023 (algorithm 1) for chains; siblings in turn as SpecInfer (Miao et al. 2024, section 4.3)
    when drawn with replacement and as Sequoia (Chen et al. 2024, section 3.2) when drawn without.
    """

    name = "rejection"

    def __init__(self, config: RejectionConfig | None = None) -> None:
        self.siblings = (config or RejectionConfig()).siblings

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        walks = [self._walk(tree, logits, batch, index) for index in range(len(batch))]
        longest = max(len(nodes) for nodes, _, _ in walks)
        path = torch.tensor([nodes + [0] * (longest - len(nodes)) for nodes, _, _ in walks], device=tree.tokens.device)
        return make_verdict(
            tree,
            path,
            [len(nodes) - 1 for nodes, _, _ in walks],
            [bonus for _, bonus, _ in walks],
            [failed for _, _, failed in walks],
        )

    def _walk(self, tree: TokenTree, logits: Tensor, batch: Batch, index: int) -> tuple[list[int], int, bool]:
        """One row's accepted columns (root first), bonus token, and whether its logits were NaN."""
        row = batch.rows[index]
        tokens, nodes = tree.tokens[index].tolist(), [0]
        seen = None if batch.seen is None else batch.seen[index].clone()
        while True:
            node = nodes[-1]
            p = log_probs(logits[index, node], row.params, seen).double().exp()
            if bool(p.isnan().any()):
                return nodes, 0, True
            position = len(row.tokens) + len(nodes) - 1
            accepted, residual = self._try_children(tree, index, node, p, row, position)
            if accepted is None:
                noise = row.noise.gumbel(position)
                return nodes, int((residual.log() + noise).argmax()), False
            nodes.append(accepted)
            if seen is not None:
                seen[tokens[accepted]] = True

    def _try_children(
        self, tree: TokenTree, index: int, node: int, p: Tensor, row: Row, position: int
    ) -> tuple[int | None, Tensor]:
        """The accepted child of a node, or None and the distribution left to draw the bonus token from."""
        q: Tensor | None = None
        if tree.draft_log_probs is not None and tree.siblings != "deterministic":
            q = tree.draft_log_probs[index, node].double().exp()
        for draw, child in enumerate(self._children(tree, index, node)):
            token = int(tree.tokens[index, child])
            if q is None:
                ratio = float(p[token])
            else:
                ratio = float(p[token] / q[token]) if float(q[token]) > 0 else 0.0
            if row.noise.uniform(position, draw) < ratio:
                return child, p
            if q is None:
                rest = p.clone()
                rest[token] = 0
            else:
                rest = (p - q).clamp(min=0)
                if tree.siblings == "without_replacement":
                    q[token] = 0
                    q = q / q.sum() if float(q.sum()) > 0 else q
            if float(rest.sum()) <= 0:  # p equals q up to rounding: rejection had probability 0
                break
            p = rest / rest.sum()
        return None, p

    @staticmethod
    def _children(tree: TokenTree, index: int, node: int) -> Iterator[int]:
        mine = (tree.parents[index] == node) & tree.acceptable[index]
        yield from mine.nonzero().squeeze(1).tolist()
