"""Rows take the places of those that ended while others go on; no text shows it."""

from __future__ import annotations

from typing import Any

import pytest

from integration.architectures import tiny_model
from specdec.decoder import SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoneDrafter
from specdec.generation import Generation
from specdec.registry import create_drafter, create_verifier
from specdec.sampling import SamplingParams
from specdec.target import HFTarget

VOCAB = 96
PROMPTS = [
    [5, 9, 5, 9, 5],
    [60, 2, 60, 2, 60, 2, 60],
    [7],
    [33, 34, 35, 33, 34],
    [1, 2, 3, 4, 5, 6, 7, 8, 9],
    [5, 9, 5],
]
LENGTHS = [3, 24, 9, 16, 5, 12]


def make_model(seed: int, layers: int = 2) -> Any:
    return tiny_model(seed=seed, num_hidden_layers=layers, vocab_size=VOCAB, eos_token_id=None, bos_token_id=None)


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(make_model(1))


def run(
    target: HFTarget, drafter: Drafter, most_rows: int, params: dict[str, Any] | None = None
) -> tuple[int, list[list[int]]]:
    """Passes taken and texts of rows of different lengths, so many at a time."""
    decoder = SpecDecoder(target, drafter, adaptive=False)
    rows = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        fields = SamplingParams(max_new_tokens=length, **(params or {}))
        verifier = decoder._pick_verifier(fields)
        rows += decoder._make_rows([prompt], fields, verifier)
    generation = Generation(target, drafter, verifier, rows, raise_drafter_errors=True, most_rows=most_rows)
    count = sum(1 for _ in generation.passes())
    return count, [row.emitted for row in rows]


def drafters() -> dict[str, Any]:
    small = {"model": lambda: ModelDrafter(model=make_model(2, layers=1))}
    names = ("none", "ngram", "suffix", "recycling", "lookahead", "skip")
    return {name: lambda name=name: create_drafter(name) for name in names} | small


@pytest.mark.parametrize("name", ["none", "ngram", "suffix", "recycling", "lookahead", "skip", "model"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 4}, {"repetition_penalty": 1.3}], ids=str)
def test_texts_do_not_depend_on_how_many_run_at_a_time(target: HFTarget, name: str, params: dict[str, Any]) -> None:
    _, alone = run(target, NoneDrafter(), 1, params)
    assert [len(text) for text in alone] == LENGTHS
    for most_rows in (2, 3):
        assert run(target, drafters()[name](), most_rows, params)[1] == alone


def test_a_place_is_taken_as_soon_as_it_is_free(target: HFTarget) -> None:
    count, _ = run(target, NoneDrafter(), 2)
    # Without a draft a row takes a pass per token; two places, rows in order, none ever empty while one waits. What
    # joins has its prompt computed in a pass of the other row, where there is more of it than the pending token.
    places = [0, 0]
    for index, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        places[places.index(min(places))] += length + (index >= 2 and len(prompt) > 1)
    assert count == max(places)


def test_drafters_that_follow_hidden_states_get_all_rows_at_once(target: HFTarget) -> None:
    started: list[int] = []

    class Reading(NoneDrafter):
        features = ("last",)

        def start(self, batch: Any, output: Any) -> None:
            started.append(len(batch))

        def join(self, batch: Any, count: int) -> None:
            raise AssertionError("not to be asked")

    _, texts = run(target, Reading(), 4)
    assert texts == run(target, NoneDrafter(), 1)[1]
    assert started == [4, 2]


def test_a_drafter_that_fails_to_take_rows_in_is_left_out(target: HFTarget) -> None:
    class Failing(NoneDrafter):
        def join(self, batch: Any, count: int) -> None:
            raise RuntimeError("no room")

    decoder, verifier = SpecDecoder(target, Failing(), adaptive=False), create_verifier("greedy")
    rows = [decoder._make_rows([PROMPTS[0]], SamplingParams(max_new_tokens=n), verifier)[0] for n in (2, 4, 4)]
    generation = Generation(target, decoder.drafter, verifier, rows, most_rows=2)
    with pytest.warns(RuntimeWarning, match="no room"):
        for _ in generation.run():
            pass
    assert [len(row.emitted) for row in rows] == [2, 4, 4]
    assert generation.stats.speculation_off is not None


def test_a_call_decodes_no_more_rows_at_a_time_than_it_may(target: HFTarget) -> None:
    limited, free = (SpecDecoder(target, "ngram", adaptive=False, max_rows=rows) for rows in (2, None))
    texts = [[result.token_ids for result in each.generate(PROMPTS, max_new_tokens=12)] for each in (limited, free)]
    assert texts[0] == texts[1]
    assert free.stats.steps <= free.stats.passes <= len(PROMPTS) * free.stats.steps
    assert limited.stats.passes <= 2 * limited.stats.steps
    with pytest.raises(ValueError, match="max_rows must be a whole number, at least 1, got 0"):
        SpecDecoder(target, "ngram", max_rows=0)
