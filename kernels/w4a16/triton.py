"""The product with a 4-bit weight in Triton: few rows split over the inputs, and unpacking for many rows."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.w4a16.weight import Int4Weight

MAX_ROWS = 64
"""Rows up to which codes are unpacked inside the product where nothing was measured."""
DEQUANTIZE = "dequantize"
_MAX_SPLITS = 16


@triton.jit
def _unpack(code, scale, base, dtype: tl.constexpr):
    """Weights from codes of 0 to 15, without a conversion: the code's bits make 16 + code as a float32's fraction."""
    return (((code << 19) | 0x41800000).to(tl.float32, bitcast=True) * scale + base).to(dtype)


@triton.jit
def _weights(
    codes, scales, offsets, block, n, num_outputs, num_groups, ZEROS: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The low and the high halves of a block of weights, ``[BLOCK_N, BLOCK_K / 2]`` each."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    byte = block * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    group = block * GROUPS + tl.arange(0, GROUPS)
    row = n.to(tl.int64)[:, None]
    there = (n < num_outputs)[:, None]
    num_bytes = num_groups * (GROUP // 2)
    in_bytes = there if EVEN else there & (byte < num_bytes)[None, :]
    in_groups = there if EVEN else there & (group < num_groups)[None, :]
    packed = tl.load(codes + row * num_bytes + byte[None, :], mask=in_bytes, other=0).to(tl.int32)
    scale = tl.load(scales + row * num_groups + group[None, :], mask=in_groups, other=0.0).to(tl.float32)
    offset = tl.load(offsets + row * num_groups + group[None, :], mask=in_groups, other=0).to(tl.float32)
    if ZEROS:
        base = (-16.0 - offset) * scale
    else:
        base = offset - 16.0 * scale
    if GROUPS > 1:
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [BLOCK_N, GROUPS, GROUP // 2]), [BLOCK_N, BLOCK_K // 2])
        base = tl.reshape(tl.broadcast_to(base[:, :, None], [BLOCK_N, GROUPS, GROUP // 2]), [BLOCK_N, BLOCK_K // 2])
    return _unpack(packed & 15, scale, base, dtype), _unpack(packed >> 4, scale, base, dtype)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def few_rows_kernel(
    inputs, codes, scales, offsets, out, num_rows, num_outputs, num_groups, blocks_per_split, stride,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` outputs of ``BLOCK_M`` rows over one stretch of the inputs, to ``out [splits, M, N]``.

    Program (outputs, split, rows). The weight is the left operand: it goes from registers to the tensor cores, whose
    tiles have more rows than there are rows of inputs.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    half = tl.arange(0, BLOCK_K // 2)
    low = half // (GROUP // 2) * GROUP + half % (GROUP // 2)  # input, within a block, of a byte's low half
    x_rows = inputs + m.to(tl.int64)[None, :] * stride
    num_inputs = num_groups * GROUP
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(num_inputs, BLOCK_K))
    for block in range(first, last):
        k = block * BLOCK_K + low
        inside = (m < num_rows)[None, :]
        if not EVEN:
            inside = inside & (k < num_inputs)[:, None]
        x_low = tl.load(x_rows + k[:, None], mask=inside, other=0.0)
        x_high = tl.load(x_rows + k[:, None] + GROUP // 2, mask=inside, other=0.0)
        w_low, w_high = _weights(
            codes, scales, offsets, block, n, num_outputs, num_groups, ZEROS, EVEN, GROUP, BLOCK_N, BLOCK_K,
            inputs.dtype.element_ty,
        )  # fmt: skip
        acc = tl.dot(w_low, x_low, acc)
        acc = tl.dot(w_high, x_high, acc)
    place = (split * num_rows + m).to(tl.int64)[None, :] * num_outputs + n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < num_rows)[None, :] & (n < num_outputs)[:, None])


@triton.jit(do_not_specialize=["size", "num_splits"])
def sum_kernel(parts, out, size, num_splits, BLOCK: tl.constexpr):
    """The splits ``[S, size]`` added up, in their order: the same bits every time."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.zeros([], tl.int64) + size
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        acc += tl.load(parts + split * wide + place, mask=place < size, other=0.0)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=place < size)


