"""What ``specdec bench kernels`` measures. An operation is added by a function of its cases, entered in OPERATIONS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.benchmarks.kernel_peers import flashinfer_attention, gemlite_product, marlin_product
from specdec.benchmarks.kernels import Call, Cases, KernelCase
from specdec.kernels.accept import accept, noise_keys
from specdec.kernels.accept import reference as accept_reference
from specdec.kernels.shared_prefix import PrefixLevel, shared_prefix
from specdec.kernels.shared_prefix import reference as prefix_reference
from specdec.kernels.tree_attention import KVFormat, TreeMask, tree_attention
from specdec.kernels.tree_attention import reference as tree_reference
from specdec.kernels.w4a16 import ChoiceTable, from_dense, measure_choices, w4a16
from specdec.kernels.w4a16 import reference as w4a16_reference
from specdec.sampling import PositionNoise

_HEADS, _KV_HEADS, _WIDTH = 32, 8, 128  # of Llama 8B
_PAGE = 16


def _normal(seed: int, device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def _parents(num_nodes: int) -> Tensor:
    """A binary tree in breadth-first order, ``[N]``; -1 for the root."""
    return (torch.arange(num_nodes) - 1).div(2, rounding_mode="floor")


def _mask(device: torch.device, batch_size: int, length: int, num_nodes: int) -> TreeMask:
    ancestors = torch.eye(num_nodes, dtype=torch.bool)
    for node, parent in enumerate(_parents(num_nodes).tolist()):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    rows = ancestors.expand(batch_size, -1, -1).contiguous().to(device)
    return TreeMask(torch.full((batch_size,), length, device=device), rows, rows.sum(-1) - 1)


def tree_attention_cases(device: torch.device, small: bool) -> list[KernelCase]:
    """Llama 8B's heads and a tree of 64 nodes over 4k to 32k tokens."""
    if small:
        return [_tree_case(device, 2, 200, 7)]
    return [_tree_case(device, batch, length, 64) for batch in (1, 16) for length in (4096, 32768)]


def _tree_case(device: torch.device, batch: int, length: int, nodes: int) -> KernelCase:
    mask, scale = _mask(device, batch, length, nodes), _WIDTH**-0.5
    visible = mask.dense(length + nodes)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        query = _normal(seed, device, batch, nodes, _HEADS, _WIDTH).transpose(1, 2)
        keys, values = (_normal(seed + i, device, batch, _KV_HEADS, length + nodes, _WIDTH) for i in (1000, 2000))
        return query, keys, values

    contenders: dict[str, Callable[[Any], Call]] = {"sdpa": lambda x: lambda: _sdpa(x[0], x[1], x[2], visible, scale)}
    if device.type == "cuda":
        contenders["flex_attention"] = _flex(visible, scale)
        contenders["flashinfer"] = lambda x: flashinfer_attention(x[0], x[1], x[2], visible, scale)
    slots = batch * (length + nodes)
    return KernelCase(
        {"batch": batch, "context": length, "nodes": nodes},
        make,
        lambda x: lambda: tree_attention(x[0], x[1], x[2], mask, scale),
        2 * (2 * slots * _KV_HEADS + 2 * batch * nodes * _HEADS) * _WIDTH,
        4 * slots * nodes * _HEADS * _WIDTH,
        contenders,
        lambda x: tree_reference.tree_attention_with_lse(x[0], x[1], x[2], mask, scale)[0],
    )


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible.unsqueeze(1), scale=scale, enable_gqa=True
    )


def _flex(visible: Tensor, scale: float) -> Any:
    """One mask for all buffers, so that it is compiled once."""
    made: list[Any] = []

    def bind(operands: tuple[Tensor, Tensor, Tensor]) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def rule(b: Tensor, _: Tensor, node: Tensor, slot: Tensor) -> Tensor:
            return visible[b, node, slot]

        if not made:
            batch, nodes, slots = visible.shape
            blocks = create_block_mask(rule, batch, None, nodes, slots, device=str(visible.device))
            made.append(partial(torch.compile(flex_attention), block_mask=blocks, scale=scale, enable_gqa=True))
        return partial(made[0], *operands)

    return bind


def shared_prefix_cases(device: torch.device, small: bool) -> list[KernelCase]:
    """One prefix before all rows; beside it, each row's attention through pages that are shared."""
    if small:
        return [_prefix_case(device, 4, 208, 32, 3)]
    return [_prefix_case(device, *sizes) for sizes in ((64, 4096, 256, 1), (64, 4096, 256, 8), (1024, 16384, 256, 1))]


