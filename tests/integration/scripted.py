"""Drafters that propose what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.tree import ROOT, TokenTree, TreeBuilder

Propose = Callable[[Batch], TokenTree]


@dataclass(frozen=True)
class NoOptions:
    """None."""


class ScriptedDrafter(Drafter):
    """Proposes what a function of the batch returns, and raises in the methods it is told to.

    Args:
        propose: the trees.
        raise_in: name of the method that raises.
        from_call: first call of that method that raises, counted from 1.
    """

    name = "scripted"
    Config = NoOptions

    def __init__(self, propose: Propose, raise_in: str = "", from_call: int = 1) -> None:
        self._propose = propose
        self._raise_in = raise_in
        self._left = from_call

    def _called(self, method: str) -> None:
        if method == self._raise_in:
            self._left -= 1
            if self._left <= 0:
                raise RuntimeError(f"planted in {method}")

    def start(self, *_: Any) -> None:
        self._called("start")

    def propose(self, batch: Batch) -> TokenTree:
        self._called("propose")
        return self._propose(batch)

    def observe(self, *_: Any) -> None:
        self._called("observe")

    def keep(self, *_: Any) -> None:
        self._called("keep")

    def stop(self) -> None:
        self._called("stop")


def per_row(fill: Callable[[TreeBuilder, int, list[int]], None], max_nodes: int = 500) -> Propose:
    """Trees made row by row: ``fill`` gets the builder, the row's prompt index and its tokens."""

    def propose(batch: Batch) -> TokenTree:
        builders = []
        for row in batch.rows:
            builder = TreeBuilder(row.pending, max_nodes)
            fill(builder, row.prompt_index, row.tokens)
            builders.append(builder)
        return TokenTree.from_rows(builders)

    return propose


def chain(path: Callable[[int, list[int]], Sequence[int]]) -> Propose:
    """One path per row, a function of prompt index and tokens."""
    return per_row(lambda builder, index, tokens: builder.add_path(path(index, tokens)))


def oracle(wholes: Sequence[Sequence[int]], depth: int = 6) -> Propose:
    """Always right: the next tokens of the known texts, prompts included."""
    return chain(lambda index, tokens: wholes[index][len(tokens) :][:depth])


def bush(wholes: Sequence[Sequence[int]], vocab_size: int, depth: int = 4) -> Propose:
    """The right path hidden behind decoys at every depth, so that accepted nodes are never contiguous.

    Rows differ in depth, number of decoys and, now and then, in where the right path ends.
    """

    def fill(builder: TreeBuilder, index: int, tokens: list[int]) -> None:
        node, turn = 0, len(tokens) * (2 * index + 1) // 2
        for level, token in enumerate(wholes[index][len(tokens) :][: 1 + turn % depth]):
            for decoy in range(1 + (turn + level) % 3):
                wrong = builder.add(node, (token + 1 + decoy) % vocab_size)
                assert wrong is not None
                builder.add(wrong, token)  # the right token in the wrong place
            right = builder.add(node, token)
            assert right is not None
            node = right

    return per_row(fill)


def star(batch: Batch) -> TokenTree:
    """Every token of the vocabulary under the root."""
    everything = torch.arange(batch.vocab_size).expand(len(batch), -1)
    tokens = torch.cat([batch.pending.unsqueeze(1), everything], dim=1)
    parents = torch.zeros_like(tokens)
    parents[:, 0] = ROOT
    return TokenTree(tokens, parents)


def empty(batch: Batch) -> TokenTree:
    """Nothing but the pending tokens."""
    return TokenTree.from_pending(batch.pending)
