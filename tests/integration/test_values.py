"""What numbers mean: log-probabilities, seeds, temperatures, and values of the wrong type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from integration.architectures import tiny_model
from specdec import SpecDecoder
from specdec.verifiers.match import CoupledVerifier

PROMPT = [5, 6, 7, 8, 5, 6, 7, 8, 5]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def test_logprobs_are_the_targets_own(model: Any) -> None:
    result = SpecDecoder(model, "recycling").generate(PROMPT, max_new_tokens=20, logprobs=True)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + result.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    chosen = torch.tensor(result.token_ids).unsqueeze(1)
    expected = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=1e-4)


def test_results_of_several_prompts_and_completions_are_prompt_major(model: Any) -> None:
    results = SpecDecoder(model, "none").generate([PROMPT, [9]], n=2, temperature=1.0, max_new_tokens=3)
    assert [(r.prompt_index, r.completion_index) for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_rejection_never_uses_noise_twice_in_rows_or_calls_that_share_a_seed() -> None:
    """Drafts may stem from other rows and earlier calls; noise shared with those would bias what is accepted."""
    model = tiny_model(initializer_range=0.15)
    decoder = SpecDecoder(model, "recycling", verifier="rejection")
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    first = [r.token_ids for r in decoder.generate([PROMPT] * 2, **settings)]
    second = [r.token_ids for r in decoder.generate([PROMPT] * 2, **settings)]
    assert len({tuple(tokens) for tokens in first + second}) == 4
    fresh = SpecDecoder(model, "recycling", verifier="rejection")
    assert [r.token_ids for r in fresh.generate([PROMPT] * 2, **settings)] == first


def test_a_lossless_policy_given_as_an_object_is_greedy_at_temperature_0(model: Any) -> None:
    expected = SpecDecoder(model, "none").generate(PROMPT, max_new_tokens=12).token_ids
    result = SpecDecoder(model, "none", verifier=CoupledVerifier()).generate(PROMPT, max_new_tokens=12, seed=1)
    assert (result.token_ids, result.stats.verifier) == (expected, "greedy")


def test_numpy_integers_are_token_ids(model: Any) -> None:
    decoder = SpecDecoder(model, "none")
    expected = decoder.generate(PROMPT, max_new_tokens=4).token_ids
    assert decoder.generate(list(np.array(PROMPT)), max_new_tokens=4).token_ids == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 1e-39}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list"),
    ],
)
def test_values_of_the_wrong_type_are_refused(model: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecDecoder(model, "none").generate(PROMPT, **fields)


def test_an_option_of_the_wrong_type_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="max_nodes must be of type int, got 'many'"):
        SpecDecoder(model, "ngram", drafter_options={"max_nodes": "many"})
