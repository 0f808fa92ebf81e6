"""Sequoia's programme finds the best tree of every size and depth, and the fastest on a hand-made machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from specdec.drafters.ppd_tree import best_candidates
from specdec.optimal_tree import OptimalTrees, RankedTree
from specdec.tree import ROOT

CHANCES = {
    "falling": (0.6, 0.2, 0.1),
    "even": (0.3, 0.3, 0.3),
    "second best first": (0.1, 0.5, 0.2),
    "one rank": (0.8,),
    "hopeless": (0.0, 0.0),
}
Shape = tuple["Shape", ...]  # subtrees by rank


@cache
def shapes(nodes: int, depth: int, ranks: int) -> list[Shape]:
    """Every tree of exactly so many nodes, at most so deep, whose children have the first ranks."""
    if nodes == 1:
        return [()]
    if depth == 0:
        return []
    return [tuple(forest) for count in range(1, ranks + 1) for forest in forests(nodes - 1, count, depth - 1, ranks)]


def forests(nodes: int, count: int, depth: int, ranks: int) -> Iterator[list[Shape]]:
    for sizes in itertools.product(range(1, nodes + 1), repeat=count):
        if sum(sizes) == nodes:
            for trees in itertools.product(*(shapes(size, depth, ranks) for size in sizes)):
                yield list(trees)


def expected_tokens(shape: Shape, chances: tuple[float, ...]) -> float:
    return 1.0 + sum(p * expected_tokens(child, chances) for p, child in zip(chances, shape, strict=False))


def tokens_of(tree: RankedTree, chances: tuple[float, ...]) -> float:
    """Expected tokens from the tree's nodes alone: the sum of the chances that each is reached."""
    reached = [1.0]
    for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
        reached.append(reached[parent] * chances[rank])
    return sum(reached)


@pytest.mark.parametrize("name", CHANCES)
def test_no_tree_of_any_size_and_depth_is_better(name: str) -> None:
    chances = CHANCES[name]
    trees = OptimalTrees(chances, max_nodes=7, max_depth=4)
    for nodes, depth in itertools.product(range(1, 8), range(5)):
        best = max((expected_tokens(s, chances) for s in shapes(nodes, depth, len(chances))), default=None)
        assert trees.tokens(nodes, depth) == (None if best is None else pytest.approx(best))
        if best is None:
            with pytest.raises(ValueError, match=f"no tree of {nodes} nodes that is at most {depth} deep"):
                trees.tree(nodes, depth)
            continue
        tree = trees.tree(nodes, depth)
        assert len(tree.parents) == nodes
        assert tree.depth <= depth
        assert tree.parents[0] == ROOT
        assert all(0 <= parent < node for node, parent in enumerate(tree.parents[1:], start=1))
        places = list(zip(tree.parents[1:], tree.ranks[1:], strict=True))
        assert len(set(places)) == len(places)
        assert all((parent, rank - 1) in places for parent, rank in places if rank)
        assert tokens_of(tree, chances) == pytest.approx(best) == tree.tokens


def level_by_level(level_ms: float) -> Callable[[int, float], float]:
    return lambda depth, _: depth * level_ms


def test_a_flat_machine_wants_the_largest_tree_and_a_steep_one_none() -> None:
    trees = OptimalTrees((0.6, 0.2), max_nodes=8, max_depth=4)
    assert len(trees.fastest(lambda nodes: 10.0, level_by_level(0.0)).parents) == 8
    assert trees.fastest(lambda nodes: 10.0 * nodes, level_by_level(0.0)).parents == (ROOT,)


