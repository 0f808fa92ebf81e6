"""Trees by joint confidence: the best nodes there are, by the draft's own logits as the target will choose."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unit_rows import make_batch, make_row

from specdec.batch import Batch
from specdec.drafters.growth import MOST_LISTED, grow, grow_in_lists, grow_on_device, rank
from specdec.sampling import SamplingParams, filter_logits
from specdec.tree import PADDING, TokenTree

VOCAB = 50
Path = tuple[int, ...]
Children = Callable[[int, Path], list[tuple[float, int]]]
Grow = Callable[[Tensor, int, int, int, "Expand"], TokenTree]
Expand = Callable[[TokenTree, int, int], tuple[Tensor, Tensor]]


BOTH = pytest.mark.parametrize("grown", [grow_in_lists, grow_on_device])


def paths_of(tree: TokenTree, row: int) -> dict[int, Path]:
    """Column -> token path of a row's nodes, the root's being empty."""
    tokens, found = tree.tokens[row].tolist(), {0: ()}
    for column, parent in enumerate(tree.parents[row].tolist()):
        if parent >= 0:
            found[column] = (*found[parent], tokens[column])
    return found


def drawn_children(seed: int, branching: int, holes: float) -> Children:
    """Children of a node as a function of row, path and seed; some have no chance."""

    def children(row: int, path: Path) -> list[tuple[float, int]]:
        rng = random.Random(f"{seed} {row} {path}")
        shares = [rng.random() for _ in range(branching)]
        scores = [-math.inf if rng.random() < holes else math.log(share / sum(shares)) for share in shares]
        return list(zip(scores, rng.sample(range(VOCAB), branching), strict=True))

    return children


def expander(
    children: Children, branching: int, calls: list[int]
) -> Callable[[TokenTree, int, int], tuple[Tensor, Tensor]]:
    """What ``grow`` asks, from ``children``; checks what it is asked."""

    def expand(tree: TokenTree, first: int, level: int) -> tuple[Tensor, Tensor]:
        calls.append(level)
        tree.validate(VOCAB)
        count = tree.num_nodes - first
        scores = torch.full((tree.batch_size, count, branching), -1.0)
        tokens = torch.zeros(tree.batch_size, count, branching, dtype=torch.int64)
        for row in range(tree.batch_size):
            paths = paths_of(tree, row)
            for place in range(count):
                if int(tree.parents[row, first + place]) == PADDING:
                    continue
                path = paths[first + place]
                assert len(path) == level - 1
                for child, (score, token) in enumerate(children(row, path)):
                    scores[row, place, child], tokens[row, place, child] = score, token
        return scores, tokens

    return expand


def candidates_of(children: Children, row: int, depth: int, width: int) -> dict[Path, float]:
    """Joint probability of every child of a node that the ``width`` best of each depth include."""
    found: dict[Path, float] = {}
    frontier: list[tuple[float, Path]] = [(0.0, ())]
    for _ in range(depth):
        level = [
            (joint + score, (*path, token))
            for joint, path in frontier
            for score, token in children(row, path)
            if score > -math.inf
        ]
        found.update({path: math.exp(joint) for joint, path in level})
        frontier = sorted(level, reverse=True)[:width]
    return found


def closed_choices(found: dict[Path, float], count: int) -> Iterator[set[Path]]:
    """Every choice of up to ``count`` nodes that holds the ancestors of each."""
    for size in range(min(count, len(found)) + 1):
        for chosen in map(set, itertools.combinations(found, size)):
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
                yield chosen


@BOTH
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(1, 3),
    width=st.integers(1, 3),
    branching=st.integers(1, 3),
    max_nodes=st.integers(1, 6),
    holes=st.sampled_from([0.0, 0.4, 0.9]),
)
def test_grown_trees_are_the_best_of_all_closed_choices(
    grown: Grow, seed: int, depth: int, width: int, branching: int, max_nodes: int, holes: float
) -> None:
    children = drawn_children(seed, branching, holes)
    pending = torch.tensor([3, 4])
    tree = grown(pending, depth, width, max_nodes, expander(children, branching, []))

    tree.validate(VOCAB)
    assert tree.tokens[:, 0].tolist() == [3, 4]
    for row in range(2):
        found = candidates_of(children, row, depth, width)
        best = max(
            closed_choices(found, max_nodes - 1), key=lambda chosen: (sum(found[p] for p in chosen), len(chosen))
        )
        assert set(paths_of(tree, row).values()) - {()} == best


@BOTH
def test_growth_ends_where_no_deeper_node_can_be_chosen(grown: Grow) -> None:
    def children(row: int, path: Path) -> list[tuple[float, int]]:
        return [(math.log(0.5), 1), (math.log(0.4), 2)] if path == () else [(math.log(0.1), 3), (math.log(0.1), 4)]

    calls: list[int] = []
    tree = grown(torch.tensor([0]), 6, 2, 3, expander(children, 2, calls))

    assert sorted(paths_of(tree, 0).values()) == [(), (1,), (2,)]
    assert calls == [1, 2]


@BOTH
def test_growth_goes_on_while_one_row_has_something_to_gain(grown: Grow) -> None:
    def children(row: int, path: Path) -> list[tuple[float, int]]:
        sure = row == 1 or path == ()
        return [(math.log(0.9 if sure else 0.01), 1), (math.log(0.05 if sure else 0.01), 2)]

    calls: list[int] = []
    tree = grown(torch.tensor([0, 0]), 4, 1, 3, expander(children, 2, calls))

    assert sorted(paths_of(tree, 0).values()) == [(), (1,), (2,)]
    assert sorted(paths_of(tree, 1).values()) == [(), (1,), (1, 1)]
    assert calls == [1, 2, 3]


@BOTH
def test_a_parent_never_loses_to_its_equally_sure_child(grown: Grow) -> None:
    tree = grown(torch.tensor([0]), 5, 2, 4, expander(lambda row, path: [(0.0, 1), (-5.0, 2)], 2, []))

    assert sorted(paths_of(tree, 0).values()) == [(), (1,), (1, 1), (1, 1, 1)]


def test_many_rows_grow_as_few_do() -> None:
    children = drawn_children(0, 3, 0.3)
    many = grow(torch.arange(MOST_LISTED + 1), 3, 2, 6, expander(children, 3, []))
    few = grow(torch.arange(MOST_LISTED), 3, 2, 6, expander(children, 3, []))
    for row in range(MOST_LISTED):
        assert paths_of(many, row) == paths_of(few, row)


def ranked(
    batch: Batch, logits: Tensor, count: int, vocabulary: Tensor | None = None, level: int = 1
) -> tuple[Tensor, Tensor]:
    """Children of the roots."""
    return rank(batch, logits, count, TokenTree.from_pending(batch.pending), 0, level, vocabulary)


def test_rank_gives_the_most_probable_tokens_with_their_log_probabilities() -> None:
    batch = make_batch([[1, 2], [3]], VOCAB, SamplingParams())
    logits = torch.randn(2, 1, VOCAB, generator=torch.Generator().manual_seed(0))
    confidence, tokens = ranked(batch, logits, 4)
    expected = logits.log_softmax(-1).topk(4)

    assert torch.equal(tokens, expected.indices)
    torch.testing.assert_close(confidence, expected.values)


def test_rank_of_bfloat16_logits_beside_impossible_ones() -> None:
    batch = make_batch([[1, 2]], VOCAB, SamplingParams())
    logits = torch.full((1, 1, VOCAB), -torch.inf).bfloat16()
    logits[0, 0, 7], logits[0, 0, 3] = 2.0, 1.0
    confidence, tokens = ranked(batch, logits, 3)

    assert tokens[0, 0, :2].tolist() == [7, 3]
    torch.testing.assert_close(confidence[0, 0, :2], torch.tensor([2.0, 1.0]).log_softmax(0))
    assert confidence[0, 0, 2] == -torch.inf


def test_rank_over_few_tokens_names_them_by_their_ids() -> None:
    batch = make_batch([[1, 2]], VOCAB, SamplingParams())
    vocabulary = torch.tensor([4, 9, 30, 41])
    confidence, tokens = ranked(batch, torch.tensor([[[0.0, 3.0, 1.0, 2.0]]]), 10, vocabulary)

    assert tokens.tolist() == [[[9, 41, 30, 4]]]
    torch.testing.assert_close(confidence.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("reduced", [False, True])
def test_rank_penalises_what_the_path_repeats(reduced: bool) -> None:
    params = SamplingParams(repetition_penalty=2.0)
    batch = make_batch([[5, 7]], VOCAB, params)
    vocabulary = torch.tensor([3, 5, 7, 8, 11])
    tree = TokenTree(torch.tensor([[7, 8, 11]]), torch.tensor([[-1, 0, 0]]))
    few = torch.tensor([4.0, 4.5, 4.4, 4.3, 4.2])
    logits = few.expand(1, 2, -1)
    if not reduced:
        logits = torch.full((1, 2, VOCAB), -50.0).index_copy(2, vocabulary, logits)
    _, tokens = rank(batch, logits, 2, tree, 1, 2, vocabulary if reduced else None)

    # 5 and 7 stand in the prompt; below node 8 it is 8 that repeats, below node 11 it is 11.
    assert tokens.tolist() == [[[11, 3], [8, 3]]]


@pytest.mark.parametrize("reduced", [False, True])
def test_rank_uses_the_noise_the_target_will_choose_with(reduced: bool) -> None:
    params = SamplingParams(temperature=0.8, top_k=30)
    rows = [make_row(tokens, VOCAB, params, seed) for seed, tokens in enumerate([[1, 2, 3], [4]])]
    batch = Batch(rows, VOCAB, coupled=True)
    vocabulary = torch.arange(3, VOCAB, 2) if reduced else torch.arange(VOCAB)
    logits = torch.randn(2, 1, len(vocabulary), generator=torch.Generator().manual_seed(1))
    for level in (1, 3):
        confidence, tokens = ranked(batch, logits, 3, vocabulary if reduced else None, level)
        for index, row in enumerate(rows):
            noise = row.noise.gumbel(len(row.tokens) + level - 1)[vocabulary]
            keyed = filter_logits(logits[index], params)[0] + noise
            assert tokens[index, 0].tolist() == vocabulary[keyed.topk(3).indices].tolist()
            torch.testing.assert_close(confidence[index, 0], keyed.log_softmax(-1).topk(3).values)


def test_rank_of_excluded_tokens_is_minus_infinity_and_grow_drops_them() -> None:
    batch = make_batch([[1]], VOCAB, SamplingParams(temperature=1.0, top_k=2))
    logits = torch.arange(float(VOCAB)).view(1, 1, VOCAB)
    confidence, _ = ranked(batch, logits, 4)
    assert confidence.isneginf().tolist() == [[[False, False, True, True]]]

    tree = grow(batch.pending, 1, 4, 9, lambda tree, first, level: rank(batch, logits, 4, tree, first, level))
    assert tree.num_nodes == 3
