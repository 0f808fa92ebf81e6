"""Greedy text equals ``model.generate`` token for token: every architecture, every drafter, alone and batched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from integration.architectures import (
    ARCHITECTURES,
    VOCAB,
    WINDOWED,
    describe_difference,
    generate_alone,
    logits_after,
    tiny_model,
)
from specdec import SpecDecoder, attention
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.registry import create_drafter
from specdec.target import HFTarget

PROMPTS = [[5, 6, 7, 8, 9] * 4, [9, 10, 11, 9, 10, 11, 9], [30, 31] * 6]
NEW_TOKENS = 20
DRAFTERS = (
    "none", "ngram", "suffix", "recycling", "lookahead", "skip", "model", "itself", "suffix+recycling", "suffix+skip",
)  # fmt: skip


def make_drafter(name: str, target: Any) -> Drafter:
    """``model`` is a stranger of the same vocabulary, ``itself`` drafts with the target's own weights."""
    if name in ("model", "itself"):
        draft = target if name == "itself" else tiny_model("llama", seed=9)
        return ModelDrafter(ModelConfig(depth=3), model=draft)
    return create_drafter(name)


@dataclass(frozen=True)
class Texts:
    """What one drafter made of the prompts."""

    alone: list[list[int]]
    batched: list[list[int]]
    accepted: int