def test_dear_levels_make_flat_trees() -> None:
    trees = OptimalTrees((0.7, 0.2), max_nodes=8, max_depth=6)
    depths = [trees.fastest(lambda nodes: 10.0, level_by_level(level)).depth for level in (0.0, 2.0, 4.0, 100.0)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[1] > depths[-1] == 0


@pytest.mark.parametrize("token_ms", [0.0, 2.0])
@pytest.mark.parametrize("level_ms", [0.0, 1.0, 3.0])
def test_the_fastest_tree_takes_least_time_per_token(level_ms: float, token_ms: float) -> None:
    chances = CHANCES["falling"]

    def pass_ms(nodes: int) -> float:
        return 5.0 + nodes

    def draft_ms(depth: int, tokens: float) -> float:
        return depth * level_ms + min(depth, 1) * tokens * token_ms

    best = min(
        (draft_ms(depth, expected_tokens(shape, chances)) + pass_ms(nodes)) / expected_tokens(shape, chances)
        for nodes, depth in itertools.product(range(1, 7), range(4))
        for shape in shapes(nodes, depth, 3)
    )
    tree = OptimalTrees(chances, 6, 3).fastest(pass_ms, draft_ms)
    found = (draft_ms(tree.depth, tree.tokens) + pass_ms(len(tree.parents))) / tree.tokens
    assert found == pytest.approx(best)


@pytest.mark.parametrize("chances", [(0.7, 0.4), (-0.1,), (1.2,)])
def test_chances_that_are_none_are_refused(chances: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sum to at most 1"):
        OptimalTrees(chances, 3, 2)


def test_limits_that_leave_no_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 2"):
        OptimalTrees((0.5,), 0, 2)


# Chances that depend on depth as well

TABLES = {
    "falling": [(0.7, 0.1), (0.4, 0.3), (0.2, 0.2)],
    "better below": [(0.3, 0.3), (0.9, 0.05)],
    "one rank, then three": [(0.8,), (0.4, 0.3, 0.2)],
    "hopeless below": [(0.5, 0.4), (0.0, 0.0)],
}


def expected_by_depth(shape: Shape, table: list[tuple[float, ...]], depth: int = 0) -> float | None:
    """As ``expected_tokens``; None for a tree with a child that the table has no chance for."""
    total, row = 1.0, table[depth] if depth < len(table) else ()
    if len(shape) > len(row):
        return None
    for chance, child in zip(row, shape, strict=False):
        below = expected_by_depth(child, table, depth + 1)
        if below is None:
            return None
        total += chance * below
    return total


@pytest.mark.parametrize("name", TABLES)
def test_no_tree_is_better_where_chances_depend_on_depth(name: str) -> None:
    table = TABLES[name]
    trees = OptimalTrees(table, max_nodes=6, max_depth=4)
    for nodes, depth in itertools.product(range(1, 7), range(5)):
        found = [expected_by_depth(s, table) for s in shapes(nodes, depth, max(map(len, table)))]
        best = max((value for value in found if value is not None), default=None)
        assert trees.tokens(nodes, depth) == (None if best is None else pytest.approx(best))
        if best is not None:
            tree, reached, depths = trees.tree(nodes, depth), [1.0], [0]
            for parent, rank in zip(tree.parents[1:], tree.ranks[1:], strict=True):
                depths.append(depths[parent] + 1)
                reached.append(reached[parent] * table[depths[parent]][rank])
            assert (len(tree.parents), tree.tokens) == (nodes, pytest.approx(sum(reached)))
            assert tree.tokens == pytest.approx(best)


def test_a_row_for_every_depth_is_the_row_alone() -> None:
    alone, repeated = OptimalTrees((0.6, 0.2), 12, 4), OptimalTrees([(0.6, 0.2)] * 4, 12, 4)
    for nodes, depth in itertools.product(range(1, 13), range(5)):
        assert alone.tokens(nodes, depth) == repeated.tokens(nodes, depth)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("guesses", [1, 4, 9])
def test_choosing_guesses_by_their_chance_gives_the_same_promise(name: str, guesses: int) -> None:
    """PPD takes the likeliest guesses one by one; where chances fall by rank that is the programme's tree."""
    candidates = best_candidates(TABLES[name], guesses)
    trees = OptimalTrees(TABLES[name], max_nodes=10, max_depth=3)
    assert trees.best(len(candidates), 3).tokens == pytest.approx(1.0 + candidates.expected)


def test_the_best_tree_is_no_larger_than_it_has_to_be() -> None:
    tree = OptimalTrees([(0.5, 0.4), (0.0, 0.0)], 8, 4).best(8, 4)
    assert tree.parents == (ROOT, 0, 0)
    assert (tree.width, tree.depth) == (1, 1)
    assert OptimalTrees([(0.5, 0.4)] * 2, 8, 2).best(8, 2).width == 2
    assert OptimalTrees((0.0,), 8, 2).best(8, 2).width == 0


def test_a_bad_row_of_a_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"sum to at most 1, got \[0\.9, 0\.2\]"):
        OptimalTrees([(0.5,), (0.9, 0.2)], 3, 2)
