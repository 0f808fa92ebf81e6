"""Growing a tree by joint confidence, level by level (EAGLE-2, Li et al. 2024, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import nlargest

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.kernels.decoder_layer import MOST_TOP, find_kernels
from specdec.tree import PADDING, ROOT, TokenTree

Expand = Callable[[TokenTree, int, int], tuple[Tensor, Tensor]]
"""Children of the nodes expanded last.

Called with the tree of all nodes expanded so far, the column its newest level starts at, and the depth of the children
wanted (1 for those of the root). Returns log-confidences ``[B, n, k]``, at most 0, and token ids ``[B, n, k]`` of k
children for each of the n nodes from that column on; ``-inf`` marks a child that is none.
"""

MOST_LISTED = 16
"""Rows up to which trees grow in lists on the host."""


def grow(pending: Tensor, depth: int, width: int, max_nodes: int, expand: Expand) -> TokenTree:
    """The ``max_nodes`` best nodes by joint confidence among all children of the nodes expanded.

    At each depth the ``width`` best nodes are expanded; all their children are candidates. As confidence only falls
    along a path, the chosen nodes are closed under ancestors. Growth ends early where no deeper node can be chosen.

    Args:
        pending: ``[B]`` the roots.
        depth: deepest nodes, >= 1.
        width: nodes expanded per depth, >= 1.
        max_nodes: most nodes of a tree, root included.
        expand: says what children a node has.
    """
    if pending.device.type == "cpu" and len(pending) <= MOST_LISTED:
        return grow_in_lists(pending, depth, width, max_nodes, expand)
    return grow_on_device(pending, depth, width, max_nodes, expand)


def grow_in_lists(pending: Tensor, depth: int, width: int, max_nodes: int, expand: Expand) -> TokenTree:
    """``grow`` on the host: of a few rows, the candidates of a level are less work than calls about them."""
    expanded = TokenTree.from_pending(pending)
    rows = [_Candidates(token) for token in pending.tolist()]
    first = 0
    for level in range(1, depth + 1):
        log_confidence, children = expand(expanded, first, level)
        for row, scores, tokens in zip(rows, log_confidence.tolist(), children.tolist(), strict=True):
            row.add(scores, tokens)
        if level == depth:
            break
        promising = [row.advance(width, max_nodes) for row in rows]
        if not any(promising):
            break
        first = expanded.num_nodes
        expanded = TokenTree(
            torch.tensor([row.expanded_tokens for row in rows]), torch.tensor([row.expanded_parents for row in rows])
        )
    best = [row.best(max_nodes) for row in rows]
    tokens, parents = (torch.tensor([part[index] for part in best]) for index in (0, 1))
    confidence = torch.tensor([[math.exp(each) for each in part[2]] for part in best])
    return TokenTree(tokens, parents, confidence=confidence).compact()


class _Candidates:
    """One row's: the root and all children of the nodes expanded.

    Args:
        pending: the root's token.
    """

    def __init__(self, pending: int) -> None:
        self._tokens, self._parents, self._joint = [pending], [ROOT], [0.0]
        self._frontier = [0]  # candidates to expand
        self.expanded_tokens, self.expanded_parents = [pending], [ROOT]
        self._column = {0: 0}  # of expanded candidates among them
        self._new = 0  # where the newest level's candidates start

    def add(self, log_confidence: list[list[float]], tokens: list[list[int]]) -> None:
        """Children of the frontier's nodes, ``[n][k]``."""
        self._new = len(self._joint)
        for candidate, scores, children in zip(self._frontier, log_confidence, tokens, strict=True):
            above = self._joint[candidate]
            self._joint += [above + score for score in scores]
            self._tokens += children
            self._parents += [candidate] * len(children)

    def advance(self, width: int, max_nodes: int) -> bool:
        """Take the best new candidates as the next frontier; whether one of them could have a child that is chosen."""
        new = range(self._new, len(self._joint))
        self._frontier = nlargest(width, new, key=self._joint.__getitem__)
        for candidate in self._frontier:
            possible = self._joint[candidate] > -math.inf
            self._column[candidate] = len(self.expanded_tokens)
            self.expanded_tokens.append(self._tokens[candidate])
            self.expanded_parents.append(self._column[self._parents[candidate]] if possible else PADDING)
        return len(self._joint) <= max_nodes or nlargest(max_nodes, self._joint)[-1] <= self._joint[self._frontier[0]]

    def best(self, max_nodes: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and log-confidence of the ``max_nodes`` best, the best first; impossible ones are padding."""
        # Ties go to the earlier one, so that a parent never loses to its child.
        order = nlargest(max_nodes, range(len(self._joint)), key=self._joint.__getitem__)
        place = {candidate: column for column, candidate in enumerate(order)}
        place[ROOT] = ROOT
        parents = [place[self._parents[each]] if self._joint[each] > -math.inf else PADDING for each in order]
        return [self._tokens[each] for each in order], parents, [self._joint[each] for each in order]


def grow_on_device(pending: Tensor, depth: int, width: int, max_nodes: int, expand: Expand) -> TokenTree:
    """``grow`` where the logits are."""
    expanded = TokenTree.from_pending(pending)
    tokens, parents = [expanded.tokens], [expanded.parents]  # of all candidates, the root first
    joint = torch.zeros(pending.shape[0], 1, device=pending.device)  # [B, C]
    place = torch.zeros_like(expanded.tokens)  # [B, E] column of an expanded node among the candidates
    frontier, first = joint, 0  # [B, n] log-confidence of the nodes to expand, and the column they start at
    for level in range(1, depth + 1):
        log_confidence, children = expand(expanded, first, level)
        branching = children.shape[2]
        scores = (frontier.unsqueeze(-1) + log_confidence).flatten(1)  # [B, n * k]
        impossible = scores.isneginf()
        tokens.append(children.flatten(1))
        parents.append(place[:, first:].repeat_interleave(branching, dim=1).masked_fill(impossible, PADDING))
        seen = joint.shape[1]
        joint = torch.cat([joint, scores], dim=1)
        if level == depth:
            break
        frontier, best = scores.topk(min(width, scores.shape[1]), dim=1)
        if joint.shape[1] > max_nodes and bool((joint.topk(max_nodes, dim=1).values[:, -1] > frontier[:, 0]).all()):
            break
        above = (first + best // branching).masked_fill(frontier.isneginf(), PADDING)
        first = expanded.num_nodes
        expanded = TokenTree(
            torch.cat([expanded.tokens, tokens[-1].gather(1, best)], dim=1),
            torch.cat([expanded.parents, above], dim=1),
        )
        place = torch.cat([place, seen + best], dim=1)
    candidates = TokenTree(torch.cat(tokens, dim=1), torch.cat(parents, dim=1), confidence=joint.float().exp())
    return _best(candidates, joint, max_nodes)


def _best(tree: TokenTree, joint: Tensor, max_nodes: int) -> TokenTree:
    """The ``max_nodes`` nodes of highest joint confidence, the best first."""
    count = min(max_nodes, tree.num_nodes)
    # Ties go to the earlier column, so that a parent never loses to its child.
    order = joint.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return tree.select(order, tree.valid.gather(1, order)).compact()


def rank(
    batch: Batch, logits: Tensor, count: int, tree: TokenTree, first: int, level: int, vocabulary: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best children by the draft's own logits, as the target will choose: what ``Expand`` returns.

    Sampling parameters apply as they do to the target's logits. Where the policy's choice is coupled to the rows'
    noise, the same noise ranks the candidates (Daliri et al. 2024).

    Args:
        batch: the rows.
        logits: ``[B, n, V']`` at the nodes ``first`` to ``first + n`` of ``tree``; the same for all where n is 1.
        count: children per node.
        tree: the tree of expanded nodes.
        first: column of the first node.
        level: depth of the children.
        vocabulary: ``[V']`` int64, token ids the logits are for; None where they are for all.
    """
    top = min(count, logits.shape[-1])
    kernels = find_kernels() if logits.device.type == "cpu" and batch.ranks_logits else None
    if kernels is not None and top <= MOST_TOP and logits.dtype in (torch.bfloat16, torch.float32):
        values, indices, total = kernels.top(logits.contiguous(), top)
        return values - total.unsqueeze(-1), indices if vocabulary is None else vocabulary[indices]
    seen = None
    if batch.seen is not None:
        nodes = torch.arange(first, first + logits.shape[1], device=logits.device)
        seen = tree.seen_on_paths(batch.seen.to(logits.device), nodes)
        seen = seen if vocabulary is None else seen[..., vocabulary]
    scores = batch.scores(logits, seen)
    if batch.coupled:
        noise = batch.noise(level - 1).to(logits.device)
        scores = scores + (noise if vocabulary is None else noise[:, vocabulary]).unsqueeze(1)
    best = scores.topk(top, dim=-1)
    log_confidence = best.values - scores.logsumexp(-1, keepdim=True)
    return log_confidence, best.indices if vocabulary is None else vocabulary[best.indices]