@triton.jit
def dequantize_kernel(
    codes, scales, offsets, out, num_outputs, num_groups,
    ZEROS: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of the dense weight ``[N, K]``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    half = tl.arange(0, BLOCK_K // 2)
    k = block * BLOCK_K + half // (GROUP // 2) * GROUP + half % (GROUP // 2)
    low, high = _weights(
        codes, scales, offsets, block, n, num_outputs, num_groups, ZEROS, EVEN, GROUP, BLOCK_N, BLOCK_K,
        out.dtype.element_ty,
    )  # fmt: skip
    place = out + n.to(tl.int64)[:, None] * (num_groups * GROUP) + k[None, :]
    inside = (n < num_outputs)[:, None] & (k < num_groups * GROUP)[None, :]
    tl.store(place, low, mask=inside)
    tl.store(place + GROUP // 2, high, mask=inside)


@dataclass(frozen=True)
class Config:
    """How the few-row kernel is cut: outputs and inputs of a block, splits of the inputs, warps, pipeline stages."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """For the table of choices."""
        return f"split n{self.block_n} k{self.block_k} s{self.splits} w{self.num_warps} p{self.num_stages}"

    @classmethod
    def parse(cls, name: str) -> Config:
        """The configuration of a name; raises ValueError where it is none."""
        found = re.fullmatch(r"split n(\d+) k(\d+) s(\d+) w(\d+) p(\d+)", name)
        if found is None:
            raise ValueError(
                f"unknown implementation {name!r} of w4a16; choose {DEQUANTIZE!r} or as {CONFIGS[0].name!r}"
            )
        return cls(*map(int, found.groups()))


CONFIGS = tuple(
    Config(block_n, block_k, splits, 4, stages)
    for block_n, block_k, stages in ((64, 128, 3), (64, 128, 4), (128, 128, 3), (64, 256, 2))
    for splits in (1, 2, 4, 8)
)
"""What is measured for the table of choices, and held to the devices by the compile test."""


def configs_for(num_rows: int) -> tuple[Config, ...]:
    """Those of ``CONFIGS`` that have the registers for so many rows; larger blocks spill above 16."""
    return tuple(config for config in CONFIGS if num_rows <= 16 or config.block_n * config.block_k <= 64 * 128)


def candidates(num_rows: int) -> list[str]:
    """Names of the implementations worth measuring for so many rows."""
    return [*(config.name for config in configs_for(num_rows) if num_rows <= 4 * MAX_ROWS), DEQUANTIZE]


def default(num_rows: int, weight: Int4Weight) -> str:
    """The implementation where none was measured: four programs for each multiprocessor, of at least 4 blocks."""
    if num_rows > MAX_ROWS:
        return DEQUANTIZE
    device = weight.codes.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    programs = triton.cdiv(weight.num_outputs, 64)
    wanted = min(4 * processors // programs, weight.num_inputs // (4 * 128), _MAX_SPLITS)
    return Config(64, 128, 1 << max(wanted, 1).bit_length() - 1, 4, 3).name


def w4a16(inputs: Tensor, weight: Int4Weight, implementation: str) -> Tensor:
    """Product ``[M, N]`` of ``[M, K]`` inputs in float16 or bfloat16; of other types by "dequantize".

    Raises:
        ValueError: for an unknown implementation.
    """
    if implementation == DEQUANTIZE or inputs.dtype not in (torch.float16, torch.bfloat16):
        return torch.nn.functional.linear(inputs, dequantize(weight, inputs.dtype))
    return few_rows(inputs, weight, Config.parse(implementation))


def few_rows(inputs: Tensor, weight: Int4Weight, config: Config) -> Tensor:
    """Codes unpacked inside the product; float32 sums over each split, added up in order."""
    inputs = inputs if inputs.stride(-1) == 1 else inputs.contiguous()
    num_rows, num_outputs = inputs.shape[0], weight.num_outputs
    num_blocks = triton.cdiv(weight.num_inputs, config.block_k)
    per_split = triton.cdiv(num_blocks, min(config.splits, num_blocks))
    splits = triton.cdiv(num_blocks, per_split)
    out = torch.empty((num_rows, num_outputs), dtype=inputs.dtype, device=inputs.device)
    if num_rows == 0:
        return out
    parts = out
    if splits > 1:
        parts = torch.empty((splits, num_rows, num_outputs), dtype=torch.float32, device=inputs.device)
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    few_rows_kernel[(triton.cdiv(num_outputs, config.block_n), splits, triton.cdiv(num_rows, block_m))](
        inputs, weight.codes, weight.scales, weight.offsets, parts,
        num_rows, num_outputs, weight.scales.shape[1], per_split, inputs.stride(0),
        ZEROS=weight.has_zero_points, EVEN=weight.num_inputs % config.block_k == 0, GROUP=weight.group_size,
        BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        grid = (triton.cdiv(out.numel(), 1024),)
        sum_kernel[grid](parts, out, out.numel(), splits, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return out


def dequantize(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[N, K]``, computed in float32 and rounded to ``dtype``."""
    out = torch.empty((weight.num_outputs, weight.num_inputs), dtype=dtype, device=weight.codes.device)
    block_k = 256
    grid = (triton.cdiv(weight.num_outputs, 32), triton.cdiv(weight.num_inputs, block_k))
    dequantize_kernel[grid](
        weight.codes, weight.scales, weight.offsets, out, weight.num_outputs, weight.scales.shape[1],
        ZEROS=weight.has_zero_points, EVEN=weight.num_inputs % block_k == 0, GROUP=weight.group_size,
        BLOCK_N=32, BLOCK_K=block_k, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out
