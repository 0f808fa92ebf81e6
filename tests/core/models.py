"""Small random models of every architecture served."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
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
    "initializer_range": 0.2,
}
_WINDOWED = {"sliding_window": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": _WINDOWED,
    "gemma2": {
        **_WINDOWED,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        **_WINDOWED,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": False,
    },
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "starcoder2": _WINDOWED,
    "cohere2": {**_WINDOWED, "num_hidden_layers": 4},
    "smollm3": {"num_hidden_layers": 4},
    "glm4": {"head_dim": 16},
    "ernie4_5": {},
    "gpt_oss": {**_WINDOWED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def random_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random float32 model in evaluation mode; the same for the same arguments."""
    values = {**_SMALL, **ARCHITECTURES[architecture], **changes}
    config = AutoConfig.for_model(architecture, **{k: v for k, v in values.items() if v is not None})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    with torch.no_grad():
        for parameter in model.parameters():  # sinks and the like start at a constant
            if parameter.ndim == 1 and bool((parameter == 0).all()):
                parameter.normal_(std=0.2)
    return model


def greedy_reference(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What ``model.generate`` writes after a prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
