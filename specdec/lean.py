"""Decoder layers of Llama's kind in a few calls: on a CPU much of a small pass is the cost of calling.

A layer of transformers makes about sixty calls, many over a few hundred numbers. Once its linear layers are packed
(``specdec.packing``), the same mathematics takes eight: sums with the residual stream happen inside the matrix product,
and what stands between the products is compiled (``specdec.kernels.decoder_layer``). Results differ by rounding:
intermediate values that transformers rounds to bfloat16 stay in float32 where an operation covers several steps.

Nothing is replaced in the model: a layer's ``forward`` is, on the instance, and only passes of ours take the new one.
The weights are the modules' own, hooks run as ever, and the model's ``generate`` sees transformers' layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.attention import AttentionPass, JoinedPass, attend
from specdec.kernels.decoder_layer import (
    LANES,
    MOST_WIDTH,
    Kernels,
    LayerArguments,
    LayerTable,
    PassArguments,
    PassPart,
    find_kernels,
)
from specdec.kv_quantized import QuantizedKVCache
from specdec.layer_buffers import LayerBuffers
from specdec.packing import FusedPart, PackedLinear
from specdec.panels import PanelWeight

KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Classes of transformers whose layers do what ``LeanLayer`` does, and nothing else."""

MOST_NODES = 512
"""Of a pass per row that runs through compiled kernels, a chunk of a prompt among them; beyond it PyTorch's run."""


def rows_are_independent(model: nn.Module) -> bool:
    """Whether a row of a pass is the same to the bit whatever rides along: all decoder layers and the head run through
    kernels made for that."""
    layers = [module.forward for module in model.modules() if type(module).__name__ in KNOWN]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (
        bool(layers)
        and isinstance(head, PackedLinear)
        and getattr(model, "dtype", None) == torch.bfloat16
        and all(isinstance(forward, LeanLayer) and forward.compiled for forward in layers)
    )


