"""Merged trees, compiled: the same nodes, chances and lessons as in Python, to the bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from unit_hybrid import Clock, Copying, Reading, Run, Text, decode
from unit_rows import make_batch

from specdec.batch import Batch
from specdec.drafters import hybrid_merger
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid import HybridConfig, HybridDrafter
from specdec.drafters.hybrid_merger import MergedTrees, Merger
from specdec.drafters.hybrid_tree import PythonTrees
from specdec.kernels.merge import MOST_CHOICES, MOST_PARTS, CompiledTrees, serves
from specdec.target import TargetOutput
from specdec.tree import PADDING, ROOT, TokenTree
from specdec.verifiers.base import Verdict

VOCAB = 7
"""Small, so that parts often agree, and repeat themselves below one parent."""

compiled = pytest.mark.skipif(not serves(2), reason="no C compiler")


def random_trees(rng: random.Random, pending: Sequence[int], sure: bool) -> TokenTree:
    """One per row: nodes on any earlier one, padding anywhere, confidences of any size, some of them NaN."""
    columns = rng.choice([1, 2, 6, 25])
    tokens, parents, confidence = [], [], []
    for token in pending:
        row, above = [token], [ROOT]
        for column in range(1, columns):
            row.append(rng.randrange(VOCAB))
            places = [place for place in range(column) if above[place] != PADDING]
            above.append(PADDING if rng.random() < 0.1 else rng.choice(places))
        tokens.append(row)
        parents.append(above)
        odd = [0.0, -0.5, 1.5, 1e-12, math.inf, math.nan]
        confidence.append([1.0, *(rng.choice(odd) if rng.random() < 0.1 else rng.random() for _ in row[1:])])
    tree = TokenTree(torch.tensor(tokens), torch.tensor(parents), confidence=torch.tensor(confidence) if sure else None)
    tree.validate(VOCAB)
    return tree


def bits_of(values: Sequence[Sequence[float]]) -> list[list[str]]:
    return [[value.hex() for value in row] for row in values]


def same(left: MergedTrees, right: MergedTrees) -> None:
    assert left.sizes == right.sizes
    assert bits_of(left.expected) == bits_of(right.expected)
    for one, other in zip(left.columns(), right.columns(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def one_step(rng: random.Random, mergers: Sequence[Merger], batch: Batch, parts: Sequence[int]) -> None:
    """Parts are merged, nodes chosen after each, rows dropped, and what followed is learnt, by all mergers alike."""
    way = rng.random() < 0.3
    merged = [merger.trees(way, batch.rows) for merger in mergers]
    assert [type(trees) for trees in merged] == [CompiledTrees, PythonTrees]
    same(*merged)
    for part in parts:
        tree = random_trees(rng, [row.pending for row in batch.rows], sure=rng.random() < 0.7)
        max_nodes, least = rng.choice([2, 8, 24]), rng.choice([0.0, 0.01, 0.2])
        most, share = len(batch) * rng.randrange(max_nodes), rng.choice([None, 0.5])
        told: list[list[float]] = []

        def worth(chances: Sequence[float], told: list[list[float]] = told, share: float | None = share) -> int:
            told.append(list(chances))
            return int(len(chances) * (share or 1.0))

        for trees in merged:
            trees.add(part, tree.tokens, tree.parents, tree.confidence)
            trees.choose(max_nodes, least, most, None if share is None else worth)
        assert told[:1] == told[1:]
        same(*merged)
        tokens, parents, confidence = merged[0].columns()
        TokenTree(tokens, parents, confidence=confidence).validate(VOCAB)
        assert bool(confidence.isfinite().all())
    if len(batch) > 1 and rng.random() < 0.1:
        kept = rng.sample(range(len(batch)), len(batch) - 1)
        for each in (*merged, batch):
            each.keep(kept)
        for merger in mergers:
            merger.keep([row.row_id for row in batch.rows])
        same(*merged)
    emitted = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 6))] for _ in batch.rows]
    left, right = (trees.learn(emitted) for trees in merged)
    assert left == right
    for row, tokens_of in zip(batch.rows, emitted, strict=True):
        row.tokens += tokens_of


@compiled
@pytest.mark.parametrize("num_parts", [2, 3, MOST_PARTS])
def test_compiled_trees_are_those_of_python_to_the_bit_while_they_learn(num_parts: int) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        batch = make_batch([[rng.randrange(VOCAB)] for _ in range(rng.choice([1, 4, 8]))], VOCAB)
        mergers = Merger(num_parts), Merger(num_parts, compiled=False)
        for _ in range(60):
            for row in batch.rows:  # some end soon: their trees may be no deeper
                row.max_len = len(row.tokens) + 1 + rng.choice([0, 1, 3, 100])
            one_step(rng, mergers, batch, rng.sample(range(num_parts), rng.randint(1, num_parts)))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=compiled), False])
def test_a_confidence_that_is_no_number_counts_as_none(compiled: bool) -> None:
    batch = make_batch([[1]], VOCAB)
    tokens, parents = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[ROOT, 0, 1, 0]])
    found = []
    for confidence in (None, torch.tensor([[1.0, math.nan, math.nan, math.nan]])):
        merger = Merger(2, compiled)
        for _ in range(2):
            trees = merger.trees("greedy", batch.rows)
            trees.add(0, tokens, parents, confidence)
            trees.choose(8, 0.0, 8)
            trees.learn([[2, 3, 5]])
        found.append((trees.expected, [column.tolist() for column in trees.columns()]))

    assert found[0] == found[1]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=compiled), False])
def test_trees_must_be_rooted_at_the_pending_tokens(compiled: bool) -> None:
    trees = Merger(2, compiled).trees("greedy", make_batch([[1], [2]], VOCAB).rows)
    for roots in ([[1], [3]], [[1]], [[1], [2], [3]]):
        with pytest.raises(ValueError, match="one tree per row, rooted at its pending token"):
            trees.add(0, torch.tensor(roots), torch.full((len(roots), 1), ROOT), None)
    trees.add(0, torch.tensor([[1], [2]]), torch.full((2, 1), ROOT), None)
    trees.choose(4, 0.0, 6)
    assert trees.sizes == [[1, 1], [1, 1]]


@compiled
def test_a_tree_may_be_chosen_from_as_often_as_there_are_bits() -> None:
    trees = Merger(2).trees("greedy", make_batch([[1]], VOCAB).rows)
    trees.add(0, torch.tensor([[1, 2, 3]]), torch.tensor([[ROOT, 0, 1]]), None)
    for _ in range(MOST_CHOICES - 1):
        trees.choose(4, 0.0, 3)

    assert trees.learn([[2, 3, 4]]) == [[0], *([[2]] * (MOST_CHOICES - 1))]


def test_more_parts_than_are_compiled_are_merged_in_python() -> None:
    trees = Merger(MOST_PARTS + 1).trees("greedy", make_batch([[1]], VOCAB).rows)

    assert isinstance(trees, PythonTrees)


class Chain(Drafter):
    """Proposes the same few tokens after every text."""

    def __init__(self, name: str, tokens: list[int]) -> None:
        self.name, self.tokens = name, tokens

    def propose(self, batch: Batch) -> TokenTree:
        tokens = torch.tensor([[row.pending, *self.tokens] for row in batch.rows])
        return TokenTree(tokens, torch.arange(-1, len(self.tokens)).expand_as(tokens))


def drafts(sizes: Sequence[int]) -> list[object]:
    """What a hybrid drafts for so many rows while no pass checks it, row after row ending before it is looked at."""
    drafter, found = (
        HybridDrafter([Chain("one", [2, 3, 4]), Chain("two", [2, 5])], HybridConfig(ask="always")),
        list[object](),
    )
    batch = make_batch([[1], [5], [6]], VOCAB)
    batch.unchecked = True
    drafter.start(batch, None)
    for size in sizes:
        tree = drafter.propose(batch)
        assert tree.confidence is not None
        found.append((tree.tokens.tolist(), tree.parents.tolist(), bits_of(tree.confidence.tolist())))
        kept = list(range(len(batch)))[-size:]
        drafter.keep(batch, kept)
        batch.keep(kept)
        root = TokenTree.from_pending(batch.pending)
        emitted = [[2, 3 if index else 5, 6] for index, _ in enumerate(batch.rows)]
        verdict = Verdict(torch.zeros_like(root.tokens), [0] * size, emitted, [False] * size)
        drafter.observe(batch, root, TargetOutput(torch.zeros(size, 1, VOCAB), {}), verdict)
        for row, tokens in zip(batch.rows, emitted, strict=True):
            row.tokens += tokens
    return found


@compiled
def test_rows_that_end_while_no_pass_checks_their_trees_leave_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = drafts([3, 2, 2, 1, 1, 1])
    monkeypatch.setattr(hybrid_merger, "serves", lambda num_parts: False)

    assert drafts([3, 2, 2, 1, 1, 1]) == found
    assert len(found) == 6


@compiled
def test_a_hybrid_decodes_alike_compiled_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded() -> Run:
        clock, texts = Clock(), dict[int, Text]()
        drafter = HybridDrafter([Copying(clock, texts), Reading(clock, texts)], clock=clock)
        return decode(drafter, clock, texts, [Text(seed, 0.3) for seed in range(2)])

    found = decoded()
    monkeypatch.setattr(hybrid_merger, "serves", lambda num_parts: False)

    assert decoded() == found
