"""Growing a tree by joint confidence, level by level (EAGLE-2, Li et al. 2024, section 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.sampling import filter_logits
from specdec.tree import PADDING, TokenTree

Expand = Callable[[TokenTree, int, int], tuple[Tensor, Tensor]]
"""Children of the nodes expanded last.

Called with the tree of all nodes expanded so far, the column its newest level starts at, and the depth of the children
wanted (1 for those of the root). Returns log-confidences ``[B, n, k]``, at most 0, and token ids ``[B, n, k]`` of k
children for each of the n nodes from that column on; ``-inf`` marks a child that is none.
"""


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
    seen = None
    if batch.seen is not None:
        nodes = torch.arange(first, first + logits.shape[1], device=logits.device)
        seen = tree.seen_on_paths(batch.seen.to(logits.device), nodes)
        seen = (seen if vocabulary is None else seen[..., vocabulary]).flatten(0, 1)
    scores = filter_logits(logits.flatten(0, 1), batch.params, seen).view(logits.shape)
    if batch.coupled:
        noise = torch.stack([row.noise.gumbel(len(row.tokens) + level - 1) for row in batch.rows]).to(logits.device)
        scores = scores + (noise if vocabulary is None else noise[:, vocabulary]).unsqueeze(1)
    best = scores.topk(min(count, scores.shape[-1]), dim=-1)
    log_confidence = best.values - scores.logsumexp(-1, keepdim=True)
    return log_confidence, best.indices if vocabulary is None else vocabulary[best.indices]