def widths_fit(hidden: int, inner: int, head: int) -> bool:
    """Whether the compiled kernels take layers whose states, MLP and heads are so wide."""
    return all(width % LANES == 0 for width in (hidden, inner, head // 2)) and head <= MOST_WIDTH


def can_be_lean(layer: Any) -> bool:
    """Whether a layer is of a known class and all its linear layers are packed."""
    kind = type(layer)
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    return (
        type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and _fused(attention.q_proj, attention.k_proj, attention.v_proj)
        and _fused(mlp.gate_proj, mlp.up_proj)
        and all(isinstance(linear, PackedLinear) for linear in (attention.o_proj, mlp.down_proj))
    )


def _fused(*parts: Any) -> bool:
    """Whether these are all parts of one product, in its order."""
    return all(isinstance(part, FusedPart) for part in parts) and all(
        part.product is parts[0].product and part.index == index for index, part in enumerate(parts)
    )


class LeanLayer:
    """The ``forward`` of a decoder layer during our passes; others go to the layer's own.

    Passes over up to ``MOST_NODES`` nodes run through compiled kernels, where there are any; those that read a
    quantized cache, in parts. There a row's result is the same to the bit however many rows ride in the pass and
    whatever the tree holds.

    Args:
        layer: of a class in ``KNOWN``, packed.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._own: Callable[..., Tensor] = layer.forward
        self.index: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self._scale: float = attention.scaling
        config = attention.config
        self._heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        # Qwen2's layers know whether they have a window, Mistral's ask the configuration.
        named = config if type(layer).__name__ == "MistralDecoderLayer" else attention
        self.window: int | None = getattr(named, "sliding_window", None)
        self._input_norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        # Qwen3's attention norms each head of queries and keys.
        self._head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        self._qkv, self._out = attention.q_proj.product.packed, attention.o_proj.packed
        self._gate_up, self._down = mlp.gate_proj.product.packed, mlp.down_proj.packed
        self._hidden: int = mlp.intermediate_size
        fits = widths_fit(config.hidden_size, self._hidden, self.head_dim)
        self._kernels = find_kernels() if fits else None
        self.arguments = self._whole() if self._kernels is not None else None
        """For ``Kernels.layers``; None where the layer has to run in parts."""
        self._alone = LayerRun([self])

    @property
    def compiled(self) -> bool:
        """Whether passes run through compiled kernels, whole or in parts."""
        return self._kernels is not None

    def _whole(self) -> LayerArguments | None:
        """The layer for ``Kernels.layer``; None where its weights lie in another layout, or heads are normed."""
        if self._head_norms is not None:
            return None
        linears = (self._qkv, self._out, self._gate_up, self._down)
        if not all(isinstance(linear, PanelWeight) for linear in linears):
            return None
        norms = self._input_norm, self._mlp_norm
        return LayerArguments.of(
            linears, (norms[0].weight, norms[1].weight), (norms[0].variance_epsilon, norms[1].variance_epsilon),
            self._scale, self._heads, self.kv_heads, self.head_dim, self.window,
        )  # fmt: skip

    def __call__(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        specdec_pass: AttentionPass | JoinedPass | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, n, d]`` to ``[B, n, d]``; arguments as the layer's own forward takes them."""
        if specdec_pass is None or position_embeddings is None:
            kwargs |= {"position_embeddings": position_embeddings, "specdec_pass": specdec_pass}
            return self._own(hidden_states, *args, **kwargs)
        if self._kernels is not None and compiles(hidden_states.dtype, specdec_pass, in_parts=True):
            return self._compiled(self._kernels, hidden_states, position_embeddings, specdec_pass)
        batch_size, num_nodes, _ = hidden_states.shape
        qkv = self._norm_heads(self._qkv(_rms_norm(self._input_norm, hidden_states)), _rms_norm)
        heads = qkv.view(batch_size, num_nodes, -1, self.head_dim)
        rotated = self._heads + self.kv_heads
        both = _rotate(heads[:, :, :rotated], *position_embeddings).transpose(1, 2)
        query, key = both[:, : self._heads], both[:, self._heads :]
        value = heads[:, :, rotated:].transpose(1, 2)
        attended = attend(specdec_pass, self.index, query, key, value, self._scale, self.window)
        hidden_states = self._out.add_to(hidden_states, attended.transpose(1, 2).reshape(batch_size, num_nodes, -1))
        gate_up = self._gate_up(_rms_norm(self._mlp_norm, hidden_states))
        gated = F.silu(gate_up[..., : self._hidden]) * gate_up[..., self._hidden :]
        out: Tensor = self._down.add_to(hidden_states, gated)
        return out

    def _compiled(
        self,
        kernels: Kernels,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor],
        specdec_pass: AttentionPass | JoinedPass,
    ) -> Tensor:
        if self.arguments is not None and specdec_pass.regular:
            alone = self._alone.parts(kernels, rotary, specdec_pass)
            return kernels.layers(self._alone.table, alone, hidden_states)[0]
        norm = self._input_norm
        qkv = self._qkv(kernels.rms_norm(hidden_states, norm.weight, norm.variance_epsilon))
        qkv = self._norm_heads(
            qkv, lambda norm, heads: kernels.rms_norm(heads.contiguous(), norm.weight, norm.variance_epsilon)
        )
        attended = self._attend(kernels, qkv, rotary, specdec_pass)
        hidden_states = self._out.add_to(hidden_states, attended)
        norm = self._mlp_norm
        gate_up = self._gate_up(kernels.rms_norm(hidden_states, norm.weight, norm.variance_epsilon))
        out: Tensor = self._down.add_to(hidden_states, kernels.gated(gate_up))
        return out

    def _attend(
        self, kernels: Kernels, qkv: Tensor, rotary: tuple[Tensor, Tensor], specdec_pass: AttentionPass | JoinedPass
    ) -> Tensor:
        """``[B, n, (H + 2 H_kv) d]`` to ``[B, n, H d]``, keys and values written to the cache."""
        if isinstance(specdec_pass, JoinedPass):
            cut = zip(*(specdec_pass.split(part) for part in (qkv, *rotary)), strict=True)
            return specdec_pass.join(
                [
                    self._attend(kernels, own, (cos, sin), part)
                    for part, (own, cos, sin) in zip(specdec_pass.parts, cut, strict=True)
                ]
            )
        if not specdec_pass.regular:
            return self._attend_in_forms(kernels, qkv, rotary, specdec_pass)
        (opened,), tables = self._alone.open(specdec_pass, qkv.dtype)
        keys, values = opened.parts
        depth, seen, lengths = specdec_pass.depth, specdec_pass.ancestors, specdec_pass.cache.lengths
        return kernels.attention(
            qkv, rotary, keys, values, lengths, depth, seen, self._scale, self.window, tables[0] if tables else None
        )

    def _attend_in_forms(
        self, kernels: Kernels, qkv: Tensor, rotary: tuple[Tensor, Tensor], now: AttentionPass
    ) -> Tensor:
        """The same over a cache that holds tokens in two forms: a node's position says which of them it reads where."""
        assert isinstance(now.cache, QuantizedKVCache)
        now.windows[self.index] = self.window
        now.cache.prepare(self.index, now.depth.shape[1], self.kv_heads, self.head_dim, qkv.dtype)
        out = torch.empty(0)
        for form, (borders, readers) in enumerate(now.cache.forms(now.depth, now.offset)):
            keys, values = now.cache.in_form(self.index, borders, now.depth.shape[1])
            found = kernels.attention(
                qkv, rotary, keys, values, now.cache.lengths, now.depth, now.ancestors, self._scale, self.window
            )
            out = torch.where(readers.unsqueeze(2), found, out) if form else found
        now.cache.take_nodes(self.index, keys, values, now.offset)
        return out

    def _norm_heads(self, qkv: Tensor, rms_norm: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """``[B, n, (H + 2 H_kv) d]`` with queries and keys normed head by head, where the architecture does that."""
        if self._head_norms is None:
            return qkv
        widths = [self._heads, self.kv_heads, self.kv_heads]
        query, key, value = torch.split(qkv.view(*qkv.shape[:2], -1, self.head_dim), widths, dim=2)
        normed = rms_norm(self._head_norms[0], query), rms_norm(self._head_norms[1], key)
        return torch.cat([*normed, value], dim=2).flatten(2)


def compiles(dtype: torch.dtype, specdec_pass: AttentionPass | JoinedPass, in_parts: bool = False) -> bool:
    """Whether compiled layers serve a pass, or at least their parts."""
    readable = specdec_pass.regular or (in_parts and specdec_pass.in_forms)
    return dtype == torch.bfloat16 and specdec_pass.longest <= MOST_NODES and readable


def is_whole(layer: Any) -> bool:
    """Whether a layer runs in one compiled call."""
    return isinstance(layer.forward, LeanLayer) and layer.forward.arguments is not None


class LayerRun:
    """Layers in sequence that run in one compiled call.

    Args:
        layers: all of the same sizes.
    """

    def __init__(self, layers: Sequence[LeanLayer]) -> None:
        self.table = LayerTable([layer.arguments for layer in layers if layer.arguments is not None])
        self._indices = [layer.index for layer in layers]
        self._windows = {layer.index: layer.window for layer in layers}
        self._shape = layers[0].kv_heads, layers[0].head_dim

    def open(self, now: AttentionPass, dtype: torch.dtype) -> tuple[list[LayerBuffers], list[Tensor] | None]:
        """The layers' keys and values in the pass's cache, opened for a kernel that writes them, and their segments."""
        now.windows.update(self._windows)
        opened = now.cache.open_all(self._indices, now.depth.shape[1], *self._shape, dtype)
        tables = [now.cache.segment_table(index) for index in self._indices] if now.cache.shares_segments else []
        return opened, [table for table in tables if table is not None] or None

    def parts(self, kernels: Kernels, rotary: tuple[Tensor, Tensor], now: AttentionPass | JoinedPass) -> list[PassPart]:
        """A pass as the compiled layers take it; all of it works in the first part's memory."""
        passes = now.parts if isinstance(now, JoinedPass) else (now,)
        end, total, parts = 0, now.positions.numel(), []
        for each in passes:
            start, end = end, end + each.positions.numel()
            angles = rotary if len(passes) == 1 else (rotary[0][:, start:end], rotary[1][:, start:end])
            shared = share(kernels, self.table.layers[0], angles, each, total if each is passes[0] else 0)
            opened, tables = self.open(each, rotary[0].dtype)
            slots = opened[0].keys.shape[2]
            lie = each.cache.addresses(opened)
            parts.append(PassPart(shared, lie.keys, lie.values, slots, tables))
        return parts


def share(
    kernels: Kernels,
    layer: LayerArguments,
    rotary: tuple[Tensor, Tensor],
    specdec_pass: AttentionPass,
    total: int | None = None,
) -> PassArguments:
    """What the compiled layers of a pass share, made at the first of them; with memory for ``total`` nodes, for its own
    where None, for none where 0.
    """
    if specdec_pass.arguments is None:
        shape, rows = specdec_pass.ancestors.shape, specdec_pass.positions.numel()
        needed = rows if total is None else total
        tensors = (
            *rotary, specdec_pass.cache.lengths, specdec_pass.depth, specdec_pass.ancestors, specdec_pass.starts,
            kernels.space(layer, needed) if needed else None,
        )  # fmt: skip
        specdec_pass.arguments = PassArguments.of(tensors, shape, rows, torch.get_num_threads())
        specdec_pass.held = tensors
    return specdec_pass.arguments


def _rms_norm(norm: Any, states: Tensor) -> Tensor:
    """RMSNorm in one call, all of it in float32."""
    return F.rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings of ``[B, n, H, d]`` by angles ``[B, n, d]``, halves rotated as Llama's are."""
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], dim=-1)
    return torch.addcmul(heads * cos.unsqueeze(2), turned, sin.unsqueeze(2))