def _prefix_case(device: torch.device, batch: int, prefix: int, own: int, nodes: int) -> KernelCase:
    """``own`` slots of each row, the nodes of its tree included."""
    scale = _WIDTH**-0.5
    mask, whole = (_mask(device, batch, before + own - nodes, nodes) for before in (0, prefix))
    first, rest = prefix // _PAGE, own // _PAGE
    pages = first + torch.arange(batch * rest, dtype=torch.int32).view(batch, rest)
    table = torch.cat([torch.arange(first, dtype=torch.int32).expand(batch, first), pages], 1).to(device)

    def make(seed: int) -> tuple[Tensor, PrefixLevel, Tensor, Tensor]:
        query = _normal(seed, device, batch, nodes, _HEADS, _WIDTH).transpose(1, 2)
        before = [_normal(seed + i, device, 1, _KV_HEADS, prefix, _WIDTH) for i in (1000, 2000)]
        keys, values = (_normal(seed + i, device, batch, _KV_HEADS, own, _WIDTH) for i in (3000, 4000))
        level = PrefixLevel(before[0], before[1], torch.tensor([prefix], device=device), ((0, batch),))
        return query, level, keys, values

    def per_row(operands: tuple[Tensor, PrefixLevel, Tensor, Tensor]) -> Call:
        query, level, *rows = operands
        keys, values = (
            torch.cat([_paged(t) for t in pair]) for pair in zip((level.keys, level.values), rows, strict=True)
        )
        return lambda: tree_attention(query, keys, values, whole, scale, storage=KVFormat(table))

    slots = prefix + batch * own
    return KernelCase(
        {"batch": batch, "prefix": prefix, "own": own, "nodes": nodes},
        make,
        lambda x: lambda: shared_prefix(x[0], [x[1]], x[2], x[3], mask, scale),
        2 * (2 * slots * _KV_HEADS + 2 * batch * nodes * _HEADS) * _WIDTH,
        4 * batch * (prefix + own) * nodes * _HEADS * _WIDTH,
        {"each row by itself": per_row},
        lambda x: prefix_reference.shared_prefix_with_lse(x[0], [x[1]], x[2], x[3], mask, scale)[0],
    )


def _paged(rows: Tensor) -> Tensor:
    """``[B, H_kv, S, d]`` to ``[B * S / page, H_kv, page, d]``."""
    batch, heads, slots, width = rows.shape
    return rows.view(batch, heads, slots // _PAGE, _PAGE, width).transpose(1, 2).flatten(0, 1)


def w4a16_cases(device: torch.device, small: bool) -> list[KernelCase]:
    """Down and up projections of 8B and 70B models; the implementation is the one measured here to be fastest."""
    if small:
        return [_product_case(device, rows, 48, 256, group) for rows in (1, 9) for group in (32, 128)]
    shapes = ((4096, 14336), (8192, 28672))
    cases = [_product_case(device, rows, n, k, 128) for n, k in shapes for rows in (1, 16, 64, 256)]
    return [*cases, _product_case(device, 16, 4096, 14336, 32)]


def _product_case(device: torch.device, rows: int, num_outputs: int, num_inputs: int, group: int) -> KernelCase:
    table = ChoiceTable("measured in this run")

    def make(seed: int) -> tuple[Tensor, Any, Tensor]:
        dense = _normal(seed, device, num_outputs, num_inputs)
        weight = from_dense(dense, group, zero_points=group != 32)
        if device.type == "cuda" and not table.entries:
            measure_choices(weight, torch.bfloat16, table, rows=(rows,), rounds=5)
        return _normal(seed + 1000, device, rows, num_inputs), weight, weight.dequantize(torch.bfloat16)

    contenders: dict[str, Callable[[Any], Call]] = {"bfloat16 weight": lambda x: lambda: F.linear(x[0], x[2])}
    if device.type == "cuda" and group == 128:  # both want zero points
        contenders["gemlite"] = lambda x: gemlite_product(x[0], x[1])
        contenders["marlin"] = lambda x: marlin_product(x[0], x[1])
    groups = num_inputs // group
    stored = num_outputs * (num_inputs // 2 + groups * (4 if group == 32 else 3))
    return KernelCase(
        {"rows": rows, "outputs": num_outputs, "inputs": num_inputs, "group": group},
        make,
        lambda x: lambda: w4a16(x[0], x[1], table),
        stored + 2 * rows * (num_outputs + num_inputs),
        2 * rows * num_outputs * num_inputs,
        contenders,
        lambda x: w4a16_reference.w4a16(x[0], x[1]),
    )


def accept_cases(device: torch.device, small: bool) -> list[KernelCase]:
    """A tree of 64 nodes over Llama 3's vocabulary."""
    nodes, vocab_size = (7, 1000) if small else (64, 128_256)
    return [_accept_case(device, nodes, vocab_size, temperature) for temperature in (None, 0.7)]


def _accept_case(device: torch.device, nodes: int, vocab_size: int, temperature: float | None) -> KernelCase:
    keys = None
    if temperature is not None:
        keys = noise_keys([PositionNoise(1, torch.arange(vocab_size))], [5], nodes).to(device)
    parents = _parents(nodes).unsqueeze(0).to(device)

    def make(seed: int) -> tuple[Any, ...]:
        logits = 4.0 * _normal(seed, device, 1, nodes, vocab_size)
        tokens = logits.argmax(-1)[:, parents[0].clamp(min=0)]  # siblings hold what their parent's argmax is
        return logits, tokens, parents, keys, temperature or 1.0

    return KernelCase(
        {"nodes": nodes, "vocabulary": vocab_size, "match": "greedy" if keys is None else "coupled"},
        make,
        lambda x: lambda: accept(*x).packed,
        2 * nodes * vocab_size,
        expected=lambda x: accept_reference.accept(*x).packed,
    )


OPERATIONS: dict[str, Cases] = {
    "tree_attention": tree_attention_cases,
    "shared_prefix": shared_prefix_cases,
    "w4a16": w4a16_cases,
    "accept": accept_cases,
}
"""Operation -> its cases."""
