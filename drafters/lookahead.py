"""Lookahead decoding (Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding").

The target guesses many positions at once by Jacobi iteration: within a pass that is run anyway, a *window* of W columns
holds guesses at the next W positions and, above them, what the target made of these guesses in the last N - 2 passes.
What it predicts at the top of a column completes an n-gram of tokens that it considers to follow each other, right or
wrong as they are about the text at hand. N-grams go into a pool under their first token; those that begin with the
pending token are the candidates of the next passes.

The window is a tree of virtual nodes below the root, so the tree's ancestor mask is the paper's mask (figure 5):

    root - g0[1] - g0[2] - ... - g0[W-1]        level 0: guesses at consecutive positions
     |       |       |               |
    g1[0]  g1[1]   g1[2]   ...    g1[W-1]       level 1: one position further, from the pass after
     ...

A node of level r in column c stands at distance c + r from the root and sees its own column below it and the columns of
level 0 up to c. A guess carries the target's own embedding of its token; it is never accepted and never kept.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.batch import Batch, Row
from specdec.drafters.base import Drafter
from specdec.target import HFTarget, TargetOutput
from specdec.tree import PADDING, TokenTree, TreeBuilder
from specdec.verifiers.base import Verdict


@dataclass(frozen=True)
class LookaheadConfig:
    """Options of lookahead decoding.

    Attributes:
        window: positions guessed at once, W.
        ngram: tokens of an n-gram, the one it is found by included, N; N - 1 levels of guesses ride in a pass.
        candidates: n-grams checked per pass, and kept per first token, G.
        pool: first tokens that a row has n-grams of; those of the one used longest ago go first.
        text: the n-grams of prompt and output go into the pool, too.
    """

    window: int = 6
    ngram: int = 4
    candidates: int = 4
    pool: int = 4096
    text: bool = True

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ngram", 2), ("candidates", 1), ("pool", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def max_nodes(self) -> int:
        """Most nodes of a pass: the window, of which the root is one, and candidates that share no token."""
        return (self.window + self.candidates) * (self.ngram - 1)


class NgramPool:
    """N-grams by their first token, bounded: what was used longest ago is forgotten first.

    Args:
        tokens: most first tokens. One is used when an n-gram of it is added, and when its n-grams are asked for.
        kept: most n-grams per first token. One is used when it is added.
    """

    def __init__(self, tokens: int, kept: int) -> None:
        self._tokens, self._kept = tokens, kept
        self._tails: OrderedDict[int, OrderedDict[tuple[int, ...], None]] = OrderedDict()

    def add(self, ngram: Sequence[int]) -> None:
        """Remember an n-gram; one that is there already becomes the most recent."""
        tails, tail = self._tails.setdefault(ngram[0], OrderedDict()), tuple(ngram[1:])
        tails[tail] = None
        tails.move_to_end(tail)
        self._tails.move_to_end(ngram[0])
        if len(tails) > self._kept:
            tails.popitem(last=False)
        if len(self._tails) > self._tokens:
            self._tails.popitem(last=False)

    def after(self, token: int) -> list[tuple[int, ...]]:
        """What may follow a token, N - 1 tokens each, the most recent first."""
        if token not in self._tails:
            return []
        self._tails.move_to_end(token)
        return list(reversed(self._tails[token]))


class Window:
    """The guesses of one row.

    Until there are N - 1 levels each pass adds one and takes a column away. From then on a pass drops level 0, as the
    authors' code does, however many tokens were accepted: guesses keep their places relative to the root.

    Args:
        prompt: the row's prompt; the first guesses are drawn from its tokens, by numbers that depend on it alone.
        width: W.
        num_levels: N - 1.
    """

    def __init__(self, prompt: Sequence[int], width: int, num_levels: int) -> None:
        self._prompt = list(prompt)
        self._random = random.Random(repr(self._prompt))
        self._num_levels = num_levels
        self.levels = [self._fresh(width + num_levels - 1)]
        """``[R][W + N - 1 - R]`` tokens, 1 <= R <= N - 1; the root stands in the place of the first."""

    def _fresh(self, count: int) -> list[int]:
        return [self._random.choice(self._prompt) for _ in range(count)]

    def advance(self, root: int, predicted: Sequence[int]) -> list[list[int]]:
        """Take in what the target predicts at the top of the first columns; returns the n-grams of these columns.

        Args:
            root: the pending token of the pass.
            predicted: tokens, one per column that was part of the pass.
        """
        count, levels = len(predicted), self.levels
        if len(levels) < self._num_levels:
            # The root moves on by one position, into the place of the first guess: that column ends.
            top = [*predicted[1:], *self._fresh(len(levels[0]) - count)]
            self.levels = [*(level[1:] for level in levels), top]
            return []
        ngrams = [[*(level[column] for level in levels), predicted[column]] for column in range(count)]
        ngrams[0][0] = root
        self.levels = [
            [*above[:count], *level[count:]] for level, above in zip(levels, [*levels[1:], predicted], strict=True)
        ]
        return ngrams


class LookaheadDrafter(Drafter):
    """N-grams of the target's own parallel guesses, training-free."""

    name = "lookahead"
    Config = LookaheadConfig
    virtual_nodes = True

    def __init__(self, config: LookaheadConfig | None = None) -> None:
        self.config = config or LookaheadConfig()
        self._rows: dict[int, _RowState] = {}
        self._proposed: TokenTree | None = None

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        table: nn.Module = target.model.get_input_embeddings()
        self._embed: Callable[[Tensor], Tensor] = table.__call__  # the target's, so no memory of the drafter's

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._rows = {row.row_id: _RowState(row, self.config) for row in batch.rows}

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        self._rows |= {row.row_id: _RowState(row, self.config) for row in batch.rows[-count:]}

    def propose(self, batch: Batch) -> TokenTree:
        # A window is of use whole: ``batch.max_nodes`` cuts no tree with virtual nodes, and the policy pays for all.
        trees = [self._rows[row.row_id].propose(row, self.config) for row in batch.rows]
        tree = TokenTree.from_rows(trees, batch.device)
        drafted = torch.tensor([self._rows[row.row_id].drafted for row in batch.rows], device=batch.device)
        columns = torch.arange(tree.num_nodes, device=batch.device)
        virtual = (columns >= drafted.unsqueeze(1)) & (tree.parents != PADDING)
        if bool(virtual.any()):
            tree = TokenTree(tree.tokens, tree.parents, virtual=virtual, embeddings=self._embed(tree.tokens).detach())
        self._proposed = tree
        return tree

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        proposed, self._proposed = self._proposed, None
        if proposed is None or not _is_whole(tree, proposed):
            return  # a pass without the window, or with a part of it
        tops = [self._rows[row.row_id].top for row in batch.rows]
        width = max(map(len, tops))
        if width == 0:
            return
        columns = torch.tensor([[*top, *[0] * (width - len(top))] for top in tops], device=output.logits.device)
        rows = torch.arange(len(tops), device=columns.device).unsqueeze(1)
        best: Tensor = output.logits[rows, columns].argmax(-1)
        for row, predicted in zip(batch.rows, best.tolist(), strict=True):
            self._rows[row.row_id].see(row, predicted)

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        self._rows = {batch.rows[row].row_id: self._rows[batch.rows[row].row_id] for row in rows}

    def stop(self) -> None:
        self._rows, self._proposed = {}, None


