"""A target that counts the tokens it computes, over a model small enough to compute prompts again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.target import HFTarget

VOCAB = 96


class Counting(HFTarget):
    """Counts the tokens it computes, padding included."""

    computed = 0

    def _run(self, now: Any, tokens: Any, *args: Any) -> Any:
        self.computed += tokens.numel()
        return super()._run(now, tokens, *args)


def counting_target(max_position_embeddings: int = 2048) -> Counting:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, initializer_range=0.3, max_position_embeddings=max_position_embeddings, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    return Counting(LlamaForCausalLM(config))
