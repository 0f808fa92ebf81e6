"""Drafting in two calls on a CPU: entries that were committed, and a whole tree.

A level of a tree is some sixty small operations, half of its time. Compiled they give the same tree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.pruned import DraftHead
from specdec.kernels.decoder_layer import (
    DraftCache,
    DraftWeights,
    Kernels,
    LayerArguments,
    LayerTable,
    Linear,
    find_kernels,
)
from specdec.kv_cache import KVCache
from specdec.lean import is_whole
from specdec.lean_stack import LeanStack
from specdec.packing import PackedLinear
from specdec.panels import PanelWeight
from specdec.tree import TokenTree

MOST_KEPT = 256
"""Entries at a time of which the memory is kept; a step has fewer, the parts of a prompt more."""

GROWTH = 64
"""Slots that a full cache gets beyond those needed: it is copied when it grows."""

UNIT_EPS = 1e-6
"""Of the norm that brings a state to unit size."""

Angles = Callable[[int], tuple[Tensor, Tensor]]
"""Cosines and sines ``[positions, d_h]`` of so many positions at least."""


@dataclass
class CompiledDrafter:
    """What kernels need of a drafter of a few decoder layers; ``can_compile`` says of which they can read the weights.

    Attributes:
        layers: the layers.
        kv_heads: key and value heads of each, H_kv.
        head_dim: d_h.
        embeddings: ``[V, d]``, bfloat16, contiguous.
        norms: weight and epsilon of the final norm; where entries hold a state beside the embedding (EAGLE), those of
            the embedding and of the state before it.
        head: the output head, packed.
        angles: of rotary embeddings.
        fuse: the target's states side by side to the one that an entry holds, packed; None where entries hold none.
        scaled: whether those states are brought to unit size first.
        mix: what attention's output is added to, of an entry, packed; None for the state itself.
        adds_normed: without ``mix``, to the normed state.
        vocabulary: ``[V']`` int64 token ids that the head is for; None for all.
        rates: ``[D, R]`` float32, log-confidence by depth and rank; None for the head's own.
    """

    layers: Sequence[LayerArguments]
    kv_heads: int
    head_dim: int
    embeddings: Tensor
    norms: Sequence[tuple[Tensor, float]]
    head: Any
    angles: Angles
    fuse: Any | None = None
    scaled: bool = False
    mix: Any | None = None
    adds_normed: bool = False
    vocabulary: Tensor | None = None
    rates: Tensor | None = None

    def __post_init__(self) -> None:
        kernels = find_kernels()
        assert kernels is not None
        self._kernels: Kernels = kernels
        self._vocab_size: int = self.head.packed.out_features
        self._space: Tensor | None = None
        linears = (self.fuse, self.mix, self.head)
        self._linears = [None if linear is None else Linear.of(linear.packed) for linear in linears]
        self._table = LayerTable(self.layers)
        levels = (0, 0) if self.rates is None else self.rates.shape
        if self.vocabulary is not None and not 0 <= int(self.vocabulary.min()) <= int(self.vocabulary.max()) < len(
            self.embeddings
        ):
            raise ValueError(
                f"the draft vocabulary names tokens {int(self.vocabulary.min())} to {int(self.vocabulary.max())}, the "
                f"target has {len(self.embeddings)}: train the drafter anew for it"
            )
        (norm, eps), before = self.norms[-1], self.norms[:-1] or ((None, 0.0),) * 2
        tensors = (self.embeddings, *(weight for weight, _ in before), norm, None, None, self.vocabulary, self.rates)
        addresses = [None if linear is None else ctypes.addressof(linear) for linear in self._linears]
        self._weights = DraftWeights(
            ctypes.addressof(self._table.addresses), *addresses,
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors), len(self.layers), *levels,
            UNIT_EPS, *(each for _, each in before), eps, self.scaled, self.adds_normed,
        )  # fmt: skip

    def enter(
        self, cache: KVCache, tokens: Tensor, states: Sequence[Tensor] = (), columns: Tensor | None = None
    ) -> Tensor:
        """The layers' output ``[B, n, d]`` at entries behind the committed ones.

        Args:
            cache: of the layers; the entries are written, and not committed.
            tokens: ``[B, n]`` int64, their tokens.
            states: ``[B, N, d]`` each, the target's before them, where they hold one fused of these.
            columns: ``[B, n]`` int64, where among the N these stand; None where N is n.
        """
        rows, count = tokens.shape
        out = self.embeddings.new_empty(rows, count, self.embeddings.shape[1])
        where = self._where(cache, rows, count, rows * count, 0)
        read = [each.to(self.embeddings.dtype).contiguous() for each in states]
        at = None if columns is None else columns.contiguous()
        return self._kernels.draft_entries(self._weights, where, read, tokens.contiguous(), out, at)

    def grow(self, cache: KVCache, pending: Tensor, start: Tensor, sizes: tuple[int, int, int, int, int]) -> TokenTree:
        """A tree below the entries; arguments as ``Kernels.grow_draft`` has them."""
        depth, width, branching, most_nodes, all_nodes = sizes
        branching = min(branching, self._vocab_size)
        entries = len(pending) * width
        where = self._where(cache, len(pending), width * (depth - 1), entries, entries)
        sizes = depth, width, branching, most_nodes, all_nodes
        pending, start = pending.contiguous(), start.contiguous()
        tokens, parents, confidence = self._kernels.grow_draft(self._weights, where, pending, start, sizes)
        return TokenTree(tokens, parents, confidence=confidence)

    def _where(self, cache: KVCache, rows: int, slots: int, entries: int, drafts: int) -> DraftCache:
        """The cache of so many rows with room for more slots, the angles of their positions, and memory to work in."""
        if rows != cache.batch_size:
            raise ValueError(f"drafts for {rows} rows are wanted, the cache has {cache.batch_size}")
        if cache.room < slots:
            cache.make_room(slots + GROWTH)
        opened = [
            cache.open(layer, slots, self.kv_heads, self.head_dim, torch.bfloat16) for layer in range(len(self.layers))
        ]
        self._angles = self.angles(cache.max_length + slots)
        self._weights.cos, self._weights.sin = (part.data_ptr() for part in self._angles)
        lie = cache.addresses(opened)
        self._held = lie, self._memory(entries, drafts)  # until the call
        return DraftCache(
            lie.keys, lie.values, cache.lengths.data_ptr(), self._held[1].data_ptr(), rows, opened[0].keys.shape[2],
            torch.get_num_threads(),
        )  # fmt: skip

    def _memory(self, entries: int, drafts: int) -> Tensor:
        """To work in. Of prompts it is large, and not kept."""
        size = self._kernels.draft_space(self._weights, entries, drafts)
        if self._space is not None and self._space.numel() >= size:
            return self._space
        found = torch.empty(size, dtype=torch.uint8)
        if entries <= MOST_KEPT:
            self._space = found
        return found


def compile_model(model: Any) -> CompiledDrafter | None:
    """A draft model of transformers whose layers and head were packed; None where the kernels cannot run it whole.

    Hooks that its modules have are why they cannot; those registered later are not heard.
    """
    stack, head = model.base_model, model.get_output_embeddings()
    vocabulary: Tensor | None = None
    if isinstance(head, DraftHead):
        vocabulary, head = head.vocabulary, head.rows
    whole = stack.forward
    if not isinstance(whole, LeanStack) or not whole.has_table:
        return None
    layers = [layer.forward.arguments if is_whole(layer) else None for layer in stack.layers]
    table = model.get_input_embeddings().weight.detach()
    heard = [*stack.layers, stack.norm, head]
    if any(module._forward_hooks or module._forward_pre_hooks for module in heard):
        return None
    if not can_compile(table, layers, [head]):
        return None
    compiled = [layer for layer in layers if layer is not None]
    heads, width = int(compiled[0].kv_heads), int(compiled[0].width)
    return CompiledDrafter(
        compiled, heads, width, table, [(stack.norm.weight, stack.norm.variance_epsilon)], head,
        lambda length: whole.angle_table(length, table.dtype), vocabulary=vocabulary,
    )  # fmt: skip


def can_compile(embeddings: Tensor, layers: Sequence[LayerArguments | None], linears: Sequence[Any]) -> bool:
    """Whether kernels can draft with these.

    Args:
        embeddings: ``[V, d]``.
        layers: None for one that does not fit.
        linears: output head, and what fuses and mixes states.
    """
    return (
        embeddings.device.type == "cpu"
        and embeddings.dtype == torch.bfloat16
        and embeddings.is_contiguous()
        and find_kernels() is not None
        and all(layer is not None for layer in layers)
        and all(isinstance(part, PackedLinear) and isinstance(part.packed, PanelWeight) for part in linears)
    )
