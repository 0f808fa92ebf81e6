"""Passes a drafter was not asked about, kept until it is asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.target import Feature, TargetOutput
from specdec.tree import PADDING, ROOT, TokenTree, on_path
from specdec.verifiers.base import Verdict

MOST_NODES = 32
"""Nodes kept, rows times passes: their logits are held meanwhile."""

MOST_STATES = 1024
"""The same where logits are not held: hidden states are small."""

Observe = Callable[[TokenTree, TargetOutput, Verdict], None]


class MissedPasses:
    """Several passes as one: a chain of the tokens that were accepted, whatever else was checked with them.

    A drafter that reads hidden states learns from many tokens at once for little more than from a single one.

    Args:
        logits: keep the target's logits; else they are ``[B, N, 0]`` when handed over.
    """

    def __init__(self, logits: bool = True) -> None:
        self._logits = logits
        self._none: Tensor | None = None
        self.num_nodes = 0
        """Nodes kept, those of all rows."""
        self._passes: list[tuple[TokenTree, TargetOutput, Verdict]] = []

    def add(
        self, tree: TokenTree, output: TargetOutput, verdict: Verdict, features: Sequence[Feature] | None = None
    ) -> None:
        """Remember a pass, with these of its features, or all."""
        kept = output.features if features is None else {name: output.features[name] for name in features}
        if self._passes:  # of all but the last, what was not accepted is dropped
            last = self._passes[-1]
            self._passes[-1] = _on_its_path(*last)
            self.num_nodes += self._passes[-1][0].tokens.numel() - last[0].tokens.numel()
        self._passes.append((tree, TargetOutput(self._kept(output.logits), kept), verdict))
        self.num_nodes += tree.tokens.numel()

    @property
    def num_states(self) -> int:
        """Nodes of them that were accepted, which a drafter will read."""
        return sum(sum(verdict.num_accepted) + len(verdict.num_accepted) for _, _, verdict in self._passes)

    def _kept(self, logits: Tensor) -> Tensor:
        """These logits, or none of them: not a view, which would keep their memory."""
        if self._logits:
            return logits
        if self._none is None or self._none.shape[:-1] != logits.shape[:-1]:
            self._none = logits.new_empty(*logits.shape[:-1], 0)
        return self._none

    @property
    def full(self) -> bool:
        """Whether it is time to hand over what there is."""
        return self.num_nodes >= (MOST_NODES if self._logits else MOST_STATES)

    def hand_over(self, observe: Observe) -> None:
        """Show what was missed, if anything, and forget it: a single pass as it was."""
        passes, self._passes, self.num_nodes = self._passes, [], 0
        if len(passes) == 1:
            observe(*passes[0])
        elif passes:
            observe(*_chain(passes))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in the order given."""
        index = torch.tensor(list(rows))
        self._passes = [
            (
                TokenTree(tree.tokens[index], tree.parents[index]),
                TargetOutput(output.logits[index], {name: state[index] for name, state in output.features.items()}),
                Verdict(
                    verdict.path[index],
                    [verdict.num_accepted[row] for row in rows],
                    [verdict.tokens[row] for row in rows],
                    [verdict.failed[row] for row in rows],
                ),
            )
            for tree, output, verdict in self._passes
            if len(rows)
        ]
        self.num_nodes = sum(tree.tokens.numel() for tree, _, _ in self._passes)


def _chain(passes: Sequence[tuple[TokenTree, TargetOutput, Verdict]]) -> tuple[TokenTree, TargetOutput, Verdict]:
    """Accepted paths, one behind the other."""
    trees, outputs, verdicts = zip(*passes, strict=True)
    tokens = torch.cat([tree.tokens for tree in trees], dim=1)
    logits = torch.cat([output.logits for output in outputs], dim=1)
    features = {name: torch.cat([out.features[name] for out in outputs], dim=1) for name in outputs[0].features}
    output = TargetOutput(logits, features)
    emitted = [[token for verdict in verdicts for token in verdict.tokens[row]] for row in range(len(tokens))]
    columns: list[list[int]] = [[] for _ in emitted]
    start = 0
    for tree, verdict in zip(trees, verdicts, strict=True):
        for row, path, count in zip(columns, verdict.path.tolist(), verdict.num_accepted, strict=True):
            row += [start + column for column in path[: count + 1]]
        start += tree.num_nodes
    lengths = [len(row) for row in columns]
    width = max(lengths)
    path = torch.tensor([row + [0] * (width - len(row)) for row in columns], device=tokens.device)
    tree, output = _gather(tokens, output, path, lengths)
    order = torch.arange(width, device=tokens.device).expand_as(path)
    return tree, output, Verdict(order, [length - 1 for length in lengths], emitted, verdicts[-1].failed)


def _on_its_path(tree: TokenTree, output: TargetOutput, verdict: Verdict) -> tuple[TokenTree, TargetOutput, Verdict]:
    """A pass as a chain of what was accepted."""
    if tree.num_nodes == 1:
        return tree, output, verdict
    lengths = [count + 1 for count in verdict.num_accepted]
    width = max(lengths)
    chain, kept = _gather(tree.tokens, output, verdict.path[:, :width], lengths)
    order = torch.arange(width, device=tree.tokens.device).expand(len(lengths), -1)
    return chain, kept, replace(verdict, path=order)


def _gather(
    tokens: Tensor, output: TargetOutput, path: Tensor, lengths: Sequence[int]
) -> tuple[TokenTree, TargetOutput]:
    """The chain of some columns ``[B, P]`` of each row, as many as its length; what is beyond is padding."""
    parents = torch.arange(ROOT, path.shape[1] - 1, device=tokens.device).expand_as(path)
    if min(lengths) < path.shape[1]:
        beyond = parents + 1 >= torch.tensor(lengths, device=tokens.device).unsqueeze(1)
        parents = parents.masked_fill(beyond, PADDING)
    features = {name: on_path(states, path) for name, states in output.features.items()}
    return TokenTree(on_path(tokens, path), parents), TargetOutput(on_path(output.logits, path), features)
