"""Acceptance in Triton: the best token of stretches of the vocabulary at every node, then the walk of each row."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.accept.acceptance import NUM_FIELDS, Acceptance

_BLOCK_V = 2048
_STRETCH = 8192  # tokens a program looks at
_NUM_FIELDS = tl.constexpr(NUM_FIELDS)


@triton.jit
def _hash32(x):
    """The mixing of ``specdec.sampling``, on uint32."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _gumbel(key, index):
    """``specdec.sampling.keyed_gumbel``: float64 until the last step, like there."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits = _hash32(_hash32(index.to(tl.uint32) ^ low) ^ high)
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit(do_not_specialize=["num_nodes", "num_levels", "stride_b", "num_stretches"])
def choice_kernel(
    logits, parents, keys, best, chosen, num_nodes, vocab_size, num_levels, temperature, stride_b, stride_n,
    num_stretches, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """The best score and its first token in one stretch of the vocabulary; token -1 where there is NaN.

    Program (stretch, node, row).
    """
    stretch = tl.program_id(0)
    node = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    key = tl.zeros([], tl.int64)
    if COUPLED:
        depth = tl.zeros([], tl.int64)
        above = tl.load(parents + row * num_nodes + node)
        while above >= 0:
            depth += 1
            above = tl.load(parents + row * num_nodes + above)
        key = tl.load(keys + row * num_levels + tl.minimum(depth, num_levels - 1))
    top = tl.full([], float("-inf"), tl.float32)
    token = tl.zeros([], tl.int32)
    unknown = tl.zeros([], tl.int32)
    for block in tl.static_range(BLOCKS):
        index = (stretch * BLOCKS + block) * BLOCK_V + tl.arange(0, BLOCK_V)
        inside = index < vocab_size
        scores = tl.load(
            logits + row * stride_b + node.to(tl.int64) * stride_n + index, mask=inside, other=float("-inf")
        ).to(tl.float32)
        if COUPLED:
            scores = tl.div_rn(scores, tl.zeros([BLOCK_V], tl.float32) + temperature) + _gumbel(key, index)
        unknown = tl.maximum(unknown, tl.max((scores != scores).to(tl.int32), 0))
        high, place = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.where(high > top, (stretch * BLOCKS + block) * BLOCK_V + place, token)
        top = tl.maximum(top, high)
    out = (row * num_nodes + node) * num_stretches + stretch
    tl.store(best + out, top)
    tl.store(chosen + out, tl.where(unknown != 0, -1, token))


@triton.jit(do_not_specialize=["num_nodes", "num_stretches"])
def walk_kernel(
    best, chosen, tokens, parents, packed, num_nodes, num_stretches,
    BLOCK_NODES: tl.constexpr, BLOCK_STRETCHES: tl.constexpr,
):  # fmt: skip
    """The walk of one row, from the stretches' best tokens to ``Acceptance.packed``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_NODES)
    there = column < num_nodes
    drafted = tl.load(tokens + row * num_nodes + column, mask=there, other=0)
    above = tl.load(parents + row * num_nodes + column, mask=there, other=-1)
    stretch = tl.arange(0, BLOCK_STRETCHES)
    node = tl.zeros([], tl.int32)
    accepted = tl.zeros([], tl.int32)
    bonus = tl.zeros([], tl.int32)
    path = tl.zeros([BLOCK_NODES], tl.int32)
    descends = tl.full([], 1, tl.int32)
    while descends != 0:
        at = (row * num_nodes + node) * num_stretches + stretch
        scores = tl.load(best + at, mask=stretch < num_stretches, other=float("-inf"))
        found = tl.load(chosen + at, mask=stretch < num_stretches, other=0)
        _, place = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
        bonus = tl.sum(tl.where(stretch == place, found, 0), 0)
        bonus = tl.where(tl.min(found, 0) < 0, -1, bonus)  # NaN in a stretch
        matches = there & (above == node) & (drafted == bonus)
        child = tl.min(tl.where(matches, column, BLOCK_NODES), 0)
        descends = ((child < BLOCK_NODES) & (bonus >= 0)).to(tl.int32)
        accepted += descends
        node = tl.where(descends != 0, child, node)
        path = tl.where((column >= accepted) & (descends != 0), node, path)
    out = packed + row * (num_nodes + _NUM_FIELDS)
    tl.store(out, accepted.to(tl.int64))
    tl.store(out + 1, bonus.to(tl.int64))
    tl.store(out + 2, (bonus < 0).to(tl.int64))
    tl.store(out + _NUM_FIELDS + column, path.to(tl.int64), mask=there)


def accept(
    logits: Tensor, tokens: Tensor, parents: Tensor, keys: Tensor | None = None, temperature: float = 1.0
) -> Acceptance:
    """See ``specdec.kernels.accept.accept``."""
    if logits.dtype == torch.float64:
        raise ValueError("the Triton kernel has float16, bfloat16 and float32; float64 runs elsewhere")
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens, parents = tokens.contiguous(), parents.contiguous()
    batch_size, num_nodes, vocab_size = logits.shape
    num_stretches = triton.cdiv(vocab_size, _STRETCH)
    shape = (batch_size, num_nodes, num_stretches)
    best = torch.empty(shape, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(shape, dtype=torch.int32, device=logits.device)
    packed = torch.empty((batch_size, NUM_FIELDS + num_nodes), dtype=torch.int64, device=logits.device)
    on_device = parents if keys is None else keys.to(logits.device, non_blocking=True).contiguous()
    choice_kernel[(num_stretches, num_nodes, batch_size)](
        logits, parents, on_device, best, chosen, num_nodes, vocab_size, on_device.shape[1], float(temperature),
        logits.stride(0), logits.stride(1), num_stretches,
        BLOCK_V=_BLOCK_V, BLOCKS=_STRETCH // _BLOCK_V, COUPLED=keys is not None, num_warps=4,
        enable_fp_fusion=False,  # the noise is to be the same everywhere
    )  # fmt: skip
    walk_kernel[(batch_size,)](
        best, chosen, tokens, parents, packed, num_nodes, num_stretches,
        BLOCK_NODES=triton.next_power_of_2(num_nodes), BLOCK_STRETCHES=triton.next_power_of_2(num_stretches),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return Acceptance(packed)
