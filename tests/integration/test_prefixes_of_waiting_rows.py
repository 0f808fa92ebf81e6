"""What prompts of a call begin with alike is computed and held once, though few of its rows run at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from integration.counting import VOCAB, Counting, counting_target
from specdec.benchmarks.prefix import caches_of
from specdec.decoder import SpecDecoder
from specdec.drafters.none import NoneDrafter
from specdec.memory import stored_bytes
from specdec.prefix import CommonPrefix, Stretch
from specdec.segments import Segment
from specdec.target import HFTarget

SYSTEM = [(5 * n + n // 7) % VOCAB for n in range(200)]
ALIKE = [[*SYSTEM, row, row + 1, 3, 4] for row in range(12)]
TOKEN_BYTES = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes of a float


def family(number: int, length: int = 60) -> list[int]:
    return [(number + 11 * n + n // 3) % VOCAB for n in range(length)]


NESTED = [[*SYSTEM, *family(number), row, 7, row] for row in range(3) for number in range(4)]


@pytest.fixture(scope="module")
def target() -> Counting:
    return counting_target()


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Segment]]]:
    """All that hold a common prefix; none is left at the end."""
    made: list[weakref.ref[Segment]] = []
    finish = CommonPrefix.finish

    def recorded(prefix: CommonPrefix, stretch: Stretch) -> None:
        made.extend(weakref.ref(share.segment) for share in stretch.shares[-1:])
        finish(prefix, stretch)

    monkeypatch.setattr(CommonPrefix, "finish", recorded)
    yield made
    assert made
    gc.collect()
    assert alive(made) == []


def alive(segments: list[weakref.ref[Segment]]) -> list[int]:
    """Lengths of those that somebody refers to."""
    return [segment.length for reference in segments if (segment := reference()) is not None]


class Reading(NoneDrafter):
    """Follows hidden states, and takes no rows while others run."""

    features = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, torch.Tensor] = {}

    def start(self, batch: Any, output: Any) -> None:
        self.see(batch.rows, output)

    def see(self, rows: Any, output: Any) -> None:
        for row, states in zip(rows, output.features["last"], strict=True):
            self.read[row.prompt_index] = states[: len(row.tokens) - 1].clone()


class Joining(Reading):
    """Takes rows in."""

    takes_rows = True

    def join(self, batch: Any, count: int, output: Any = None) -> None:
        self.see(batch.rows[-count:], output)


def make(target: HFTarget, drafter: Any = "none", **options: Any) -> SpecDecoder:
    return SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise", **options)


def alone(target: HFTarget, prompts: list[list[int]], **fields: Any) -> list[list[int]]:
    decoder = make(target)
    return [decoder.generate(prompt, **fields).token_ids for prompt in prompts]


def texts(results: list[Any]) -> list[list[int]]:
    return [result.token_ids for result in results]


@pytest.mark.parametrize("max_rows", [1, 3, 5, None])
@pytest.mark.parametrize("drafter", ["none", Reading, Joining])
def test_a_prefix_is_computed_once_for_all_rows_of_a_call(
    target: Counting, segments: list[weakref.ref[Segment]], max_rows: int | None, drafter: Any
) -> None:
    decoder = make(target, drafter if isinstance(drafter, str) else drafter(), max_rows=max_rows)
    target.computed = 0
    results = decoder.generate(ALIKE, max_new_tokens=1)
    assert target.computed == 200 + 12 * 3 + 12  # the prefix, the rest of each prompt, a new token of each
    assert len(segments) == 1
    assert texts(results) == alone(target, ALIKE, max_new_tokens=1)


@pytest.mark.parametrize("max_rows", [1, 2, 4])
def test_nested_prefixes_are_computed_once(
    target: Counting, segments: list[weakref.ref[Segment]], max_rows: int
) -> None:
    """Prompts come in an order in which neighbours share least."""
    target.computed = 0
    results = make(target, max_rows=max_rows).generate(NESTED, max_new_tokens=1)
    assert target.computed == 200 + 4 * 60 + 12 * 2 + 12
    assert len(segments) == 1 + 4
    assert texts(results) == alone(target, NESTED, max_new_tokens=1)


MIXED = [*NESTED[:8], [8, 8, 9], *ALIKE[:3]]
CHOICES: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}]


@pytest.fixture(scope="module")
def expected(target: Counting) -> list[list[list[int]]]:
    return [alone(target, MIXED, max_new_tokens=12, **choice) for choice in CHOICES]


@pytest.mark.parametrize("drafter", ["ngram", "suffix", "recycling"])
@pytest.mark.parametrize("max_rows", [2, 5])
def test_texts_are_those_of_each_row_alone(
    target: Counting, expected: list[list[list[int]]], drafter: str, max_rows: int
) -> None:
    decoder = make(target, drafter, max_rows=max_rows)
    for choice, each in zip(CHOICES, expected, strict=True):
        assert texts(decoder.generate(MIXED, max_new_tokens=12, **choice)) == each


@pytest.mark.parametrize("max_rows", [1, 2])
def test_completions_of_a_prompt_share_all_of_it(
    target: Counting, segments: list[weakref.ref[Segment]], max_rows: int
) -> None:
    fields: dict[str, Any] = {"max_new_tokens": 1, "n": 4, "temperature": 1.0, "seed": 0}
    target.computed = 0
    results = make(target, max_rows=max_rows).generate(NESTED[:2], **fields)
    assert target.computed == 200 + 2 * 62 + 8
    assert texts(results) == [text for prompt in NESTED[:2] for text in texts(make(target).generate(prompt, **fields))]


@pytest.mark.parametrize("drafter", [Reading, Joining])
def test_a_drafter_that_reads_hidden_states_sees_all_of_them(target: Counting, drafter: Any) -> None:
    several, one = drafter(), Reading()
    prompts = [*NESTED, ALIKE[0]]
    make(target, several, max_rows=2).generate(prompts, max_new_tokens=3)
    for index, prompt in enumerate(prompts):
        make(target, one).generate(prompt, max_new_tokens=1)
        torch.testing.assert_close(several.read[index], one.read[0])


def test_what_no_row_to_come_begins_with_is_released(target: Counting, segments: list[weakref.ref[Segment]]) -> None:
    """Families of three prompts each, one row at a time: no more than one family's prefix is there, and the call's."""
    most = 0
    with make(target, max_rows=1).stream(NESTED, max_new_tokens=2) as stream:
        for _ in stream:
            held = alive(segments)
            assert held.count(200) == 1
            most = max(most, len(held))
            del held
    assert most == 2
    assert len(segments) == 5


def test_an_abandoned_call_releases_its_prefixes(target: Counting, segments: list[weakref.ref[Segment]]) -> None:
    with make(target, max_rows=1).stream(NESTED, max_new_tokens=2) as stream:
        next(stream)
        assert sorted(alive(segments)) == [60, 200]


@pytest.mark.parametrize("max_rows", [1, 3])
def test_memory_is_one_prefix_and_the_suffixes_of_the_rows_that_run(
    target: Counting, segments: list[weakref.ref[Segment]], max_rows: int
) -> None:
    """Beside the rows a prompt is computed, which holds what is its own alone."""
    decoder, peak = make(target, max_rows=max_rows), 0
    with caches_of(target) as caches, decoder.stream(ALIKE, max_new_tokens=16) as stream:
        for _ in stream:
            held = [cache for reference in caches if (cache := reference()) is not None]
            layers = [part for reference in segments if (whole := reference()) for part in whole.layers.values()]
            parts = [part for cache in held for part in cache.tensors] + [part for pair in layers for part in pair]
            peak = max(peak, stored_bytes(parts))
            del held, layers, parts
    least = TOKEN_BYTES * (200 + max_rows * (3 + 16))
    assert least <= peak <= least + TOKEN_BYTES * (3 + 2 * max_rows)
    assert decoder.memory_plan is not None
    assert peak <= decoder.memory_plan.kv <= peak + TOKEN_BYTES * 3


def test_rows_that_wait_for_memory_share_too(target: Counting, segments: list[weakref.ref[Segment]]) -> None:
    three = make(target, max_rows=3)
    expected = texts(three.generate(ALIKE, max_new_tokens=1))
    assert three.memory_plan is not None
    tight = make(target, memory_budget=three.memory_plan.total)
    target.computed = 0
    assert texts(tight.generate(ALIKE, max_new_tokens=1)) == expected
    assert target.computed == 200 + 12 * 3 + 12
    assert tight.memory_plan is not None
    assert 3 <= tight.memory_plan.rows < 12
    with pytest.raises(ValueError, match="may be used"):  # not even one that holds all of its prompt
        make(target, memory_budget=three.memory_plan.total, share_prefixes=False).generate(ALIKE, max_new_tokens=1)
