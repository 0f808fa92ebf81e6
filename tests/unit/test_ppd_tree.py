"""PPD's tree arithmetic against enumeration, simulation and linear algebra."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from specdec.drafters.ppd_tree import (
    Candidates,
    Plan,
    attach,
    best_candidates,
    choose_budget,
    hit_table,
    make_plan,
    stationary,
    transitions,
)

TABLES = {
    "falling": [[0.5, 0.2, 0.1], [0.3, 0.25, 0.05], [0.2, 0.1, 0.1]],
    "out of order": [[0.1, 0.6], [0.05, 0.4]],
    "certain": [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]],
    "uneven": [[0.4], [0.3, 0.3, 0.2]],
}


def every_path(table: Sequence[Sequence[float]]) -> dict[tuple[int, ...], float]:
    """Every path of ranks and the chance that it is right."""
    chances: dict[tuple[int, ...], float] = {}
    for depth in range(1, len(table) + 1):
        for path in itertools.product(*[range(len(row)) for row in table[:depth]]):
            chances[path] = float(np.prod([table[distance][rank] for distance, rank in enumerate(path)]))
    return chances


def paths_of(tree: Candidates) -> list[tuple[int, ...]]:
    """Path of ranks of every node, the root's empty."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[tree.parents[node]], tree.ranks[node]))
    return paths


def random_table(rng: random.Random, depth: int, ranks: int) -> list[list[float]]:
    """Rows that sum to less than 1."""
    rows = [[rng.random() for _ in range(ranks)] for _ in range(depth)]
    return [[value / (sum(row) + rng.random()) for value in row] for row in rows]


@pytest.mark.parametrize("name", TABLES)
def test_the_best_candidates_are_those_of_highest_chance(name: str) -> None:
    chances = every_path(TABLES[name])
    possible = sorted((chance for chance in chances.values() if chance > 0), reverse=True)
    for count in range(len(chances) + 2):
        tree = best_candidates(TABLES[name], count)
        paths = paths_of(tree)
        assert len(set(paths)) == len(paths) == 1 + min(count, len(possible))
        assert all(parent < node for node, parent in enumerate(tree.parents))
        assert tree.distances == tuple(map(len, paths))
        assert tree.chances[1:] == pytest.approx([chances[path] for path in paths[1:]])
        assert sorted(tree.chances[1:], reverse=True) == pytest.approx(possible[:count])
        assert tree.expected == pytest.approx(sum(possible[:count]))


def test_no_tree_of_its_size_expects_more() -> None:
    table = TABLES["falling"][:2]
    chances = every_path(table)
    for count in (1, 3, 5):
        closed = (
            nodes
            for nodes in itertools.combinations(chances, count)
            if all(len(path) == 1 or path[:-1] in nodes for path in nodes)
        )
        most = max(sum(chances[path] for path in nodes) for nodes in closed)
        assert best_candidates(table, count).expected == pytest.approx(most)


def test_a_smaller_best_tree_is_the_beginning_of_a_larger_one() -> None:
    large = best_candidates(TABLES["falling"], 20)
    for count in range(1, 20):
        assert large.first(count) == best_candidates(TABLES["falling"], count)


@pytest.mark.parametrize("name", TABLES)
def test_chances_of_the_last_accepted_node_match_all_outcomes(name: str) -> None:
    """An outcome says which rank is right at every distance, or that none is."""
    table = TABLES[name]
    tree = best_candidates(table, 6)
    nodes = {path: node for node, path in enumerate(paths_of(tree))}
    expected = [0.0] * len(tree)
    for outcome in itertools.product(*[[*range(len(row)), None] for row in table]):
        chance = float(
            np.prod([1 - sum(row) if rank is None else row[rank] for row, rank in zip(table, outcome, strict=True)])
        )
        path: tuple[int, ...] = ()
        for rank in outcome:
            if rank is None or (*path, rank) not in nodes:
                break
            path = (*path, rank)
        expected[nodes[path]] += chance
    assert tree.last == pytest.approx(expected, abs=1e-12)
    assert sum(tree.last) == pytest.approx(1.0)


@pytest.mark.parametrize("keep", [0, 1])
def test_prompt_tokens_stay_where_their_loss_would_cost_most(keep: int) -> None:
    """Against every way to hang them, gains that fall from one prompt token to the next."""
    rng = random.Random(keep)
    for _ in range(20):
        size, gains = rng.randint(1, 4), sorted((rng.random() for _ in range(3)), reverse=True)
        last = [rng.random() for _ in range(size)]
        limit = rng.randint(keep * size, 3 * size + 1)

        def worth(counts: Sequence[int], last: list[float] = last, gains: list[float] = gains) -> float:
            return sum(chance * sum(gains[:count]) for chance, count in zip(last, counts, strict=True))

        counts = attach(last, gains, limit, keep)
        assert sum(counts) == min(limit, 3 * size)
        assert all(keep <= count <= 3 for count in counts)
        ways = (way for way in itertools.product(range(keep, 4), repeat=size) if sum(way) <= limit)
        assert worth(counts) == pytest.approx(max(map(worth, ways)))


def test_of_equal_losses_the_later_nodes_goes_first() -> None:
    assert attach([0.2, 0.2, 0.2], [1.0, 1.0], 4) == [2, 1, 1]
    assert attach([0.2, 0.2, 0.2], [1.0, 1.0], 3, keep=0) == [2, 1, 0]


def test_too_few_prompt_tokens_for_the_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompt tokens are too few for 3 nodes with at least 1 each"):
        attach([0.3, 0.3, 0.4], [1.0], 2)


def test_transitions_add_up_the_nodes_of_each_state() -> None:
    assert transitions([0.5, 0.3, 0.2], [2, 1, 2], 4) == pytest.approx([0.0, 0.3, 0.7, 0.0])


