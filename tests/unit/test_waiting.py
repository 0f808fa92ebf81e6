"""What waiting prompts begin with alike: found over all of them, held for those that come, and for no longer."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from unit_rows import make_row

from specdec.batch import Row
from specdec.prefix import CommonPrefix, SharedWork, Stretch, common_prefixes, prefix_order
from specdec.segments import Segment, Share
from specdec.waiting import WaitingRows

LONG = [(7 * n + n // 5) % 90 for n in range(80)]
BLOCKS = st.lists(st.integers(0, 2), max_size=5).map(lambda blocks: tuple(token for token in blocks for _ in range(8)))
PROMPTS = st.lists(BLOCKS, min_size=1, max_size=12)


def rows_of(*prompts: list[int]) -> list[Row]:
    """Rows whose last token, which is not computed with the prompt, is the same."""
    return [make_row([*prompt, 95], 96) for prompt in prompts]


def compute(prefix: CommonPrefix | None) -> None:
    """As if it were prefilled."""
    for each in [] if prefix is None else prefix.missing:
        keys = torch.zeros(1, len(each.tokens), 1)
        each.finish(Stretch((Share(Segment({0: (keys, keys)}, len(each.tokens)), len(each.tokens)),), {}))


@given(PROMPTS)
def test_prompts_with_a_prefix_in_common_follow_each_other(prompts: list[tuple[int, ...]]) -> None:
    prefixes = common_prefixes(prompts)
    order = prefix_order(prefixes)
    assert sorted(order) == [*range(len(prompts))]
    lineages = [[] if prefix is None else prefix.missing for prefix in prefixes]
    for shared in {each for lineage in lineages for each in lineage}:
        places = [place for place, index in enumerate(order) if shared in lineages[index]]
        assert places == [*range(places[0], places[-1] + 1)]
    if not any(lineages):
        assert order == [*range(len(prompts))]


@given(PROMPTS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_no_more_is_held_than_planned_whichever_rows_end_first(
    prompts: list[tuple[int, ...]], places: int, chance: random.Random
) -> None:
    work, prefixes = SharedWork.of(prompts), common_prefixes(prompts)
    lineages = [[] if prefix is None else prefix.missing for prefix in prefixes]
    lengths = {each: len(each.tokens) - (0 if each.parent is None else len(each.parent.tokens))
               for lineage in lineages for each in lineage}  # fmt: skip
    waiting, running, begun = prefix_order(prefixes), [], set()
    while waiting:
        if len(running) == places:
            running.remove(chance.choice(running))
        running.append(waiting.pop(0))
        begun.update(lineages[running[-1]])
        needed = {each for index in [*running, *waiting] for each in lineages[index]} & begun
        assert sum(lengths[each] for each in needed) <= work.held(places)


def test_few_prefixes_are_planned_where_few_rows_run() -> None:
    prompts = [(*[family] * 30, row) for row in range(3) for family in range(6)]
    work = SharedWork.of(prompts)
    assert [work.held(rows) for rows in (1, 2, 18)] == [30, 60, 180]


def test_a_prefix_is_held_until_the_last_row_that_begins_with_it_is_taken() -> None:
    first, second, other, third = rows_of([*LONG, 1], [*LONG, 2], [5] * 30, [*LONG, 3])
    waiting = WaitingRows([first, second, other, third])
    rows, prefixes = waiting.take(1)
    assert rows == [first]
    assert prefixes[0] is not None
    assert prefixes[0].tokens == tuple(LONG)
    compute(prefixes[0])
    assert [each.tokens for each in waiting.held] == [tuple(LONG)]
    prefixes = waiting.take(2)[1]
    assert prefixes[0] is waiting.held[0]
    assert prefixes[1] is None
    assert waiting.take(1)[1] == waiting.held
    prefixes = []
    assert waiting.held == []


def test_rows_stand_in_the_order_they_came_or_next_to_what_they_share() -> None:
    rows = rows_of([*LONG, 1], [5] * 30, [*LONG, 2], [6] * 30, [*LONG[:40], 9])
    assert WaitingRows(rows).take(9)[0] == rows
    grouped = WaitingRows(rows, in_order=False).take(9)[0]
    assert [rows.index(row) for row in grouped] == [0, 2, 4, 1, 3]
    assert [rows.index(row) for row in WaitingRows(rows, share=False, in_order=False).take(9)[0]] == [0, 1, 2, 3, 4]


def test_rows_that_come_later_build_on_what_is_computed_and_on_what_is_being_computed() -> None:
    first, second, late, later = rows_of([*LONG, 1], [*LONG, 2], [*LONG[:50], 3], [*LONG, 4])
    waiting = WaitingRows([first, second])
    taken = waiting.take(1)[1][0]
    assert taken is not None
    waiting.append(late)
    assert waiting.prefix_of(late) is taken  # somebody computes it, so it is not computed twice in part
    assert taken.length_in(late.tokens[:-1]) == 50
    compute(taken)
    waiting.drop(second)
    waiting.foresee([later])
    assert waiting.prefix_of(later) is taken
    assert len(waiting) == 1
    waiting.foresee([])
    assert waiting.take(1)[1] == [taken]


def test_nothing_is_held_for_who_gives_up() -> None:
    first, second = rows_of([*LONG, 1], [*LONG, 2])
    waiting = WaitingRows([first, second])
    prefixes = waiting.take(1)[1]
    compute(prefixes[0])
    prefixes = []
    assert [each.tokens for each in waiting.held] == [tuple(LONG)]
    waiting.drop(second)
    assert waiting.held == []


def test_rows_foreseen_count_until_they_are_not() -> None:
    first, second, third = rows_of([*LONG, 1], [*LONG, 2], [*LONG, 3])
    waiting = WaitingRows([first])
    waiting.foresee([second, third])
    compute(waiting.take(1)[1][0])
    assert len(waiting) == 0
    waiting.foresee([third])
    assert len(waiting.held) == 1
    waiting.append(third)
    waiting.foresee([])
    assert waiting.take(1)[1] == waiting.held
    assert waiting.held == []
