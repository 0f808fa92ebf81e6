"""Shared prefixes: found whatever the prompts, computed once, kept within a limit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integration.counting import Counting
from unit_prefixes import prefix_target, run_of

from specdec.kv_cache import KVCache
from specdec.prefix import SharedWork, prefill_shared, shared_prefixes
from specdec.target import HFTarget


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return prefix_target()


@given(st.lists(st.lists(st.integers(0, 2), max_size=8).map(tuple), min_size=1, max_size=10, unique=True))
def test_nodes_are_what_several_prompts_begin_with_and_nest(prompts: list[tuple[int, ...]]) -> None:
    nodes, below = shared_prefixes(prompts, least_saved=1)
    for node in nodes:
        members = [prompt for prompt in prompts if prompt[: len(node.tokens)] == node.tokens]
        assert len(members) > 1
        if node.parent is not None:
            parent = nodes[node.parent]
            assert parent.tokens == node.tokens[: len(parent.tokens)] != node.tokens
            assert node.level == parent.level + 1
            assert nodes.index(parent) < nodes.index(node)
    # Each prompt builds on the longest beginning it shares with any other: nothing is computed twice.
    for prompt, index in zip(prompts, below, strict=True):
        shared = max((common(prompt, other) for other in prompts if other != prompt), default=0)
        assert (0 if index is None else len(nodes[index].tokens)) == shared


def common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_tokens_held_beside_the_rows_are_those_of_every_level_side_by_side() -> None:
    first, other = tuple(range(100)), tuple(range(200, 250))
    long, short = (*first, *range(300, 360)), (*first, *range(400, 430))
    prompts = [(*long, 1), (*long, 2), (*short, 3), (*short, 4), (*other, 5), (*other, 6)]
    found = SharedWork.of(prompts)
    # Two at the top, of 100 and 50 tokens; below the first, of 60 and 30; a token of each row's own behind them.
    assert found.passes == ((2, 100, 100), (2, 60, 160), (6, 1, 161))
    assert (found.held(6), found.own) == (2 * 100 + 2 * 60, 1)
    assert SharedWork.of([*prompts, (7, 8)]).own == 2
    assert SharedWork.of(prompts[:1]) == SharedWork(161, ((1, 161, 161),))


def test_what_saves_little_is_no_pass_of_its_own() -> None:
    prompts = [(1, 2, 3, 4), (1, 2, 3, 5)]
    assert shared_prefixes(prompts, least_saved=4) == ([], [None, None])
    assert [node.tokens for node in shared_prefixes(prompts, least_saved=3)[0]] == [(1, 2, 3)]


def test_nested_prefixes_are_computed_once_and_exactly(target: HFTarget) -> None:
    system, shots = run_of(1, 40), run_of(2, 30)
    prompts = [system + shots + run_of(n, 5 + n % 3) for n in range(3, 7)] + [system + run_of(9, 12), system]
    counting = Counting(target.model)
    cache, output = prefill_shared(counting, prompts, 128, ["last", 1])
    assert output is not None
    suffixes = [8, 7, 6, 7, 12, 0]
    assert counting.computed <= 40 + 30 + len(prompts) * max(suffixes)
    for row, prompt in enumerate(prompts):
        alone = target.new_cache(1, len(prompt))
        expected = target.extend([prompt], alone, ["last", 1])
        assert cache.row_lengths[row] == len(prompt)
        for layer, buffers in alone.layers.items():
            keys, values = cache.entries(layer, row)
            torch.testing.assert_close(keys, buffers.keys[0])
            torch.testing.assert_close(values, buffers.values[0])
        for name in ("last", 1):
            torch.testing.assert_close(output.features[name][row, : len(prompt)], expected.features[name][0])
    cache.check_integrity()


def test_empty_prompts_have_nothing_to_cache(target: HFTarget) -> None:
    cache, output = prefill_shared(target, [()], 8)
    assert (cache.row_lengths, output) == ([0], None)
    cache, output = prefill_shared(target, [(), (3, 4)], 8)
    assert cache.row_lengths == [0, 2]
    assert output is not None


def test_rows_are_copied_between_caches() -> None:
    source, into = KVCache(2, 4), KVCache(3, 6)
    keys = torch.randn(2, 1, 3, 2)
    source.write(0, keys, 2 * keys, 0)
    source.advance([3, 2])
    into.copy_row(2, source, 1, 2)
    assert into.row_lengths == [0, 0, 2]
    assert torch.equal(into.layers[0].values[2, :, :2], 2 * keys[1, :, :2])
    into.check_integrity()
    with pytest.raises(ValueError, match="3 are asked for"):
        into.copy_row(0, source, 1, 3)
    with pytest.raises(ValueError, match="3 slots are needed"):
        KVCache(1, 2).copy_row(0, source, 0, 3)
