"""Passes a drafter was not asked about, kept until it is asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from specdec.target import TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

MOST_NODES = 32
"""Nodes kept, rows times passes: their logits are held meanwhile."""

Observe = Callable[[TokenTree, TargetOutput, Verdict], None]


class MissedPasses:
    """Plain passes as one: a chain of the tokens they were about, all of them accepted.

    A drafter that reads hidden states learns from many tokens at once for little more than from a single one.
    """

    def __init__(self) -> None:
        self._passes: list[tuple[TokenTree, TargetOutput, Verdict]] = []

    def add(self, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        """Remember a pass over a root alone."""
        self._passes.append((tree, output, verdict))

    @property
    def full(self) -> bool:
        """Whether it is time to hand over what there is."""
        return sum(tree.batch_size for tree, _, _ in self._passes) >= MOST_NODES

    def hand_over(self, observe: Observe) -> None:
        """Show what was missed, if anything, and forget it."""
        passes, self._passes = self._passes, []
        if passes:
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


def _chain(passes: Sequence[tuple[TokenTree, TargetOutput, Verdict]]) -> tuple[TokenTree, TargetOutput, Verdict]:
    trees, outputs, verdicts = zip(*passes, strict=True)
    tokens = torch.cat([tree.tokens for tree in trees], dim=1)
    columns = torch.arange(len(passes), device=tokens.device).expand_as(tokens)
    logits = torch.cat([output.logits for output in outputs], dim=1)
    features = {name: torch.cat([out.features[name] for out in outputs], dim=1) for name in outputs[0].features}
    emitted = [[token for verdict in verdicts for token in verdict.tokens[row]] for row in range(len(tokens))]
    verdict = Verdict(columns, [len(passes) - 1] * len(tokens), emitted, verdicts[-1].failed)
    return TokenTree(tokens, columns - 1), TargetOutput(logits, features), verdict