def test_the_stationary_distribution_is_the_left_eigenvector() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 4):
        chain = rng.random((size, size))
        chain /= chain.sum(axis=1, keepdims=True)
        values, vectors = np.linalg.eig(chain.T)
        vector = vectors[:, np.abs(values - 1).argmin()].real
        np.testing.assert_allclose(stationary(chain.tolist(), 0), vector / vector.sum(), atol=1e-9)


def test_the_stationary_distribution_of_cycles_and_of_chains_that_fall_apart() -> None:
    np.testing.assert_allclose(stationary([[0.0, 1.0], [1.0, 0.0]], 0), [0.5, 0.5])
    apart = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    np.testing.assert_allclose(stationary(apart, 0), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(stationary(apart, 2), [0.0, 0.5, 0.5])
    np.testing.assert_allclose(stationary([[0.5, 0.5], [0.0, 1.0]], 0), [0.0, 1.0], atol=1e-9)


def nodes_of(plan: Plan, ensembles: int) -> list[int]:
    return [len(tree) + ensembles * sum(counts) for tree, counts in zip(plan.trees, plan.attached, strict=True)]


@pytest.mark.parametrize("ensembles", [1, 2])
@pytest.mark.parametrize("keep", [0, 1])
def test_a_plan_keeps_to_its_budget(keep: int, ensembles: int) -> None:
    for budget in (8, 13, 24):
        plan = make_plan(TABLES["falling"], budget, ensembles, keep)
        assert max(nodes_of(plan, ensembles)) <= budget
        assert all(keep <= count <= 3 for counts in plan.attached for count in counts)
        assert all(max(tree.distances) <= state for state, tree in enumerate(plan.trees))
        assert len(plan.trees[0]) == 1
        assert plan.expected == pytest.approx([tree.expected for tree in plan.trees])
        assert sum(plan.shares) == pytest.approx(1.0)


def test_a_plan_is_the_best_of_all_sizes() -> None:
    """Every combination of sizes, with the arithmetic written out once more."""
    rng = random.Random(1)
    for _ in range(4):
        table, budget = random_table(rng, 2, 3), rng.randint(8, 11)
        best = 0.0
        for sizes in itertools.product(range(1, (budget - 2) // 2 + 1), repeat=2):
            trees = [best_candidates(table[:state], size) for state, size in enumerate((0, *sizes))]
            f = [sum(tree.chances) - 1 for tree in trees]
            gains = [f[1] - f[0], f[2] - f[1]]
            chain = np.zeros((3, 3))
            for state, tree in enumerate(trees):
                counts = attach(tree.last, gains, budget - len(tree))
                for chance, count in zip(tree.last, counts, strict=True):
                    chain[state, count] += chance
            shares = np.linalg.matrix_power((chain + np.eye(3)) / 2, 4096)[2]  # halved, it cannot go in circles
            best = max(best, 1 + float(shares @ f))
        assert make_plan(table, budget).tau == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("keep", [0, 1])
def test_simulated_decoding_emits_what_the_plan_expects(keep: int) -> None:
    table = TABLES["falling"]
    plan = make_plan(table, 14, keep=keep)
    paths = [{path: node for node, path in enumerate(paths_of(tree))} for tree in plan.trees]
    rng, state, emitted, steps = random.Random(0), 3, 0, 40_000
    for _ in range(steps):
        path: tuple[int, ...] = ()
        for row in table:
            drawn, rank = rng.random(), 0
            while rank < len(row) and drawn >= row[rank]:
                drawn -= row[rank]
                rank += 1
            if (*path, rank) not in paths[state]:
                break
            path = (*path, rank)
        emitted += len(path) + 1
        state = plan.attached[state][paths[state][path]]
    # The standard error of a mean over 40,000 steps of a number between 1 and 4 is below 0.008.
    assert emitted / steps == pytest.approx(plan.tau, abs=0.03)


def test_a_larger_budget_never_promises_less() -> None:
    taus = [make_plan(TABLES["falling"], budget).tau for budget in range(4, 40)]
    assert all(right >= left - 1e-9 for left, right in itertools.pairwise(taus))
    assert taus[0] < taus[-1]


def test_a_budget_without_room_for_a_guess_is_refused() -> None:
    with pytest.raises(ValueError, match="a pass of 3 nodes has no room"):
        make_plan(TABLES["falling"], 3)
    with pytest.raises(ValueError, match="a pass of 10 nodes has no room"):
        make_plan(TABLES["falling"], 10, ensembles=5)


def test_the_budget_is_chosen_by_tokens_per_time() -> None:
    def plan(budget: int) -> Plan:
        return make_plan(TABLES["falling"], budget)

    flat = choose_budget({4: 1.0, 8: 1.0, 16: 1.0}, plan)
    steep = choose_budget({4: 1.0, 8: 2.0, 16: 4.0}, plan)
    assert (flat.budget, steep.budget) == (16, 4)
    latency = {budget: 1.0 + 0.05 * budget for budget in (4, 6, 8, 12, 16)}
    chosen = choose_budget(latency, plan)
    assert chosen.tau / latency[chosen.budget] == max(plan(n).tau / latency[n] for n in latency)
    with pytest.raises(ValueError, match="the latency of a pass of 8 nodes is nan"):
        choose_budget({4: 1.0, 8: float("nan")}, plan)


def test_hit_rates_become_a_table() -> None:
    table = hit_table([[0.5, -0.1], [0.9, 0.6], [0.1, 0.1]], 2)
    assert table == [pytest.approx([0.5, 0.0]), pytest.approx([0.6, 0.4])]
    assert hit_table([[0.5]], 3) == [[0.5]]
