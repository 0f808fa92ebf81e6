"""A decoder layer of Llama's kind, compiled for small passes in bfloat16 on a CPU, whole and in parts."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.build import NotBuilt, load_library
from specdec.kernels.decoder_layer.passes import MOST_LEVELS, LayerTable, PassEnd, PassPart, array_of, levels_of
from specdec.kernels.decoder_layer.structures import (
    Attention,
    DraftCache,
    DraftWeights,
    Growth,
    LayerArguments,
    Linear,
    Move,
    Numbers,
    Panels,
    PassArguments,
    Product,
    StackEnd,
    Top,
    pointer_to,
)

__all__ = [
    "LANES",
    "MOST_LEVELS",
    "MOST_TOP",
    "MOST_WIDTH",
    "PANEL",
    "SOURCE",
    "TOGETHER",
    "DraftCache",
    "DraftWeights",
    "Kernels",
    "LayerArguments",
    "LayerTable",
    "Linear",
    "Numbers",
    "Panels",
    "PassArguments",
    "PassEnd",
    "PassPart",
    "array_of",
    "find_kernels",
    "pointer_to",
]

SOURCE = Path(__file__).with_name("cpu.c")

LANES = 16
"""Widths must be multiples of this, a head's of twice as much."""

MOST_WIDTH = 512
"""Widest head."""

MOST_TOP = 64
"""Tokens that ``Kernels.top`` finds."""

PANEL = 32
"""Output channels of a panel."""

TOGETHER = 32
"""Inputs that share a scale, where they are in 8 bit by groups; groups of weights are whole numbers of them."""


