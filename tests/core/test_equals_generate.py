"""Greedy text equals ``model.generate`` token for token, on every architecture, with every drafter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ARCHITECTURES, VOCAB, greedy_reference, random_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from specdec import SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.kv_cache import KVCache
from specdec.registry import create_drafter
from specdec.target import HFTarget

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9, 10, 11, 9, 10], [30]]
NEW_TOKENS = 24


def drafters(model: Any) -> list[Drafter]:
    """One of each kind; the draft models are a stranger and the target itself."""
    named = [create_drafter(name) for name in ("none", "ngram", "suffix", "recycling")]
    stranger = ModelDrafter(ModelConfig(depth=3), model=random_model(seed=9))
    return [*named, stranger, ModelDrafter(ModelConfig(depth=3), model=model)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_equals_generate_with_every_drafter_alone_and_batched(architecture: str) -> None:
    model = random_model(architecture)
    expected = [greedy_reference(model, prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({token for text in expected for token in text}) > 5, "the random model's text is constant"
    target = HFTarget(model)
    for drafter in drafters(model):
        decoder = SpecDecoder(target, drafter, on_drafter_error="raise")
        alone = [decoder.generate(prompt, max_new_tokens=NEW_TOKENS).token_ids for prompt in PROMPTS]
        batched = [result.token_ids for result in decoder.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]
        assert alone == expected, drafter.name
        assert batched == expected, drafter.name
    assert decoder.stats.accepted > 0
    assert model.config._attn_implementation != "specdec_tree"
    assert greedy_reference(model, PROMPTS[0], NEW_TOKENS) == expected[0], "the model is left as it was"


@pytest.mark.parametrize("name", ["ngram", "suffix", "recycling"])
def test_training_free_drafters_are_accepted_on_repetitive_text(name: str) -> None:
    decoder = SpecDecoder(random_model(seed=1), name, on_drafter_error="raise")
    decoder.generate([1, 2, 3] * 20, max_new_tokens=120, ignore_eos=True)
    assert decoder.stats.accepted > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_equals_a_fresh_prefill_after_every_commit(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(architecture).double()
    target = HFTarget(model)
    decoder = SpecDecoder(target, ModelDrafter(ModelConfig(depth=3, beams=3), model=model), on_drafter_error="raise")
    snapshots: list[tuple[list[int], dict[int, tuple[torch.Tensor, torch.Tensor]]]] = []
    commit = KVCache.commit

    def spy(cache: KVCache, path: torch.Tensor, counts: list[int]) -> None:
        commit(cache, path, counts)
        cache.check_integrity()
        kept = {i: (b.keys.clone(), b.values.clone()) for i, b in cache.layers.items()}
        snapshots.append((cache.row_lengths, kept))

    monkeypatch.setattr(KVCache, "commit", spy)
    results = decoder.generate(PROMPTS[:2], max_new_tokens=10, ignore_eos=True)
    assert decoder.stats.accepted > 0
    whole = [prompt + result.token_ids for prompt, result in zip(PROMPTS, results, strict=False)]
    for lengths, layers in snapshots:
        if len(lengths) != 2:
            continue  # a row has ended
        for row, length in enumerate(lengths):
            fresh = target.new_cache(1, length)
            with torch.inference_mode():
                target.extend([whole[row][:length]], fresh)
            for layer, (keys, values) in layers.items():
                # float64 rounding of a few hundred operations on values of order 10
                torch.testing.assert_close(keys[row, :, :length], fresh.layers[layer].keys[0], rtol=0, atol=1e-9)
                torch.testing.assert_close(values[row, :, :length], fresh.layers[layer].values[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", ["mamba", "bloom", "gptj", "jamba"])
def test_models_that_cannot_be_served_are_refused_with_the_reason(architecture: str) -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB, "n_head": 4}
    small |= {"num_key_value_heads": 4, "n_embd": 64, "n_layer": 2, "rotary_dim": 8, "use_mamba_kernels": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **small))
    with pytest.raises(ValueError, match="attention interface"):
        HFTarget(model)


def test_encoder_decoders_are_refused() -> None:
    config = AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="encoder-decoder"):
        HFTarget(AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama4_text", {"attention_chunk_size": 8, "head_dim": 16, "intermediate_size_mlp": 96}, "within chunks"),
        ("phimoe", {"sliding_window": 8, "num_local_experts": 4}, "window of 8 tokens"),
        ("doge", {"sliding_window": 8}, "mask or bias of its own"),
    ],
)
def test_masks_that_do_not_reach_our_attention_are_refused(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    """Their text would be wrong without a word: the window stands only in the mask the model builds."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(architecture, **sizes, **heads, **ids, **settings)
    with pytest.raises(ValueError, match=message):
        HFTarget(AutoModelForCausalLM.from_config(config))
