"""What other libraries are given is what ours have: layouts by the libraries' own rules, stood in for where needed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.benchmarks.kernel_peers import flashinfer_attention, gptq_words
from specdec.kernels.tree_attention import reference
from specdec.kernels.w4a16 import from_dense, from_gptq


def test_words_are_those_of_gptq() -> None:
    weight = from_dense(torch.randn(16, 256), 128)
    zeros = gptq_words(weight.offsets.t()).t()  # eight outputs a word: the same packing, turned
    again = from_gptq(gptq_words(weight.unpack()), zeros, weight.scales.t(), zeros_less_one=False)
    assert torch.equal(again.unpack(), weight.unpack())
    assert torch.equal(again.dequantize(), weight.dequantize())


class RaggedWrapper:
    """FlashInfer's wrapper as documented: rows of ``[tokens, heads, d]`` cut at the index pointers, a flat mask."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"

    def plan(
        self, qo: Tensor, kv: Tensor, heads: int, kv_heads: int, width: int, *, custom_mask: Tensor, sm_scale: float,
        q_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        self.qo, self.kv, self.mask, self.scale = qo.tolist(), kv.tolist(), custom_mask, sm_scale

    def run(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts, place = [], 0
        for i in range(len(self.qo) - 1):
            q, k, v = (
                t[at[i] : at[i + 1]].transpose(0, 1).unsqueeze(0)
                for t, at in ((query, self.qo), (keys, self.kv), (values, self.kv))
            )
            size = q.shape[2] * k.shape[2]
            mask = self.mask[place : place + size].view(1, q.shape[2], k.shape[2])
            place += size
            parts.append(reference.tree_attention(q, k, v, mask, self.scale)[0].transpose(0, 1))
        return torch.cat(parts)


def test_flashinfer_attends_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=RaggedWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    query, keys, values = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    visible = torch.rand(2, 3, 7) < 0.6
    visible[:, :, 0] = True
    out = flashinfer_attention(query, keys, values, visible, 0.5)()
    assert torch.allclose(out, reference.tree_attention(query, keys, values, visible, 0.5), atol=1e-6)
