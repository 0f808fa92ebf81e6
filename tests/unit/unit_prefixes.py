"""A target for tests of prefixes, and tokens for it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.target import HFTarget


def prefix_target() -> HFTarget:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.3, max_position_embeddings=512,
    )  # fmt: skip
    return HFTarget(LlamaForCausalLM(config))


def run_of(token: int, count: int) -> tuple[int, ...]:
    return tuple((token + 7 * index) % 64 for index in range(count))
