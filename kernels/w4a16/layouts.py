"""Weights as published checkpoints hold them: GPTQ, AWQ and GGUF's Q4_1."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kernels.w4a16.weight import Int4Weight, pack_codes

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of eight, in each 4-bit field of an AWQ word, the lowest first."""
_Q4_1_BYTES = 20
_Q4_1_GROUP = 32


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, zeros_less_one: bool = True
) -> Int4Weight:
    """A linear layer of a 4-bit GPTQ checkpoint (Frantar et al. 2023; the layout of AutoGPTQ and GPTQModel).

    Args:
        qweight: ``[K / 8, N]`` int32, eight inputs a word, the first in the lowest bits.
        qzeros: ``[K / G, N / 8]`` int32, eight outputs a word.
        scales: ``[K / G, N]``.
        g_idx: ``[K]``, the group of each input.
        zeros_less_one: zero points are stored less 1 (``checkpoint_format`` "gptq"), or as they are ("gptq_v2").

    Raises:
        ValueError: for groups of inputs that are not neighbours (``desc_act``), or shapes that do not fit.
    """
    codes = _fields(qweight, range(8)).transpose(1, 2).flatten(0, 1)  # [K, N]
    zeros = _fields(qzeros, range(8)).flatten(1) + int(zeros_less_one)  # [K / G, N]
    group_size = codes.shape[0] // max(len(scales), 1)
    if g_idx is not None:
        neighbours = torch.arange(len(codes), device=g_idx.device) // max(group_size, 1)
        if not torch.equal(g_idx.to(torch.int64), neighbours):
            raise ValueError("g_idx does not group neighbouring inputs (desc_act): reorder the inputs, or dequantize")
    return _from_columns(codes, zeros, scales, group_size)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
    """A linear layer of a 4-bit AWQ checkpoint (Lin et al. 2024; the "gemm" layout of AutoAWQ).

    Args:
        qweight: ``[K, N / 8]`` int32, eight outputs a word, of columns 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up.
        qzeros: ``[K / G, N / 8]`` int32, the same.
        scales: ``[K / G, N]``.

    Raises:
        ValueError: for shapes that do not fit.
    """
    place = [_AWQ_ORDER.index(column) for column in range(8)]
    codes, zeros = (_fields(words, place).flatten(1) for words in (qweight, qzeros))
    return _from_columns(codes, zeros, scales, len(codes) // max(len(scales), 1))


def from_q4_1(blocks: Tensor) -> Int4Weight:
    """A weight in GGUF's Q4_1.

    Args:
        blocks: ``[N, K / 32 * 20]`` uint8: blocks of a float16 scale, a float16 minimum and 16 bytes of codes, the
            block's first 16 inputs in their low halves.

    Raises:
        ValueError: for rows that are no whole number of blocks.
    """
    if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] % _Q4_1_BYTES:
        raise ValueError(f"blocks must be [N, K / 32 * 20] uint8, got {tuple(blocks.shape)} {blocks.dtype}")
    parts = blocks.reshape(len(blocks), -1, _Q4_1_BYTES)
    head = parts[:, :, :4].contiguous().view(torch.float16)  # [N, K / 32, 2]
    codes = parts[:, :, 4:].flatten(1)
    return Int4Weight(codes.contiguous(), head[:, :, 0].contiguous(), head[:, :, 1].contiguous())


def _fields(words: Tensor, place: range | list[int]) -> Tensor:
    """``[a, b]`` int32 to ``[a, b, 8]``: entry i is the 4-bit field ``place[i]``."""
    if words.dtype != torch.int32 or words.ndim != 2:
        raise ValueError(f"packed words must be a matrix of int32, got {tuple(words.shape)} {words.dtype}")
    shifts = 4 * torch.tensor(list(place), device=words.device, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts) & 15


def _from_columns(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int) -> Int4Weight:
    """From codes ``[K, N]``, zero points and scales ``[K / G, N]``."""
    if zeros.shape != scales.shape or codes.shape[1] != scales.shape[1] or codes.shape[0] != group_size * len(scales):
        raise ValueError(
            f"codes {tuple(codes.shape)}, zero points {tuple(zeros.shape)} and scales {tuple(scales.shape)} do not "
            "fit: K x N, K / G x N and K / G x N are needed"
        )
    if group_size % 32:
        raise ValueError(f"groups of {group_size} inputs: the kernels have 32, 64 and 128")
    return Int4Weight(
        pack_codes(codes.t().contiguous(), group_size),
        scales.t().contiguous(),
        zeros.t().to(torch.uint8).contiguous(),
    )