class Kernels:
    """The compiled functions. All tensors are contiguous, on the CPU and, where not said otherwise, bfloat16.

    A row's result depends on that row alone, bit for bit, and on positions, not on places in a tree.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, structure = ctypes.c_void_p, ctypes.c_long, ctypes.POINTER

        def declare(name: str, *arguments: Any, result: Any = None) -> Any:
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
            return function

        self._rms_norm = declare("rms_norm", pointer, pointer, pointer, number, number, ctypes.c_float, ctypes.c_int)
        self._gated = declare("gated", pointer, pointer, number, number, ctypes.c_int)
        self._attention = declare("tree_attention", structure(Attention))
        self._quantize_rows = declare("quantize_rows", pointer, pointer, pointer, number, number, ctypes.c_int)
        self._quantize_groups = declare("quantize_groups", pointer, pointer, pointer, number, number, ctypes.c_int)
        self._product = declare("product", structure(Product))
        self._layer_space = declare("layer_space", structure(LayerArguments), number, result=number)
        self._layers = declare(
            "decoder_layers", pointer, number, structure(PassArguments), *[pointer] * 4, structure(StackEnd)
        )
        self._move_slots = declare("move_slots", structure(Move), ctypes.c_int)
        self._take_rows = declare("take_rows", *[pointer] * 3, *[number] * 3, result=number)
        self._put_rows = declare("put_rows", *[pointer] * 3, number, number, ctypes.c_int)
        self._top = declare("top", structure(Top), ctypes.c_int)
        self._draft_space = declare("draft_space", structure(DraftWeights), number, number, result=number)
        self._draft_entries = declare(
            "draft_entries", structure(DraftWeights), structure(DraftCache), pointer, pointer, number, pointer, number,
            pointer,
            result=ctypes.c_int,
        )  # fmt: skip
        self._grow_draft = declare(
            "grow_draft", structure(DraftWeights), structure(DraftCache), structure(Growth), result=number
        )
        self.has_products = bool(declare("has_products", result=ctypes.c_int)())
        """Whether this processor has what ``product`` and ``layer`` need."""
        self.signs_lie_apart = bool(declare("signs_lie_apart", result=ctypes.c_int)())
        """Whether ``Numbers.WEIGHTS_IN_8_BIT`` are a sign and seven bits, in an order of their own."""
        self.has_matrix_unit = bool(declare("has_matrix_unit", result=ctypes.c_int)())
        """Whether it multiplies tiles (AMX), and Linux lets this process do it."""

    def rms_norm(self, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension, ``[..., d]``, rounded once."""
        out = torch.empty_like(states)
        width = states.shape[-1]
        rows = states.numel() // width
        pointers = (tensor.data_ptr() for tensor in (states, weight, out))
        self._rms_norm(*pointers, rows, width, eps, torch.get_num_threads())
        return out

    def gated(self, gate_up: Tensor) -> Tensor:
        """``SiLU(gate) * up`` of ``[..., 2 m]``, gates first: ``[..., m]``, rounded once."""
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows = gate_up.numel() // (2 * width)
        self._gated(gate_up.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
        return out

    def quantize_rows(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Activations in 8 bit: ``[rows, d]`` uint8 around 128, and the rows' scales ``[rows]`` float32.

        A row that holds NaN or infinity gets the scale NaN.
        """
        rows, width = inputs.shape
        out = torch.empty(rows, width, dtype=torch.uint8)
        scales = torch.empty(rows, dtype=torch.float32)
        pointers = (tensor.data_ptr() for tensor in (inputs, out, scales))
        self._quantize_rows(*pointers, rows, width, torch.get_num_threads())
        return out, scales

    def quantize_groups(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Activations in 8 bit with a scale for every ``TOGETHER`` of a row: codes and factors as ``product`` has them.

        They are arranged for the kernels: of every 256 rows ``[d / TOGETHER, rows, TOGETHER]`` int8, and scale and
        scaled sum, ``[d / TOGETHER, rows, 2]`` float32. Numbers that are not finite make their group's scale NaN.

        Raises:
            ValueError: for rows that are no whole number of groups.
        """
        rows, width = inputs.shape
        if width % TOGETHER:
            raise ValueError(f"{width} inputs do not divide into groups of {TOGETHER}")
        out = torch.empty(rows * width, dtype=torch.int8)
        factors = torch.empty(rows * width // TOGETHER * 2)
        pointers = (tensor.data_ptr() for tensor in (inputs, out, factors))
        self._quantize_groups(*pointers, rows, width, torch.get_num_threads())
        return out, factors

    def _read(self, inputs: Tensor, kind: Numbers) -> tuple[Tensor, Tensor | None]:
        """Inputs as a weight wants them, and their scales."""
        if kind is Numbers.BOTH_IN_8_BIT:
            return self.quantize_rows(inputs)
        return self.quantize_groups(inputs) if kind.takes_groups else (inputs, None)

    def product(self, inputs: Tensor, weight: Panels, residual: Tensor | None = None) -> Tensor:
        """``inputs @ weight.T + bias + residual``, rounded once: ``[rows, out]``.

        Args:
            inputs: ``[rows, in]``.
            weight: where it wants inputs in 8 bit, they are quantized.
            residual: ``[rows, out]``.
        """
        rows, width = inputs.shape
        out = torch.empty(rows, weight.out_features, dtype=torch.bfloat16)
        read, inputs_scales = self._read(inputs, weight.kind)
        tensors = (read, weight.weight, weight.scales, weight.shifts, inputs_scales, weight.bias, residual, out, None)
        pointers = (pointer_to(tensor) for tensor in tensors)
        sizes = (rows, width, weight.out_features, weight.group, weight.kind, weight.has_zero_points)
        self._product(Product(*pointers, *sizes, torch.get_num_threads()))
        return out

    def space(self, layer: LayerArguments, rows: int) -> Tensor:
        """Memory that ``layer`` works in, to be used for one layer after the other."""
        return torch.empty(self._layer_space(layer, rows), dtype=torch.uint8)

    def layers(
        self,
        layers: LayerTable,
        parts: Sequence[PassPart],
        states: Tensor,
        residual: Tensor | None = None,
        copies: Sequence[Tensor | None] | None = None,
        end: PassEnd | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Whole decoder layers in sequence: ``[B, n, d]`` to ``[B, n, d]``, and logits ``[B, n, V]`` with a head.

        After the call everything that Python needs has to come from memory again, through which the weights went: what
        follows the layers in any case is part of it.

        Args:
            layers: their weights.
            parts: the rows of each cache; where there are several, all their nodes stand side by side, ``[1, T, d]``.
            states: of the nodes; as wide as the first layer's products of queries, keys and values read.
            residual: what the first layer adds to; None for ``states``.
            copies: ``[B, n, d]`` to write each layer's output to, where it is wanted.
            end: what follows; the states returned are normed then.
        """
        out = torch.empty_like(states if residual is None else residual)
        found, logits, following = out, None, None
        if end is not None:
            found = torch.empty_like(out)
            if end.head is not None:
                logits = out.new_empty(*(end.shape or out.shape[:-1]), end.head.out_width)
            head = None if end.head is None else ctypes.addressof(end.head)
            pointers = head, pointer_to(logits), pointer_to(end.places)
            following = StackEnd(end.norm.data_ptr(), found.data_ptr(), *pointers, end.eps)
        held = [part.fill() for part in parts]
        for part, after in pairwise(parts):
            part.arguments.next = ctypes.addressof(after.arguments)
        self._layers(
            layers.addresses, len(layers.layers), parts[0].arguments, states.data_ptr(), pointer_to(residual),
            out.data_ptr(), None if copies is None else array_of([pointer_to(copy) for copy in copies]), following,
        )  # fmt: skip
        del held
        return found, logits

    def draft_space(self, weights: DraftWeights, entries: int, drafts: int = 0) -> int:
        """Bytes to draft in, for so many entries at a time, ``drafts`` of them with children."""
        return int(self._draft_space(weights, entries, drafts))

    def draft_entries(
        self, weights: DraftWeights, cache: DraftCache, states: Sequence[Tensor], tokens: Tensor, out: Tensor,
        columns: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A drafter's layers over committed entries, chains of n in every row, to states ``[B, n, d]``.

        Args:
            weights: the drafter's.
            cache: what was entered before; keys and values of these entries are written behind it.
            states: ``[B, N, d]`` each, the target's that are fused, the token's before each entry; none where entries
                have none.
            tokens: ``[B, n]`` int64.
            out: written and returned.
            columns: ``[B, n]`` int64, contiguous, where among the N an entry's states stand; None where N is n.
        """
        addresses = array_of([each.data_ptr() for each in states])
        given = states[0].shape[1] if states else 0
        if not self._draft_entries(
            weights, cache, addresses, pointer_to(columns), given, tokens.data_ptr(), tokens.shape[1], out.data_ptr()
        ):
            raise MemoryError(f"no memory to enter {tokens.numel()} tokens")
        return out

    def grow_draft(
        self,
        weights: DraftWeights,
        cache: DraftCache,
        pending: Tensor,
        start: Tensor,
        sizes: tuple[int, int, int, int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A tree of the most probable paths, all of it in one call.

        Args:
            weights: the drafter's.
            cache: of its entries; width * (depth - 1) slots behind the committed ones are free.
            pending: ``[B]`` int64, roots.
            start: ``[B, d]`` states of the roots, which their children are drafted from.
            sizes: depth, most nodes expanded per depth (width), children of a node, at most ``MOST_TOP``, most nodes of
                a row, and of all rows together: what has no child among the best of so many is not expanded.

        Returns:
            ``[B, N]`` int64 tokens and parents, -1 the root's and -2 of padding, and float32 joint confidence of the
            nodes, the best first; N is as large as some row needs.
        """
        most = len(pending) * sizes[3]
        tokens, parents = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.int64)
        chosen = (tokens, parents, torch.empty(most))
        pointers = [tensor.data_ptr() for tensor in (pending, start, *chosen)]
        count = self._grow_draft(weights, cache, Growth(*pointers[:2], *sizes, *pointers[2:]))
        if count == 0:
            raise MemoryError(f"no memory for the candidates of {len(pending)} trees of width {sizes[1]}")
        tokens, parents, confidence = (part[: len(pending) * count].view(-1, count) for part in chosen)
        return tokens, parents, confidence

    def take_rows(self, table: Tensor, indices: Tensor) -> Tensor:
        """Rows ``[..., d]`` of a table ``[V, d]`` of any dtype, as an embedding gives them.

        Args:
            table: read.
            indices: ``[...]`` int64.

        Raises:
            IndexError: for one that the table lacks.
        """
        out = table.new_empty(*indices.shape, table.shape[1])
        pointers = (tensor.data_ptr() for tensor in (table, indices, out))
        count, size = indices.numel(), table.shape[1] * table.element_size()
        found = self._take_rows(*pointers, count, len(table), size)
        if found < count:
            raise IndexError(f"the table has {len(table)} rows, got index {int(indices.flatten()[found])}")
        return out

    def put_rows(self, rows: Tensor, places: Tensor, out: Tensor) -> Tensor:
        """``out``, ``[..., d]`` of any dtype, with rows ``[T, d]`` put to places ``[T]`` int64 among its own."""
        rows, size = rows.contiguous(), out.shape[-1] * out.element_size()
        pointers = (tensor.data_ptr() for tensor in (rows, places, out))
        self._put_rows(*pointers, len(places), size, torch.get_num_threads())
        return out

    def top(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The largest of each row's logits, in one read of them.

        Args:
            logits: ``[..., V]``, bfloat16 or float32.
            count: how many, k; at most ``MOST_TOP`` and V.

        Returns:
            ``[..., k]`` float32, descending, and int64 indices, of equals the first; ``[...]`` float32, the log of the
            sum of each row's exponentials.
        """
        *shape, width = logits.shape
        best = torch.empty(*shape, count)
        index, total = torch.empty(*shape, count, dtype=torch.int64), torch.empty(*shape)
        pointers = (tensor.data_ptr() for tensor in (logits, best, total, index))
        self._top(Top(*pointers, total.numel(), width, count, logits.element_size()), torch.get_num_threads())
        return best, index, total

    def move_slots(self, buffers: int, count: int, like: Tensor, lengths: Tensor, path: Tensor, counts: Tensor) -> None:
        """Move kept columns of a tree up to the committed tokens, in many buffers of one shape.

        Args:
            buffers: address of their addresses.
            count: how many there are.
            like: ``[B, H_kv, S, d]``, of any dtype, one of them.
            lengths: ``[B]`` int64, committed tokens.
            path: ``[B, P]`` int64, columns, ascending in each row.
            counts: ``[B]`` int64, how many of a row's are kept.
        """
        batch_size, heads, slots, width = like.shape
        tensors = (lengths, path.contiguous(), counts)
        moved = Move(
            ctypes.c_void_p(buffers), *(tensor.data_ptr() for tensor in tensors), count, batch_size, heads, slots,
            path.shape[1], width * like.element_size(),
        )  # fmt: skip
        self._move_slots(moved, torch.get_num_threads())

    def attention(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        depth: Tensor,
        seen: Tensor,
        scale: float,
        window: int | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, attend: ``[B, n, H d]``.

        Args:
            qkv: ``[B, n, (H + 2 H_kv) d]``, heads of the queries, then of the keys, then of the values.
            rotary: cosines and sines ``[B, n, d]``, halves rotated as Llama's are.
            keys: ``[B, H_kv, S, d]``, written behind the committed tokens and the tree's earlier nodes.
            values: the same.
            lengths: ``[B]`` int64, committed tokens; all of them are seen.
            depth: ``[B, M]`` int64, of the tree's nodes; the last n of them are computed.
            seen: ``[B, n, M]`` bool, which of the tree's nodes each computed one sees, itself included; parents stand
                before their children.
            scale: factor on the scores.
            window: positions back that are seen; None for all.
            segments: ``[B, levels, 4]`` int64, keys and values that rows share, in order of position: the address of
                the keys, ``[H_kv, slots, d]``, that of the values, how many tokens, slots; 0 tokens for none. ``keys``
                and ``values`` then hold what stands behind a row's segments. Results are the same to the bit.

        Raises:
            ValueError: for more levels than ``MOST_LEVELS``.
        """
        batch_size, num_nodes, total = qkv.shape
        kv_heads, slots, width = keys.shape[1:]
        heads = total // width - 2 * kv_heads
        out = qkv.new_empty(batch_size, num_nodes, heads * width)
        cos, sin = rotary
        tensors = (qkv, cos, sin, keys, values, lengths, depth, seen, segments, out, None)
        self._attention(
            Attention(
                *(pointer_to(tensor) for tensor in tensors), batch_size, num_nodes, depth.shape[1], heads, kv_heads,
                width, slots, window or 0, levels_of(segments), scale, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out


@cache
def find_kernels() -> Kernels | None:
    """The kernels, compiled at the first use on a machine; None with a warning where that fails."""
    try:
        return Kernels(load_library(SOURCE))
    except NotBuilt as error:
        warnings.warn(f"decoder layers run without compiled kernels, slower: {error}", RuntimeWarning, stacklevel=2)
        return None