def _is_whole(tree: TokenTree, proposed: TokenTree) -> bool:
    """Whether a pass ran over the tree proposed: a window that was cut leaves no virtual nodes."""
    return (tree.virtual is None) == (proposed.virtual is None) and torch.equal(tree.parents, proposed.parents)


class _RowState:
    """Window and pool of one row, and what it has in the pass under way.

    Attributes:
        drafted: columns that hold the root and candidates; the window's follow.
        top: columns of the window's highest level.
    """

    def __init__(self, row: Row, config: LookaheadConfig) -> None:
        self.window = Window(row.tokens[: row.prompt_len], config.window, config.ngram - 1)
        self.pool = NgramPool(config.pool, config.candidates)
        self.drafted = 1
        self.top: list[int] = []
        self._indexed = 0

    def propose(self, row: Row, config: LookaheadConfig) -> TreeBuilder:
        """Candidates first, then the window."""
        if config.text:
            self._index(row.tokens, config.ngram)
        levels, limit = self.window.levels, config.max_nodes
        builder = TreeBuilder(row.pending, 1 + config.candidates * (config.ngram - 1))
        for tail in self.pool.after(row.pending):
            builder.add_path(tail[: row.max_depth])
        self.drafted = len(builder.tokens)
        # A column's highest node stands len(levels) - 1 deeper than the column, and no node where no token can stand.
        width = min(len(levels[0]), (limit + 1 - self.drafted) // len(levels), row.max_depth - len(levels) + 2)
        self.top = _hang([level[: max(width, 0)] for level in levels], builder)
        return builder

    def see(self, row: Row, predicted: Sequence[int]) -> None:
        """What the target predicts at ``top``, and then anything; the row does not hold the pass's tokens yet."""
        if self.top:
            for ngram in self.window.advance(row.pending, predicted[: len(self.top)]):
                self.pool.add(ngram)

    def _index(self, tokens: Sequence[int], length: int) -> None:
        """Put the n-grams of the text into the pool, those it has grown by."""
        for end in range(max(self._indexed + 1, length), len(tokens) + 1):
            self.pool.add(tokens[end - length : end])
        self._indexed = len(tokens)


def _hang(levels: Iterable[Sequence[int]], builder: TreeBuilder) -> list[int]:
    """Hang a window below the root, apart from what hangs there already; returns the columns of its highest level."""
    below: list[int] = []
    for number, level in enumerate(levels):
        row = []
        for column, token in enumerate(level):
            if number == column == 0:
                row.append(0)  # the root is the first node of level 0
                continue
            builder.parents.append(row[-1] if number == 0 else below[column])
            builder.tokens.append(token)
            row.append(len(builder.tokens) - 1)
        below = row
    return below
