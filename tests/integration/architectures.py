"""Small random models of every architecture the library promises to serve, and what transformers says of them.

Weights are drawn wide (``initializer_range``) so that greedy text is not constant; windows are shorter than the
sequences of the tests so that they matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

VOCAB = 97
WINDOW = 8

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_WINDOW = {"sliding_window": WINDOW}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, **_WINDOW}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {
        "use_sliding_window": True,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        **_WINDOW,
    },
    "qwen3": {"head_dim": 24},
    "mistral": _WINDOW,
    "gemma2": {
        **_ALTERNATING,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        **_ALTERNATING,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": False,
    },
    "gemma4_text": {
        **_ALTERNATING,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "tie_word_embeddings": False,
    },
    "phi3": _WINDOW,
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "gpt_neox": {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "starcoder2": _WINDOW,
    "cohere2": _ALTERNATING,
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "gpt_oss": {
        **_ALTERNATING,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOW},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "glm4": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
}
"""Configuration by ``model_type``, on top of what all share."""

WINDOWED = sorted(name for name, values in ARCHITECTURES.items() if "sliding_window" in values)
EAGER_ONLY = ("gemma2", "gpt_oss")
"""Soft-capping and sinks: the reference's fused attention leaves them out, its eager one computes them."""


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random float32 model in evaluation mode; equal arguments give equal weights."""
    config = AutoConfig.for_model(architecture, **{**_SMALL, **ARCHITECTURES[architecture], **changes})
    torch.manual_seed(seed)
    attention = "eager" if architecture in EAGER_ONLY else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    with torch.no_grad():
        for parameter in model.parameters():  # biases, sinks and the like start at a constant
            if parameter.ndim == 1 and bool((parameter == 0).all()):
                parameter.normal_(std=0.3)
    return model


def generate_alone(model: Any, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> list[int]:
    """What ``model.generate`` greedily writes after one prompt, unpadded."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def logits_after(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """``[V]`` transformers' own logits after the tokens, in one pass without a cache."""
    logits: torch.Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
    return logits


@torch.inference_mode()
def prefilled(model: Any, tokens: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the keys and values ``[H_kv, S, d]`` that transformers itself caches for the tokens."""
    cache = DynamicCache()  # without the model's configuration: no layer forgets what left its window
    model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def describe_difference(model: Any, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]) -> str:
    """Where two texts part, and how far apart the model holds the two tokens: below 1e-4, choose another seed."""
    pairs = enumerate(zip(expected, got, strict=False))
    at = next((index for index, (left, right) in pairs if left != right), None)
    if at is None:
        return f"one text ends early: {len(expected)} and {len(got)} tokens"
    logits = logits_after(model, [*prompt, *expected[:at]])
    gap = float((logits[expected[at]] - logits[got[at]]).abs())
    return f"token {at}: expected {expected[at]}, got {got[at]}, logits {gap:.2e} apart"
