"""Models whose visibility does not reach our attention are refused: their text would be wrong without a word."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.target import HFTarget

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama4_text", {"attention_chunk_size": 8, "head_dim": 16, "intermediate_size_mlp": 96}, "within chunks"),
        ("phimoe", {"sliding_window": 8, "num_local_experts": 4}, "window of 8 tokens"),
        ("doge", {"sliding_window": 8}, "mask or bias of its own"),
    ],
)
def test_a_window_chunk_or_bias_in_a_mask_alone_is_refused(
    architecture: str, settings: dict[str, Any], message: str
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES, **settings))
    with pytest.raises(ValueError, match=message):
        HFTarget(model)


def test_a_window_as_long_as_the_context_is_no_reason_to_refuse() -> None:
    settings = {"sliding_window": 256, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **SIZES, **settings))
    assert HFTarget(model).max_context == 256
