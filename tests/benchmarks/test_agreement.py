"""Differences that rounding explains are told from errors."""

from __future__ import annotations

import pytest
import torch

from specdec import SamplingParams, SpecDecoder
from specdec.benchmarks.agreement import check_candidates, compare, first_difference
from specdec.target import HFTarget

PROMPT = [10, 20, 30, 40]
GREEDY = SamplingParams(max_new_tokens=12)
COUPLED = SamplingParams(max_new_tokens=12, temperature=0.9, seed=5)


def plain(target: HFTarget, params: SamplingParams) -> list[int]:
    tokens: list[int] = SpecDecoder(target, "none").generate(PROMPT, params).token_ids
    return tokens


@pytest.mark.parametrize(
    ("left", "right", "index"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [1], 0), ([], [], None)],
)
def test_first_difference(left: list[int], right: list[int], index: int | None) -> None:
    assert first_difference(left, right) == index


@pytest.mark.parametrize("params", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("position", [0, 7])
def test_wrong_token_is_an_error(target: HFTarget, params: SamplingParams, position: int) -> None:
    tokens = plain(target, params)
    wrong = [*tokens[:position], (tokens[position] + 1) % 256, *tokens[position + 1 :]]
    found = compare(target, 3, PROMPT, tokens, wrong, params)
    assert found is not None
    assert (found.question_id, found.position) == (3, position)
    assert (found.plain_token, found.token) == (tokens[position], wrong[position])
    assert found.gap is not None
    assert found.gap > found.bound
    assert not found.rounding


@pytest.mark.parametrize("params", [GREEDY, COUPLED], ids=["greedy", "coupled"])
def test_scores_are_those_that_plain_decoding_chose_by(target: HFTarget, params: SamplingParams) -> None:
    tokens = plain(target, params)
    for position, token in enumerate(tokens):
        check = check_candidates(target, PROMPT, tokens[:position], token, token, params)
        assert check.gap == 0.0
        assert check.below_best <= check.bound < 1e-3


def test_gap_as_small_as_rounding_is_accepted(target: HFTarget) -> None:
    tokens = plain(target, GREEDY)
    twin = (tokens[5] + 1) % 256
    with torch.no_grad():
        head = target.model.lm_head.weight
        head[twin] = head[tokens[5]] * (1 - 1e-7)
    found = compare(target, 1, PROMPT, tokens, [*tokens[:5], twin], GREEDY)
    assert found is not None
    assert found.gap is not None
    assert found.gap <= found.bound < 1e-3
    assert found.rounding


def test_gap_slightly_larger_than_rounding_is_refused(target: HFTarget) -> None:
    tokens = plain(target, GREEDY)
    twin = (tokens[5] + 1) % 256
    with torch.no_grad():
        head = target.model.lm_head.weight
        head[twin] = head[tokens[5]] * (1 - 1e-3)
    found = compare(target, 1, PROMPT, tokens, [*tokens[:5], twin], GREEDY)
    assert found is not None
    assert not found.rounding


def test_two_near_equal_tokens_that_are_both_bad_are_an_error(target: HFTarget) -> None:
    tokens = plain(target, GREEDY)
    worst, twin = (tokens[5] + 1) % 256, (tokens[5] + 2) % 256
    with torch.no_grad():
        head = target.model.lm_head.weight
        head[worst] = -head[tokens[5]]
        head[twin] = head[worst]
    check = check_candidates(target, PROMPT, tokens[:5], worst, twin, GREEDY)
    assert check.gap <= check.bound
    assert not check.rounding


def test_text_that_ends_elsewhere_is_an_error(target: HFTarget) -> None:
    found = compare(target, 1, PROMPT, [1, 2, 3], [1, 2], GREEDY)
    assert found is not None
    assert (found.plain_token, found.token, found.gap, found.rounding) == (3, None, None, False)


def test_equal_texts_have_no_difference(target: HFTarget) -> None:
    assert compare(target, 1, PROMPT, [1, 2], [1, 2], GREEDY) is None


def test_one_token_of_prompt_and_the_penalty_are_served(target: HFTarget) -> None:
    params = SamplingParams(max_new_tokens=6, repetition_penalty=1.5)
    tokens = SpecDecoder(target, "none").generate([7], params).token_ids
    for position in (0, 5):
        check = check_candidates(target, [7], tokens[:position], tokens[position], tokens[position], params)
        assert check.below_best <= check.bound < 1e-3
