"""Whole decoding through the Triton kernels: the texts of PyTorch's. Runs in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from integration.architectures import tiny_model

from specdec import SpecDecoder
from specdec import kernels as operations
from specdec.kernels import accept, tree_attention
from specdec.kernels.accept import triton as accept_triton
from specdec.kernels.tree_attention import triton as attention_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 6, 7, 8] * 3 + [5], [9, 10, 11]]  # longer than the windows; shorter
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def texts(model: Any, by_triton: bool, **options: Any) -> list[list[int]]:
    """With ``by_triton`` as on a GPU, else as without Triton."""
    serves = (lambda tensor: True) if by_triton else (lambda tensor: False)
    with (
        mock.patch.object(operations, "runs_triton", serves),
        mock.patch.object(tree_attention, "runs_triton", serves),
        mock.patch.object(accept, "runs_triton", serves),
    ):
        decoder = SpecDecoder(model, "ngram", adaptive=False, on_drafter_error="raise")
        results = decoder.generate(PROMPTS, max_new_tokens=5, ignore_eos=True, **options)
        return [result.token_ids for result in results]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"temperature": 0.0}),
        ("gemma2", {"temperature": 0.9, "seed": 3}),
        ("gpt_oss", {"temperature": 1.2, "top_k": 40, "repetition_penalty": 1.2, "seed": 3}),
    ],
)
def test_texts_are_those_of_pytorchs_kernels(name: str, options: dict[str, Any]) -> None:
    """Grouped heads, windows with a soft-cap, windows with sinks; greedy, coupled, coupled with filters."""
    model = tiny_model(name, **({} if name == "llama" else TWO_LAYERS)).to(DEVICE)
    expected = texts(model, False, **options)
    with (
        mock.patch.object(
            attention_triton, "tree_attention_with_lse", wraps=attention_triton.tree_attention_with_lse
        ) as attended,
        mock.patch.object(accept_triton, "accept", wraps=accept_triton.accept) as accepted,
    ):
        found = texts(model, True, **options)
    assert found == expected
    passes = accepted.call_count
    assert passes > 0
    assert attended.call_count >= passes * model.config.num_hidden_layers