@cache
def reference(architecture: str) -> tuple[Any, HFTarget, list[list[int]]]:
    """Model, target and transformers' own texts."""
    model = tiny_model(architecture)
    return model, HFTarget(model), [generate_alone(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


@cache
def texts(architecture: str, drafter: str) -> Texts:
    """Each prompt alone, then all of them in one batch, with one decoder."""
    model, target, _ = reference(architecture)
    decoder = SpecDecoder(target, make_drafter(drafter, model), on_drafter_error="raise", adaptive=False)
    alone, accepted = [], 0
    for prompt in PROMPTS:
        alone.append(decoder.generate(prompt, max_new_tokens=NEW_TOKENS).token_ids)
        accepted += decoder.stats.accepted
    batched = [result.token_ids for result in decoder.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]
    return Texts(alone, batched, accepted + decoder.stats.accepted)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_equals_generate(architecture: str, drafter: str) -> None:
    model, _, expected = reference(architecture)
    got = texts(architecture, drafter)
    for prompt, wanted, alone, batched in zip(PROMPTS, expected, got.alone, got.batched, strict=True):
        assert alone == wanted, describe_difference(model, prompt, wanted, alone)
        assert batched == wanted, describe_difference(model, prompt, wanted, batched)


@pytest.mark.parametrize("drafter", DRAFTERS[1:])
def test_every_drafter_is_accepted_somewhere(drafter: str) -> None:
    assert sum(texts(architecture, drafter).accepted for architecture in ARCHITECTURES) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_texts_compared_are_not_constant(architecture: str) -> None:
    _, _, expected = reference(architecture)
    assert len({token for text in expected for token in text}) > 5


@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_window_of_these_models_is_felt(architecture: str) -> None:
    """Else the comparison above would not notice a window that is ignored."""
    model, _, _ = reference(architecture)
    wide = tiny_model(architecture, sliding_window=200)
    assert not torch.allclose(logits_after(model, PROMPTS[0]), logits_after(wide, PROMPTS[0]), atol=1e-2)


def test_soft_capping_and_sinks_are_felt() -> None:
    capped, plain = tiny_model("gemma2"), tiny_model("gemma2", attn_logit_softcapping=None)
    assert not torch.allclose(logits_after(capped, PROMPTS[0]), logits_after(plain, PROMPTS[0]), atol=1e-2)
    sinking, floating = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    with torch.no_grad():
        for layer in floating.model.layers:
            layer.self_attn.sinks.fill_(-1e4)
    assert not torch.allclose(logits_after(sinking, PROMPTS[0]), logits_after(floating, PROMPTS[0]), atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_left_as_it_was(architecture: str) -> None:
    model, target, expected = reference(architecture)
    before = model.config._attn_implementation
    SpecDecoder(target, "recycling").generate(PROMPTS, max_new_tokens=3)
    assert model.config._attn_implementation == before
    assert generate_alone(model, PROMPTS[0], NEW_TOKENS) == expected[0]


def test_end_of_sequence_ends_a_text_where_generate_ends_it() -> None:
    """The texts above never hold the model's own end; this one is made to."""
    model = tiny_model("llama")
    free = generate_alone(model, PROMPTS[0], NEW_TOKENS)
    model.generation_config.eos_token_id = model.config.eos_token_id = free[7]
    expected = generate_alone(model, PROMPTS[0], NEW_TOKENS)
    assert len(expected) <= 8
    for name in DRAFTERS:
        result = SpecDecoder(model, make_drafter(name, model)).generate(PROMPTS[0], max_new_tokens=NEW_TOKENS)
        assert (result.token_ids, result.finish_reason) == (expected, "eos"), name


def test_repetition_penalty_equals_generates() -> None:
    model = tiny_model("llama")
    expected = [generate_alone(model, prompt, NEW_TOKENS, repetition_penalty=1.7) for prompt in PROMPTS]
    assert expected != [generate_alone(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    for name in DRAFTERS:
        decoder = SpecDecoder(model, make_drafter(name, model))
        results = decoder.generate(PROMPTS, max_new_tokens=NEW_TOKENS, repetition_penalty=1.7)
        assert [result.token_ids for result in results] == expected, name


def test_a_prompt_longer_than_a_prefill_chunk_equals_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.target.PREFILL_CHUNK", 5)
    for architecture in ("llama", "gemma2", "gpt2"):
        model, target, expected = reference(architecture)
        results = SpecDecoder(target, "recycling").generate(PROMPTS, max_new_tokens=NEW_TOKENS)
        for prompt, result, wanted in zip(PROMPTS, results, expected, strict=True):
            assert result.token_ids == wanted, describe_difference(model, prompt, wanted, result.token_ids)


def test_longrope_texts_end_where_its_angles_change() -> None:
    """Up to the length of the first training the text is generate's; beyond it cached keys would be wrong."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny_model("phi3", original_max_position_embeddings=16, rope_parameters=rope, sliding_window=None)
    prompt = PROMPTS[0][:8]
    for name in ("none", "recycling"):
        result = SpecDecoder(model, name).generate([prompt, [7]], max_new_tokens=40, ignore_eos=True)[0]
        assert (result.token_ids, result.finish_reason) == (generate_alone(model, prompt, 8), "context")


REFUSED = {
    "mamba": ({}, "recurrent state"),
    "bloom": ({}, r"layers \[0, 1\] of 2 bypass transformers' attention interface"),
    "gptj": ({"rotary_dim": 8}, r"layers \[0, 1\] of 2 bypass transformers' attention interface"),
    "bart": ({"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}, "takes no position_ids"),
    "jamba": ({}, "recurrent state"),
    "qwen3_next": ({}, "recurrent state"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "attention interface"),
    "diffllama": ({}, "layer 0 attends twice in a pass"),
    "bert": ({"is_decoder": False}, r"BertSelfAttention sees later tokens: load the model as a decoder"),
    # Every layer has attention and a recurrent part side by side: all of them pass through our attention.
    "falcon_h1": ({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}, "recurrent state"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_cannot_be_served_are_refused_with_the_reason(architecture: str) -> None:
    extra, reason = REFUSED[architecture]
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 4, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**small, **extra}))
    with pytest.raises(ValueError, match=reason):
        HFTarget(model)


def test_logits_that_are_not_the_models_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no configuration tells: here an attention that forgets to scale."""
    model = tiny_model("llama")
    HFTarget(model)
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: 1.5 * attend(*args, **kwargs))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be served: .* logits are \d+% off its own"):
        HFTarget(model)


def test_layers_that_use_the_keys_and_values_of_others() -> None:
    """Gemma 4's last layers may compute none of their own."""
    model = tiny_model("gemma4_text", num_kv_shared_layers=2)
    expected = [generate_alone(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    results = SpecDecoder(model, "suffix", adaptive=False).generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [result.token_ids for result in results] == expected


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        HFTarget(AutoModelForSeq2SeqLM.from_config(config))


def test_a_model_without_an_output_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        HFTarget(tiny_model("llama").model)
