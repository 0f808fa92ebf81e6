"""EAGLE's drafting in two calls on a CPU: entries that were committed, and a whole tree.

A level of a tree is some sixty small operations, half of its time. Compiled they give the same tree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.layer import RMSNorm
from specdec.kernels.decoder_layer import MOST_TOP, DraftCache, DraftHead, Kernels, Linear, find_kernels
from specdec.kv_cache import KVCache
from specdec.packing import PackedLinear
from specdec.panels import PanelWeight
from specdec.tree import TokenTree


class CompiledEagle:
    """A head whose weights the compiled kernels can read; ``make_compiled`` says whether they can.

    Args:
        kernels: the kernels.
        module: an ``EagleHead``, packed.
        head: the output head.
        embeddings: ``[V, d]`` the target's.
        rates: ``[D, R]`` float32, log-confidence by depth and rank; None for the head's own.
    """

    def __init__(self, kernels: Kernels, module: Any, head: Any, embeddings: Tensor, rates: Tensor | None) -> None:
        self._kernels, self._layer = kernels, module.layer
        self._vocab_size: int = head.packed.out_features
        vocabulary = module.vocabulary
        self._kept = [embeddings, vocabulary, None if rates is None else rates.contiguous()]
        self._parts = (
            self._layer.whole(),
            None if module.mix is None else Linear.of(module.mix.packed),
            Linear.of(head.packed),
        )
        norms = (module.embedding_norm, module.hidden_norm, module.norm)
        levels = (0, 0) if rates is None else tuple(rates.shape)
        self._head = DraftHead(
            *(None if part is None else ctypes.addressof(part) for part in self._parts), embeddings.data_ptr(),
            *(norm.weight.data_ptr() for norm in norms), None, None,
            *(None if kept is None else kept.data_ptr() for kept in self._kept[1:]), *levels,
            *(norm.eps or torch.finfo(norm.weight.dtype).eps for norm in norms), module.norm_before_residual,
        )  # fmt: skip
        self._space: dict[tuple[int, int], Tensor] = {}

    def enter(self, cache: KVCache, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The layer's output ``[B, n, d]`` at entries behind the committed ones; arguments as ``EagleHead`` has them."""
        rows, count = tokens.shape
        depth = torch.arange(count).repeat(rows, 1)
        causal = torch.ones(count, count, dtype=torch.bool).tril_().repeat(rows, 1, 1)
        where = self._where(cache, count, rows * count, 0)
        return self._kernels.draft_entries(
            self._head, where, hidden.contiguous(), tokens.contiguous(), depth, causal
        )  # fmt: skip

    def grow(self, cache: KVCache, pending: Tensor, start: Tensor, sizes: tuple[int, int, int, int]) -> TokenTree:
        """A tree; ``sizes`` are those of ``Kernels.grow_draft``."""
        depth, width, branching, most_nodes = sizes
        branching = min(branching, self._vocab_size)
        rows = len(pending)
        where = self._where(cache, width * (depth - 1), rows * width, rows * width)
        tokens, parents, joint = self._kernels.grow_draft(
            self._head, where, pending.contiguous(), start.contiguous(), (depth, width, branching, most_nodes)
        )
        return TokenTree(tokens, parents, confidence=joint.float().exp()).compact()

    def _where(self, cache: KVCache, slots: int, rows: int, drafts: int) -> DraftCache:
        """The cache with room for so many entries more, the angles of their positions, and memory for as many rows."""
        shape = self._layer.shape
        end = cache.max_length + slots
        if end > cache.capacity:
            cache.reserve(2 * end)
        buffers = cache.open(0, slots, shape.num_kv_heads, shape.head_dim, torch.bfloat16)
        cos, sin = self._layer.angle_table(end, torch.bfloat16)
        self._head.cos, self._head.sin = cos.data_ptr(), sin.data_ptr()
        if (rows, drafts) not in self._space:
            self._space = {(rows, drafts): self._kernels.draft_space(self._head, rows, drafts)} | (
                self._space if len(self._space) < 8 else {}
            )
        space = self._space[rows, drafts]
        pointers = (tensor.data_ptr() for tensor in (buffers.keys, buffers.values, cache.lengths, space))
        return DraftCache(*pointers, len(cache.lengths), buffers.keys.shape[2], torch.get_num_threads())


def make_compiled(
    module: Any, head: Any, embeddings: Tensor, branching: int, rates: Tensor | None
) -> CompiledEagle | None:
    """For a packed ``EagleHead``; None where its weights lie in another layout, or there are no kernels."""
    kernels = find_kernels() if embeddings.device.type == "cpu" and embeddings.dtype == torch.bfloat16 else None
    linears: Sequence[Any] = [head, *([] if module.mix is None else [module.mix])]
    packed = all(isinstance(part, PackedLinear) and isinstance(part.packed, PanelWeight) for part in linears)
    norms = (module.embedding_norm, module.hidden_norm, module.norm)
    fits = packed and branching <= MOST_TOP and all(isinstance(norm, RMSNorm) for norm in norms)
    if kernels is None or not fits or not embeddings.is_contiguous() or module.layer.whole() is None:
        return None
    return CompiledEagle(kernels, module, head, embeddings, rates)
