"""Bad input gets a ValueError that names the value and the choices, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest

from integration.architectures import VOCAB, tiny_model
from integration.scripted import ScriptedDrafter, empty
from specdec import KeptPrefix, SamplingParams, SpecDecoder
from specdec.drafters.model import ModelDrafter


class FakeTokenizer:
    """Knows its vocabulary and nothing else."""

    chat_template = None

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}


@pytest.fixture(scope="module")
def decoder() -> SpecDecoder:
    return SpecDecoder(tiny_model(), "none")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([[1, 2], []], "the prompt is empty"),
        (["", [1]], "the prompt is empty"),
        ([1, VOCAB], "token 97, outside the vocabulary of 97"),
        ([-1, 3], "token -1, outside the vocabulary of 97"),
        ([1] * 256, "the prompt has 256 tokens, the model's context only 256"),
        ([[1], [1] * 300], "the prompt has 300 tokens, the model's context only 256"),
        ("text", "text prompts need a tokenizer"),
        ([{"role": "user", "content": "x"}], "no chat template"),
        ([{"role": "user"}], "message 0 needs 'role' and 'content'"),
        (7, "a prompt is text, token ids or chat messages, or a list of those; got int"),
        (None, "got NoneType"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(decoder: SpecDecoder, prompt: Any, message: str) -> None:
    for call in (decoder.generate, decoder.stream):
        with pytest.raises(ValueError, match=message):
            call(prompt)


def test_a_chat_needs_a_template() -> None:
    decoder = SpecDecoder(tiny_model(), "none", tokenizer=FakeTokenizer("a"))
    with pytest.raises(ValueError, match="no chat template: use generate"):
        decoder.chat([{"role": "user", "content": "x"}])


def test_the_longest_prompt_that_leaves_room_for_a_token_is_served(decoder: SpecDecoder) -> None:
    result = decoder.generate([1] * 255, max_new_tokens=5, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (1, "context")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0.0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0.0, got nan"),
        ({"temperature": float("inf")}, "temperature must be at least 0.0, got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": -0.1}, r"top_p must be in \(0, 1\], got -0.1"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"min_p": 2.0}, r"min_p must be in \[0.0, 1.0\], got 2.0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"stop": ""}, "stop strings must not be empty"),
        ({"stop": ["x", ""]}, "stop strings must not be empty"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
        ({"temprature": 1.0}, "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
        ({"max_tokens": 3}, "unknown sampling parameter 'max_tokens'; did you mean 'max_new_tokens'"),
    ],
)
def test_sampling_parameters_outside_their_range_are_refused(
    decoder: SpecDecoder, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder.generate([1, 2], SamplingParams(), **fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "ngrm"}, r"unknown drafter 'ngrm'; did you mean 'ngram'\? \(choices: clover, eagle, "),
        (
            {"drafter": "zzz"},
            r"unknown drafter 'zzz' \(choices: clover, eagle, .*medusa, model, ngram, none, ",
        ),
        (
            {"drafter": "ngram", "drafter_options": {"max_node": 3}},
            "unknown option of drafter 'ngram' 'max_node'; did you mean 'max_nodes'",
        ),
        ({"drafter": "none", "drafter_options": {"depth": 3}}, "unknown option of drafter 'none' 'depth'"),
        ({"drafter": "ngram", "drafter_options": {"max_nodes": "many"}}, "max_nodes must be of type int, got 'many'"),
        ({"drafter": "ngram", "drafter_options": {"max_nodes": "0"}}, "max_nodes must be at least 1, got 0"),
        ({"drafter": "ngram", "drafter_options": {"min_ngram": 5}}, "min_ngram <= max_ngram, got 5 and 4"),
        ({"drafter": "recycling", "drafter_options": {"candidates": 99}}, r"candidates must be in \[1, 8\], got 99"),
        ({"drafter": "recycling", "drafter_options": {"keep_between_calls": "maybe"}}, "must be true or false"),
        ({"drafter": "suffix", "drafter_options": {"min_probability": "2"}}, r"must be in \[0, 1\], got 2.0"),
        ({"drafter": "model", "drafter_options": {"depth": 2}}, "needs a draft model: -o model=NAME"),
        ({"drafter": "none", "verifier": "copled"}, "unknown verifier 'copled'; did you mean 'coupled'"),
        ({"drafter": "none", "on_drafter_error": "ignore"}, "'warn' or 'raise', got 'ignore'"),
        ({"drafter": ScriptedDrafter(empty), "drafter_options": {"depth": 1}}, "this drafter is constructed already"),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_nearest(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecDecoder(tiny_model(), **arguments)


def test_the_greedy_policy_refuses_to_sample() -> None:
    with pytest.raises(ValueError, match=r"the greedy verifier needs temperature 0, got 0.5"):
        SpecDecoder(tiny_model(), "none", verifier="greedy").generate([1], temperature=0.5)


def test_a_draft_model_of_another_vocabulary_size_is_refused() -> None:
    small = ModelDrafter(model=tiny_model(vocab_size=50))
    with pytest.raises(ValueError, match="the draft model has a vocabulary of 50, the target of 97"):
        SpecDecoder(tiny_model(), small)


def test_a_draft_model_of_the_same_size_and_another_vocabulary_is_refused() -> None:
    drafter = ModelDrafter(model=tiny_model(), tokenizer=FakeTokenizer("a", "b"))
    with pytest.raises(ValueError, match="tokenizers differ: 'a' is 0 for the draft model and 1 for the target"):
        SpecDecoder(tiny_model(), drafter, tokenizer=FakeTokenizer("b", "a"))
    same = SpecDecoder(tiny_model(), drafter, tokenizer=FakeTokenizer("a", "b"))
    assert same.drafter is drafter


def test_a_kept_prefix_serves_one_row_only(decoder: SpecDecoder) -> None:
    for prompts, fields in (([[1, 2], [3]], {}), ([1, 2], {"n": 2})):
        with pytest.raises(ValueError, match="a kept prefix serves one row, this call has 2"):
            decoder.stream(prompts, kept=KeptPrefix(), **fields)  # type: ignore[arg-type]


def test_a_refused_call_leaves_the_decoder_usable(decoder: SpecDecoder) -> None:
    expected = decoder.generate([1, 2], max_new_tokens=5).token_ids
    with pytest.raises(ValueError, match="empty"):
        decoder.generate([])
    assert decoder.generate([1, 2], max_new_tokens=5).token_ids == expected
