"""Other libraries' ways to the results of our operations, where they are installed; else their imports raise."""
# mypy: disable-error-code="import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.benchmarks.kernels import Call
from specdec.kernels.w4a16 import Int4Weight

_WORKSPACE_BYTES = 128 * 2**20


def flashinfer_attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Call:
    """FlashInfer's prefill with a custom mask: arguments as for tree attention, rows of one length.

    Args:
        query: ``[B, H, n, d]``.
        keys: ``[B, H_kv, S, d]``.
        values: ``[B, H_kv, S, d]``.
        visible: ``[B, n, S]`` bool.
        scale: factor on the scores.
    """
    import flashinfer

    batch, num_heads, nodes, width = query.shape
    num_kv_heads, slots = keys.shape[1:3]
    if batch == 1:
        packed = flashinfer.packbits(visible[0].flatten(), bitorder="little")
        one = query[0].transpose(0, 1).contiguous()

        def single() -> Tensor:
            out: Tensor = flashinfer.single_prefill_with_kv_cache(
                one, keys[0], values[0], packed_custom_mask=packed, kv_layout="HND", sm_scale=scale
            )
            return out.transpose(0, 1).unsqueeze(0)

        return single
    rows = [t.transpose(1, 2).flatten(0, 1).contiguous() for t in (query, keys, values)]  # [B * n, H, d]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        starts * nodes, starts * slots, num_heads, num_kv_heads, width,
        custom_mask=visible.flatten(), sm_scale=scale, q_data_type=query.dtype,
    )  # fmt: skip

    def ragged() -> Tensor:
        out: Tensor = wrapper.run(*rows)
        return out.view(batch, nodes, num_heads, width).transpose(1, 2)

    return ragged


def gptq_words(codes: Tensor) -> Tensor:
    """``[N, K]`` codes of 4 bits as GPTQ's ``[K / 8, N]`` int32, eight inputs a word, the first in the lowest bits."""
    fields = codes.t().to(torch.int64).reshape(-1, 8, len(codes))  # [K / 8, 8, N]
    words = (fields << (4 * torch.arange(8, device=codes.device)).view(1, 8, 1)).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gemlite_product(inputs: Tensor, weight: Int4Weight) -> Call:
    """gemlite's product with the same codes, scales and zero points; scales rounded to the inputs' type."""
    from gemlite.core import DType, GemLiteLinearTriton

    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[inputs.dtype]
    linear: Any = GemLiteLinearTriton(
        4, group_size=weight.group_size, in_features=weight.num_inputs, out_features=weight.num_outputs,
        input_dtype=kind, output_dtype=kind,
    )  # fmt: skip
    scales, zeros = (t.to(inputs.dtype).reshape(-1, 1) for t in (weight.scales, weight.offsets))
    linear.pack(weight.unpack(), scales, zeros)
    return lambda: linear(inputs)


def marlin_product(inputs: Tensor, weight: Int4Weight) -> Call:
    """MARLIN (Frantar et al. 2024) as vLLM ships it, with zero points; scales rounded to the inputs' type."""
    from vllm import _custom_ops as operations
    from vllm.model_executor.layers.quantization.utils import marlin_utils as marlin
    from vllm.scalar_type import scalar_types

    device, num_inputs, num_outputs = inputs.device, weight.num_inputs, weight.num_outputs
    empty = torch.empty(0, dtype=torch.int32, device=device)
    packed = operations.gptq_marlin_repack(gptq_words(weight.unpack()), empty, num_inputs, num_outputs, 4)
    scales = marlin.marlin_permute_scales(
        weight.scales.t().contiguous().to(inputs.dtype), num_inputs, num_outputs, weight.group_size
    )
    groups = num_inputs // weight.group_size
    zeros = marlin.marlin_zero_points(weight.offsets.t().contiguous().to(torch.int32), groups, num_outputs, 4)
    workspace = marlin.marlin_make_workspace_new(device)
    return lambda: marlin.apply_awq_marlin_linear(
        input=inputs, weight=packed, weight_scale=scales, weight_zp=zeros, g_idx=empty, g_idx_sort_indices=empty,
        workspace=workspace, quant_type=scalar_types.uint4, output_size_per_partition=num_outputs,
        input_size_per_partition=num_inputs,
    )  # fmt: skip
