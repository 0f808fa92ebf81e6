"""Acceptance by equality: the target chooses a token at a node, and a child that holds it is accepted."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.kernels.accept import accept, cpu, noise_keys, serves
from specdec.kernels.accept.acceptance import NUM_FIELDS
from specdec.tree import TokenTree
from specdec.verifiers.base import TreeWalk, Verdict, Verifier


class MatchVerifier(Verifier):
    """What the two have in common: the whole walk in one go (``specdec.kernels.accept``).

    On a CPU not where logits have to be filtered: that is done for the nodes on the path alone.
    """

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        alike = batch.greedy or not any(row.params.greedy for row in batch.rows)
        plain = batch.seen is None and batch.uniform and (batch.greedy or not batch.params.filters)
        if alike and (serves(logits) or (plain and logits.device.type == "cpu")):
            return accept_by_kernel(tree, logits, batch, self.coupled and not batch.greedy)
        walk = TreeWalk(tree, logits, batch)
        while walk.active:
            walk.choose(self._choice(walk, batch))
        return walk.verdict()

    @abstractmethod
    def _choice(self, walk: TreeWalk, batch: Batch) -> Tensor:
        """``[B]`` int64, the token the target chooses at each row's node."""


class GreedyVerifier(MatchVerifier):
    """The target takes its most probable token; the text equals greedy decoding token for token."""

    name = "greedy"

    def _choice(self, walk: TreeWalk, batch: Batch) -> Tensor:
        return walk.scores().argmax(-1)


class CoupledVerifier(MatchVerifier):
    """The target takes ``argmax(log p + g)``, g being Gumbel noise keyed by (seed, position).

    This samples from p exactly, and the text for a seed is the same with any drafter, tree or batch, or with none
    (Daliri et al. 2024, "Coupling without communication and drafter-invariant speculative decoding"). Rows at
    temperature 0 have no noise: they take their most probable token beside others that sample.
    """

    name = "coupled"
    coupled = True

    def _choice(self, walk: TreeWalk, batch: Batch) -> Tensor:
        return (walk.scores() + batch.noise(walk.depth)).argmax(-1)


def accept_by_kernel(tree: TokenTree, logits: Tensor, batch: Batch, coupled: bool) -> Verdict:
    """The verdict of ``TreeWalk``, found where the logits are: one copy of a few numbers a row reaches the host.

    Args:
        tree: the tree the target checked.
        logits: ``[B, N, V]`` the target's logits at its nodes.
        batch: the rows, all of them greedy or none; not changed.
        coupled: add the rows' noise to the scores.
    """
    params, temperature = batch.params, batch.params.temperature or 1.0
    if batch.seen is not None or not batch.uniform or (params.filters and not params.greedy):
        seen = None if batch.seen is None else tree.seen_on_paths(batch.seen)
        logits, temperature = batch.scores(logits, seen), 1.0
    keys = None
    if coupled:  # made while the device is still busy with the pass
        positions = [len(row.tokens) for row in batch.rows]
        levels = tree.num_nodes if logits.device.type != "cpu" else 1 + max(deepest for _, deepest in tree.drafts)
        keys = noise_keys([row.noise for row in batch.rows], positions, levels).to(logits.device)
    parents = tree.parents if tree.virtual is None else tree.parents.masked_fill(~tree.acceptable, -1)
    if logits.device.type == "cpu" and not serves(logits):
        return _accept_on_cpu(tree, logits, parents, keys, temperature)
    found = accept(logits, tree.tokens, parents, keys, temperature)
    drafted = tree.tokens.gather(1, found.path)
    rows = torch.cat([found.packed[:, :NUM_FIELDS], drafted], dim=1).tolist()
    num_accepted, failed = [row[0] for row in rows], [bool(row[2]) for row in rows]
    tokens = [
        row[NUM_FIELDS + 1 : NUM_FIELDS + 1 + count] + ([] if bad else [row[1]])
        for row, count, bad in zip(rows, num_accepted, failed, strict=True)
    ]
    return Verdict(found.path[:, : max(num_accepted) + 1], num_accepted, tokens, failed)


def _accept_on_cpu(
    tree: TokenTree, logits: Tensor, parents: Tensor, keys: Tensor | None, temperature: float
) -> Verdict:
    """The same where the numbers are at hand: a few small tensors would take longer than the search."""
    found = cpu.accept(logits, tree.tokens, parents, keys, temperature)
    num_accepted, tokens, failures = [], [], []
    for drafted, (count, bonus, failed, *path) in zip(tree.tokens.tolist(), found.packed.tolist(), strict=True):
        num_accepted.append(count)
        tokens.append([drafted[column] for column in path[1 : count + 1]] + ([] if failed else [bonus]))
        failures.append(bool(failed))
    return Verdict(found.path[:, : max(num_accepted) + 1], num_accepted, tokens, failures)
