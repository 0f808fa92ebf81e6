"""Tree attention in Triton: split over the keys, then merged by log-sum-exp (flash-decoding)."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.tree_attention.mask import TreeMask
from specdec.kernels.tree_attention.storage import PLAIN, KVFormat

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_MERGE_SPLITS = 16
_MAX_SPLITS = 128


@triton.jit
def _tanh(x):
    """tanh, accurate relative to its value where it is small (a soft-cap's argument mostly is)."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - t) / (1.0 + t)
    near = tl.abs(x)
    square = x * x
    near = near * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    size = tl.where(tl.abs(x) < 0.15, near, far)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _decode(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """Stored keys or values as ``dtype``; of fp8 (e4m3) the 256th part, whose bits are those of a float16."""
    if FP8:
        wide = x.to(tl.int32)
        return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True).to(dtype)
    return x.to(dtype)


@triton.jit
def _tree_block(
    q, m, total, acc, first, end, length, seq, kv_head, node, node_position, valid,
    keys, values, key_scales, value_scales, block_table, bits, depth,
    scale, softcap, window, num_nodes, num_tree, num_words,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_kcb, stride_kch, stride_kcs, stride_vcb, stride_vch, stride_vcs, stride_table,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, SCALED: tl.constexpr,
    FP8: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, sum and output of a tile of rows, brought up to date."""
    column = tl.arange(0, BLOCK_N)
    slot = first + column
    inside = slot < end
    d = tl.arange(0, BLOCK_D)[:, None]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    if PAGE:
        page = tl.load(block_table + seq * stride_table + slot // PAGE, mask=inside, other=0).to(tl.int64)
        place = slot % PAGE
        k_places = (keys + kv_head * stride_kh + page * stride_kb + place * stride_ks)[None, :] + d
        v_places = (values + kv_head * stride_vh + page * stride_vb + place * stride_vs)[:, None] + dv
    else:
        page = seq
        place = slot
        # One 64-bit base and offsets that are the same in every block: few registers.
        block = tl.zeros([], tl.int64) + first
        k_places = keys + seq * stride_kb + kv_head * stride_kh + block * stride_ks + (column * stride_ks)[None, :] + d
        v_places = (
            values + seq * stride_vb + kv_head * stride_vh + block * stride_vs + (column * stride_vs)[:, None] + dv
        )
    if MASKED:
        k = tl.load(k_places, mask=inside[None, :] & (d < D), other=0)
        v = tl.load(v_places, mask=inside[:, None] & (dv < DV), other=0)
    else:
        if D == BLOCK_D:
            k = tl.load(k_places)
        else:
            k = tl.load(k_places, mask=d < D, other=0)
        if DV == BLOCK_DV:
            v = tl.load(v_places)
        else:
            v = tl.load(v_places, mask=dv < DV, other=0)
    scores = tl.dot(q, _decode(k, q.dtype, FP8), input_precision=PRECISION)
    if SCALED:
        k_scale = tl.load(
            key_scales + page * stride_kcb + kv_head * stride_kch + place * stride_kcs, mask=inside, other=0.0
        ).to(tl.float32)
        scores = scores * ((k_scale * 256.0) if FP8 else k_scale)[None, :]
    if SOFTCAP:
        scores = softcap * LOG2E * _tanh(scores * (scale / softcap))
    else:
        scores = scores * (scale * LOG2E)
    if MASKED:
        seen = inside[None, :] & valid[:, None]
        relative = slot - length
        if TREE:
            ancestor = tl.zeros([q.shape[0], BLOCK_N], tl.int32)
            lowest = (first - length) >> 5
            for i in tl.static_range((BLOCK_N + 31) // 32 + 1):  # words that a block at any offset may reach into
                index = tl.zeros_like(node) + lowest + i
                word = tl.load(
                    bits + (seq * num_nodes + node) * num_words + index,
                    mask=valid & (index >= 0) & (index < num_words), other=0,
                )  # fmt: skip
                here = ((relative >> 5) == lowest + i)[None, :]
                ancestor = tl.where(here, word[:, None] >> (relative & 31)[None, :], ancestor)
            seen = seen & ((relative < 0)[None, :] | ((ancestor & 1) != 0))
        if WINDOW:
            deep = tl.load(depth + seq * num_tree + relative, mask=(relative >= 0) & inside, other=0)
            key_position = tl.where(relative >= 0, length + deep, slot)
            seen = seen & (node_position[:, None] - key_position[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(m, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(m - base)
    total = total * shrink + tl.sum(p, 1)
    if SCALED:
        v_scale = tl.load(
            value_scales + page * stride_vcb + kv_head * stride_vch + place * stride_vcs, mask=inside, other=0.0
        ).to(tl.float32)
        p = p * ((v_scale * 256.0) if FP8 else v_scale)[None, :]
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(q.dtype), _decode(v, q.dtype, FP8), acc, input_precision=PRECISION)
    return new, total, acc


@triton.jit(
    do_not_specialize=[
        "window", "num_nodes", "num_tree", "num_words", "part_stride", "first_part", "num_splits", "num_kv_heads",
        "stride_kcb", "stride_kch", "stride_kcs", "stride_vcb", "stride_vch", "stride_vcs", "stride_table",
    ]
)  # fmt: skip
def tree_attention_kernel(
    query, keys, values, key_scales, value_scales, block_table, lengths, bits, depth, row_ranges, sinks, out, lse,
    scale, softcap, window, num_nodes, num_tree, num_words, part_stride, first_part, num_splits, num_kv_heads,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_kcb, stride_kch, stride_kcs, stride_vcb, stride_vch, stride_vcs, stride_table,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    TREE: tl.constexpr, RANGES: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows (node, query head) of one KV head against one stretch of its keys.

    Program (tile, split, sequence * H_kv + head). A sequence is a batch row, or, with ``RANGES``, a range of batch rows
    that read the same keys.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    seq = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % num_kv_heads).to(tl.int64)
    if RANGES:
        first_row = tl.load(row_ranges + 2 * seq).to(tl.int64)
        num_queries = (tl.load(row_ranges + 2 * seq + 1).to(tl.int64) - first_row) * num_nodes
    else:
        first_row = seq
        num_queries = tl.zeros([], tl.int64) + num_nodes
    if tile * BLOCK_M >= num_queries * GROUP:
        return
    length = tl.load(lengths + seq)
    end = length + num_tree if TREE else length
    start = tl.maximum(length - window + 1, 0) // BLOCK_N * BLOCK_N if WINDOW else 0
    stretch = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N), num_splits) * BLOCK_N
    first = start + split * stretch
    last = tl.minimum(first + stretch, end)
    unmasked = first if WINDOW else tl.maximum(tl.minimum(last, length) // BLOCK_N * BLOCK_N, first)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    index = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    valid = index < num_queries
    batch = first_row + index // num_nodes
    node = index % num_nodes
    d = tl.arange(0, BLOCK_D)
    q_rows = query + batch * stride_qb + head * stride_qh + node.to(tl.int64) * stride_qn
    q = tl.load(q_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)
    node_position = tl.zeros([BLOCK_M], tl.int32)
    if WINDOW:
        own = num_tree - num_nodes + node
        node_position = length + tl.load(depth + seq * num_tree + own, mask=valid, other=0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for block in range(first, unmasked, BLOCK_N):
        m, total, acc = _tree_block(
            q, m, total, acc, block, last, length, seq, kv_head, node, node_position, valid,
            keys, values, key_scales, value_scales, block_table, bits, depth,
            scale, softcap, window, num_nodes, num_tree, num_words,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
            stride_kcb, stride_kch, stride_kcs, stride_vcb, stride_vch, stride_vcs, stride_table,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE, SOFTCAP, WINDOW, TREE, SCALED, FP8, False, PRECISION,
        )  # fmt: skip
    for block in range(unmasked, last, BLOCK_N):
        m, total, acc = _tree_block(
            q, m, total, acc, block, last, length, seq, kv_head, node, node_position, valid,
            keys, values, key_scales, value_scales, block_table, bits, depth,
            scale, softcap, window, num_nodes, num_tree, num_words,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
            stride_kcb, stride_kch, stride_kcs, stride_vcb, stride_vch, stride_vcs, stride_table,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE, SOFTCAP, WINDOW, TREE, SCALED, FP8, True, PRECISION,
        )  # fmt: skip

    row_lse = tl.where(total > 0.0, (m + tl.log2(tl.where(total > 0.0, total, 1.0))) * LN2, float("-inf"))
    factor = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    if SINKS:
        sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32)
        factor = factor / (1.0 + tl.exp(sink - row_lse))
    place = (batch * num_kv_heads * GROUP + head) * num_nodes + node
    place += (first_part + split).to(tl.int64) * part_stride
    dv = tl.arange(0, BLOCK_DV)
    tl.store(lse + place, row_lse, mask=valid)
    tl.store(
        out + place[:, None] * DV + dv[None, :], (acc * factor[:, None]).to(out.dtype.element_ty),
        mask=valid[:, None] & (dv[None, :] < DV),
    )  # fmt: skip


@triton.jit(do_not_specialize=["part_stride", "num_parts", "num_nodes", "num_heads"])
def merge_kernel(
    parts, part_lse, sinks, out, lse, part_stride, num_parts, num_nodes, num_heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one (row, head, node) from its parts, ``BLOCK_S`` at a time."""
    place = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    m = float("-inf") + tl.zeros([], tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, num_parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        there = part < num_parts
        row = part.to(tl.int64) * part_stride + place
        score = tl.load(part_lse + row, mask=there, other=float("-inf"))
        new = tl.maximum(m, tl.max(score, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp(score - base)
        shrink = tl.exp(m - base)
        # A part without keys was perhaps never written.
        held = tl.load(
            parts + row[:, None] * DV + dv[None, :], mask=(weight > 0.0)[:, None] & (dv[None, :] < DV), other=0.0
        )
        acc = acc * shrink + tl.sum(held * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        m = new
    row_lse = tl.where(total > 0.0, m + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    factor = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    if SINKS:
        sink = tl.load(sinks + (place // num_nodes) % num_heads).to(tl.float32)
        factor = factor / (1.0 + tl.exp(sink - row_lse))
    tl.store(lse + place, row_lse)
    tl.store(out + place * DV + dv, (acc * factor).to(out.dtype.element_ty), mask=dv < DV)


@dataclass(frozen=True)
class Config:
    """Tile of a launch: rows (node, query head), keys a step, warps and pipeline stages of a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_config(dtype: torch.dtype, num_rows: int, width: int) -> Config:
    """The tile for ``num_rows`` rows of a KV head, heads ``width`` wide.

    Chosen so that registers of sm_80 and sm_90 suffice, by the compiler's own account; not tuned by time.
    """
    block_m = min(64, max(16, triton.next_power_of_2(num_rows)))
    if dtype == torch.float32:  # no exact products on tensor cores: registers are what there is least of
        config = Config(16, 32 if width <= 128 else 16, 8, 2)
    elif width > 128:
        config = Config(min(block_m, 32), 32, 4, 2)
    else:
        config = Config(block_m, 64, 8 if block_m == 64 else 4, 3)
    if _is_amd():  # 64 KiB of local memory
        config = Config(config.block_m, min(config.block_n, 32), config.num_warps, 1)
    return config


def _is_amd() -> bool:
    if not isinstance(merge_kernel, triton.JITFunction):  # in the interpreter there is no device to ask
        return False
    return bool(triton.runtime.driver.active.get_current_target().backend == "hip")


def choose_splits(device: torch.device, num_programs: int, num_slots: int, block_n: int) -> int:
    """Splits that give each multiprocessor two programs, of at least four blocks of keys each; a power of two."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = min(2 * processors // max(num_programs, 1), num_slots // (4 * block_n), _MAX_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


@dataclass(frozen=True)
class Parts:
    """Attention over disjoint sets of keys, waiting to be merged.

    Attributes:
        out: ``[P, B, H, n, d_v]`` float32.
        lse: ``[P, B, H, n]`` float32; -inf marks a part that is not there, whose output is never read.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def allocate(cls, count: int, query: Tensor, width: int) -> Parts:
        """Room for ``count`` parts, all absent."""
        shape = (count, *query.shape[:3])
        out = torch.empty((*shape, width), dtype=torch.float32, device=query.device)
        return cls(out, torch.full(shape, -torch.inf, dtype=torch.float32, device=query.device))

    def merge(self, dtype: torch.dtype, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output in ``dtype`` and log-sum-exp of the union."""
        num_heads, num_nodes, width = self.out.shape[2:]
        out = torch.empty(self.out.shape[1:], dtype=dtype, device=self.out.device)
        lse = torch.empty(self.lse.shape[1:], dtype=torch.float32, device=self.out.device)
        merge_kernel[(lse.numel(),)](
            self.out, self.lse, sinks if sinks is not None else self.lse, out, lse,
            lse.numel(), len(self.lse), num_nodes, num_heads,
            DV=width, BLOCK_DV=triton.next_power_of_2(width), BLOCK_S=_MERGE_SPLITS, SINKS=sinks is not None,
            num_warps=2, enable_fp_fusion=True,
        )  # fmt: skip
        return out, lse


@dataclass(frozen=True)
class Launch:
    """One set of keys to attend to.

    Attributes:
        keys, values, storage: as for ``tree_attention``; B stands for sequences.
        lengths: ``[B]`` int32, slots of each sequence that every query sees.
        mask: the tree behind them; None where there is none.
        row_ranges: ``[B, 2]`` int32, first and past-the-last batch row that reads each sequence; None where row b reads
            sequence b.
        max_rows: batch rows of the largest range.
    """

    keys: Tensor
    values: Tensor
    storage: KVFormat
    lengths: Tensor
    mask: TreeMask | None = None
    row_ranges: Tensor | None = None
    max_rows: int = 1

    def num_programs(self, query: Tensor) -> tuple[Config, int]:
        """The tile, and the programs of one split."""
        num_kv_heads = self.keys.shape[1]
        rows = self.max_rows * query.shape[2] * (query.shape[1] // num_kv_heads)
        config = choose_config(query.dtype, rows, max(self.keys.shape[-1], self.values.shape[-1]))
        return config, triton.cdiv(rows, config.block_m) * len(self.lengths) * num_kv_heads

    def splits(self, query: Tensor) -> int:
        """How many parts it is best cut into."""
        config, programs = self.num_programs(query)
        slots = self.storage.num_slots(self.keys)
        if self.mask is not None and self.mask.window is not None:
            slots = min(slots, self.mask.window + self.mask.num_tree)
        return choose_splits(query.device, programs, slots, config.block_n)

    def run(
        self, query: Tensor, out: Tensor, lse: Tensor, scale: float, softcap: float | None, sinks: Tensor | None,
        num_splits: int, first_part: int = 0,
    ) -> None:  # fmt: skip
        """Write ``num_splits`` parts from ``first_part`` on."""
        config, programs = self.num_programs(query)
        fp8 = self.keys.dtype == torch.float8_e4m3fn
        keys, values = (_raw(t) for t in (self.keys, self.values))
        storage, mask = self.storage, self.mask
        key_scales, value_scales = (
            None if s is None else s.expand(self.keys.shape[:-1]) for s in (storage.key_scales, storage.value_scales)
        )
        num_kv_heads, width, width_v = keys.shape[1], keys.shape[-1], values.shape[-1]
        window = None if mask is None else mask.window
        table = storage.block_table
        nothing: Any = lse  # a pointer that is not followed
        grid = (programs // (len(self.lengths) * num_kv_heads), num_splits, len(self.lengths) * num_kv_heads)
        tree_attention_kernel[grid](
            query, keys, values,
            nothing if key_scales is None else key_scales, nothing if value_scales is None else value_scales,
            nothing if table is None else table, self.lengths,
            nothing if mask is None else mask.bits, nothing if mask is None else mask.depth32,
            nothing if self.row_ranges is None else self.row_ranges, nothing if sinks is None else sinks, out, lse,
            scale, softcap or 0.0, window or 0, query.shape[2], 0 if mask is None else mask.num_tree,
            0 if mask is None else mask.bits.shape[2], query.shape[0] * query.shape[1] * query.shape[2], first_part,
            num_splits, num_kv_heads,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            *((0, 0, 0) if key_scales is None else key_scales.stride()),
            *((0, 0, 0) if value_scales is None else value_scales.stride()),
            0 if table is None else table.stride(0),
            GROUP=query.shape[1] // num_kv_heads, D=width, DV=width_v,
            BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_DV=max(16, triton.next_power_of_2(width_v)),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAGE=0 if table is None else keys.shape[2],
            SOFTCAP=softcap is not None, WINDOW=window is not None, TREE=mask is not None,
            RANGES=self.row_ranges is not None, SCALED=key_scales is not None, FP8=fp8, SINKS=sinks is not None,
            PRECISION="ieee", num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def _raw(stored: Tensor) -> Tensor:
    """Last dimension contiguous; fp8 as bytes, decoded by the kernel on devices of any age."""
    stored = stored if stored.stride(-1) == 1 else stored.contiguous()
    return stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored


def tree_attention_with_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    storage: KVFormat = PLAIN,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``specdec.kernels.tree_attention.tree_attention_with_lse``; ``num_splits`` overrides the heuristic."""
    if query.dtype == torch.float64:
        raise ValueError("the Triton kernel has float16, bfloat16 and float32; float64 runs on the CPU")
    query = query if query.stride(-1) == 1 else query.contiguous()
    launch = Launch(keys, values, storage, mask.lengths32, mask if mask.num_tree else None)
    splits = launch.splits(query) if num_splits is None else num_splits
    if splits == 1:
        shape = (*query.shape[:3], values.shape[-1])
        out, lse = query.new_empty(shape), torch.empty(shape[:3], dtype=torch.float32, device=query.device)
        launch.run(query, out, lse, scale, softcap, sinks, 1)
        return out, lse
    parts = Parts.allocate(splits, query, values.shape[-1])
    launch.run(query, parts.out, parts.lse, scale, softcap, None, splits)
    return parts.merge(query.dtype, sinks)
