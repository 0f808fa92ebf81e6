"""Sampling parameters mean what they mean in transformers, and impossible ones are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.sampling import SamplingParams, apply_repetition_penalty, filter_logits, log_probs

ROWS, VOCAB = 64, 37


def random_logits(seed: int) -> Tensor:
    """``[ROWS, VOCAB]`` float64: no ties, and no sum so near a threshold that the order of adding decides."""
    return 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen_from(context: Tensor) -> Tensor:
    """``[R, V]`` mask of the tokens in ``context`` ``[R, L]``."""
    return torch.zeros(len(context), VOCAB, dtype=torch.bool).scatter_(1, context, True)


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "temperature 0.3": ({"temperature": 0.3}, TemperatureLogitsWarper(0.3)),
    "temperature 2": ({"temperature": 2.0}, TemperatureLogitsWarper(2.0)),
    "top-k 1": ({"temperature": 1.0, "top_k": 1}, TopKLogitsWarper(1)),
    "top-k 5": ({"temperature": 1.0, "top_k": 5}, TopKLogitsWarper(5)),
    "top-k beyond the vocabulary": ({"temperature": 1.0, "top_k": 99}, TopKLogitsWarper(99)),
    "top-p 0.1": ({"temperature": 1.0, "top_p": 0.1}, TopPLogitsWarper(0.1)),
    "top-p 0.9": ({"temperature": 1.0, "top_p": 0.9}, TopPLogitsWarper(0.9)),
    "min-p 0.05": ({"temperature": 1.0, "min_p": 0.05}, MinPLogitsWarper(0.05)),
    "min-p 0.7": ({"temperature": 1.0, "min_p": 0.7}, MinPLogitsWarper(0.7)),
}


@pytest.mark.parametrize(("options", "processor"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_each_filter_equals_transformers(options: dict[str, Any], processor: Any, seed: int) -> None:
    logits = random_logits(seed)

    mine = filter_logits(logits, SamplingParams(**options))

    torch.testing.assert_close(mine, processor(torch.zeros(ROWS, 0, dtype=torch.int64), logits.clone()))


@pytest.mark.parametrize("penalty", [0.8, 1.2, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty_equals_transformers_greedy_or_sampled(penalty: float, temperature: float) -> None:
    logits = random_logits(2)
    context = torch.randint(VOCAB, (ROWS, 9), generator=torch.Generator().manual_seed(2))

    mine = filter_logits(
        logits, SamplingParams(temperature=temperature, repetition_penalty=penalty), seen_from(context)
    )

    torch.testing.assert_close(mine, RepetitionPenaltyLogitsProcessor(penalty)(context, logits.clone()))


def test_all_filters_together_equal_the_scores_of_generate() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        initializer_range=1.0, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    prompt = torch.randint(VOCAB, (ROWS, 6), generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"temperature": 2.5, "top_k": 12, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.7}
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=1, output_scores=True,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip

    mine = filter_logits(out.logits[0], SamplingParams(**options), seen_from(prompt))

    torch.testing.assert_close(mine, out.scores[0])
    excluded = mine.isneginf().sum(-1)
    assert int(excluded.min()) >= VOCAB - 12
    assert int(excluded.max()) > VOCAB - 12, "nothing but top-k was active"


def test_each_filter_works_on_what_the_one_before_left() -> None:
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)

    def kept(**options: Any) -> list[int]:
        params = SamplingParams(temperature=1.0, **options)
        return filter_logits(probabilities.log(), params).isfinite()[0].nonzero().flatten().tolist()

    assert kept(top_p=0.65) == [0, 1]
    assert kept(top_k=3, top_p=0.75) == [0, 1]  # 0.7 of 0.9 left by top-k is enough, 0.7 of 1 would not be
    assert kept(top_p=0.75) == [0, 1, 2]
    assert kept(min_p=0.5) == [0, 1, 2]
    assert kept(top_p=0.65, min_p=0.5) == [0, 1]


def test_penalty_comes_before_temperature_and_temperature_before_top_p() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0]], dtype=torch.float64)
    seen = torch.tensor([[True, False, True]])
    scores = filter_logits(logits, SamplingParams(temperature=0.5, repetition_penalty=4.0), seen)

    assert scores.tolist() == [[1.0, 2.0, -8.0]]
    flat, steep = (SamplingParams(temperature=t, top_p=0.7) for t in (2.0, 0.5))
    assert filter_logits(logits, flat).isfinite().sum() == 2
    assert filter_logits(logits, steep).isfinite().sum() == 1


def test_greedy_ignores_every_filter_but_the_penalty() -> None:
    logits = random_logits(4)
    params = SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=0.9)

    assert torch.equal(filter_logits(logits, params), logits)


def test_most_probable_token_survives_the_smallest_top_p() -> None:
    logits = random_logits(5)

    kept = filter_logits(logits, SamplingParams(temperature=1.0, top_p=1e-9)).isfinite()

    assert torch.equal(kept, torch.nn.functional.one_hot(logits.argmax(-1), VOCAB).bool())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_float32_and_the_logits_are_left_alone(dtype: torch.dtype) -> None:
    logits = random_logits(6).to(dtype)
    before = logits.clone()
    seen = torch.ones_like(logits, dtype=torch.bool)

    scores = filter_logits(logits, SamplingParams(temperature=0.7, top_k=3, repetition_penalty=2.0), seen)

    assert scores.dtype == torch.float32
    assert torch.equal(logits, before)


def test_log_probs_normalise_what_the_filters_left() -> None:
    logits = random_logits(7)
    params = SamplingParams(temperature=0.9, top_k=4)

    probabilities = log_probs(logits, params).exp()

    assert torch.equal(probabilities > 0, filter_logits(logits, params).isfinite())
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(ROWS, dtype=torch.float64))


def test_penalty_of_excluded_tokens_leaves_them_excluded() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0]])

    assert apply_repetition_penalty(logits, torch.ones(1, 3, dtype=torch.bool), 2.0).tolist() == [[-torch.inf, 0, 0.5]]


def test_penalty_without_the_context_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.5 needs the tokens seen"):
        filter_logits(random_logits(0), SamplingParams(repetition_penalty=1.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be at least 0\.0, got -0\.1"),
        ({"temperature": float("nan")}, r"temperature must be at least 0\.0, got nan"),
        ({"temperature": float("inf")}, r"temperature must be at least 0\.0, got inf"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1\.1"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": -0.5}, r"min_p must be in \[0\.0, 1\.0\], got -0\.5"),
        ({"min_p": 1.5}, r"min_p must be in \[0\.0, 1\.0\], got 1\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0 \(1 is off\), got 0\.0"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty must be above 0 \(1 is off\), got inf"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"stop": ""}, "stop strings must not be empty"),
        ({"stop": ["a", ""]}, "stop strings must not be empty"),
    ],
)
def test_impossible_parameters_are_refused_with_name_value_and_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 1}, {"temperature": 0.0}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"min_p": 1.0}],
)
def test_bounds_themselves_are_allowed(options: dict[str, Any]) -> None:
    SamplingParams(**options)


def test_stop_settings_become_tuples_so_that_the_parameters_hash() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 4])

    assert (params.stop, params.stop_token_ids) == (("end",), (3, 4))
    assert hash(params) == hash(SamplingParams(stop=["end"], stop_token_ids=(3, 4)))
