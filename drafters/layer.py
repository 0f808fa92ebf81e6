"""One decoder layer of Llama's kind, for drafters that have layers of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.architecture import configs_by_layer
from specdec.attention import AttentionPass, attend
from specdec.kernels.decoder_layer import LANES, LayerArguments, LayerTable, PassPart, find_kernels
from specdec.layer_buffers import LayerAddresses
from specdec.lean import MOST_NODES, share
from specdec.packing import FusedPart, PackedLinear
from specdec.panels import PanelWeight
from specdec.target import HFTarget

_CONFIG_NAMES = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "rope_parameters",
    "rope_theta", "rms_norm_eps",
)  # fmt: skip

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of rotated queries ``[B, H, n, d_h]`` over keys and values ``[B, H_kv, n, d_h]``: ``[B, H, n, d_h]``."""


ROPE_TYPES = ("linear", "llama3")
"""Scalings of the rotary angles that are known."""


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` computed in the dtype of its factors, which autocast leaves as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """RMSNorm of ``[..., d]``, compiled where there are kernels for it."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled():
        kernels = find_kernels() if x.shape[-1] % LANES == 0 else None
        if kernels is not None:
            return kernels.rms_norm(x.contiguous(), weight, eps or torch.finfo(x.dtype).eps)
    return F.rms_norm(x, weight.shape, weight, eps)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer.

    Attributes:
        hidden_size: d.
        num_heads: query heads, H.
        num_kv_heads: key and value heads, H_kv.
        head_dim: d_h.
        intermediate_size: width of the MLP.
        rope_theta: base of the rotary angles.
        norm_eps: of the RMSNorms.
        qkv_bias: whether the projections of query, key and value have a bias.
        rope_scaling: how the rotary angles of a longer context are made, in transformers' terms; None for plain ones.
            Its ``rope_type`` is one of ``ROPE_TYPES``.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    rope_scaling: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, target: HFTarget) -> LayerShape:
        """A layer like the target's first."""
        config = configs_by_layer(target.config)[0]
        return cls.from_config({name: getattr(config, name, None) for name in _CONFIG_NAMES})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LayerShape:
        """From a transformers configuration's values; what it leaves out is Llama's default."""
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = config.get("rope_parameters") or {}
        return cls(
            hidden_size=width,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            intermediate_size=int(config.get("intermediate_size") or 4 * width),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            norm_eps=float(config.get("rms_norm_eps") or 1e-5),
        )


class DraftLayer(nn.Module):
    """Attention and gated MLP; tensors carry the names of Llama's layers.

    Args:
        shape: sizes.
        input_width: width of what the projections of query, key and value read; d where it is the normed hidden state.
    """

    def __init__(self, shape: LayerShape, input_width: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        width, wide = shape.hidden_size, input_width or shape.hidden_size
        self.q_proj = nn.Linear(wide, shape.num_heads * shape.head_dim, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(wide, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(wide, shape.num_kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, width, bias=False)
        self.gate_proj = nn.Linear(width, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, shape.norm_eps)
        self._arguments: LayerArguments | None = None
        self._table: tuple[Tensor, Tensor] | None = None  # cosines and sines of the positions so far

    def forward(self, inputs: Tensor, residual: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The layer's output ``[B, n, d]``.

        Args:
            inputs: ``[B, n, input_width]``, normed.
            residual: ``[B, n, d]``, what attention's output is added to.
            positions: ``[B, n]`` int64.
            attend: the attention.
        """
        if isinstance(attend, CachedAttention):
            compiled = self._compiled(inputs, residual, positions, attend)
            if compiled is not None:
                return compiled
        shape = self.shape
        query = self.q_proj(inputs).unflatten(-1, (shape.num_heads, shape.head_dim)).transpose(1, 2)
        key = self.k_proj(inputs).unflatten(-1, (shape.num_kv_heads, shape.head_dim)).transpose(1, 2)
        value = self.v_proj(inputs).unflatten(-1, (shape.num_kv_heads, shape.head_dim)).transpose(1, 2)
        cos, sin = rotary(positions, shape, inputs.dtype)
        attended = attend(rotate(query, cos, sin), rotate(key, cos, sin), value)
        hidden = residual + self.o_proj(attended.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(hidden)
        mixed: Tensor = hidden + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return mixed

    def _compiled(self, inputs: Tensor, residual: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor | None:
        """The same through the target's compiled kernels; None where they do not fit."""
        shape, shared = self.shape, attend.shared
        modules: list[Any] = [self.q_proj, self.gate_proj, self.o_proj, self.down_proj]
        query, gate, out, down = modules
        kernels = find_kernels() if self._fits(inputs.dtype) and inputs.shape[1] <= MOST_NODES else None
        if kernels is None:
            return None
        angles = self._angles(positions, inputs.dtype)
        buffers = shared.cache.open(
            attend.layer, shared.depth.shape[1], shape.num_kv_heads, shape.head_dim, inputs.dtype
        )
        arguments = self.whole()
        if arguments is not None:
            lie = LayerAddresses([buffers])
            slots = buffers.keys.shape[2]
            part = PassPart(share(kernels, arguments, angles, shared), lie.keys, lie.values, slots)
            states, _ = kernels.layers(LayerTable([arguments]), [part], inputs.contiguous(), residual.contiguous())
            return states
        attended = kernels.attention(
            query.product.packed(inputs), angles, buffers.keys, buffers.values, shared.cache.lengths, shared.depth,
            shared.ancestors, shape.head_dim**-0.5,
        )  # fmt: skip
        hidden = out.packed.add_to(residual, attended)
        norm = self.post_attention_layernorm
        normed = kernels.rms_norm(hidden, norm.weight, norm.eps or shape.norm_eps)
        mixed: Tensor = down.packed.add_to(hidden, kernels.gated(gate.product.packed(normed)))
        return mixed

    def _fits(self, dtype: torch.dtype) -> bool:
        """Whether the compiled kernels take the layer's sizes and layouts."""
        shape = self.shape
        widths = (shape.hidden_size, shape.intermediate_size, shape.head_dim // 2)
        fused, single = (self.q_proj, self.gate_proj), (self.o_proj, self.down_proj)
        packed = all(isinstance(part, FusedPart) for part in fused) and all(
            isinstance(part, PackedLinear) for part in single
        )
        return packed and dtype == torch.bfloat16 and all(width % LANES == 0 for width in widths)

    def whole(self) -> LayerArguments | None:
        """The layer for ``Kernels.layers``; None where it does not fit, or its weights lie in another layout."""
        if self._arguments is None and self._fits(self.post_attention_layernorm.weight.dtype):
            modules: list[Any] = [self.q_proj, self.o_proj, self.gate_proj, self.down_proj]
            query, out, gate, down = modules
            linears = (query.product.packed, out.packed, gate.product.packed, down.packed)
            if all(isinstance(linear, PanelWeight) for linear in linears):
                shape, norm = self.shape, self.post_attention_layernorm
                eps = norm.eps or shape.norm_eps
                self._arguments = LayerArguments.of(
                    linears, (None, norm.weight), (eps, eps), shape.head_dim**-0.5, shape.num_heads,
                    shape.num_kv_heads, shape.head_dim, None,
                )  # fmt: skip
        return self._arguments

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``rotary``'s, ``[B, n, d_h]``, looked up: computing them takes ten calls."""
        cos, sin = self.angle_table(int(positions.max()) + 1, dtype)
        return F.embedding(positions, cos), F.embedding(positions, sin)

    def angle_table(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``rotary``'s of the positions up to ``length`` at least, ``[positions, d_h]`` each."""
        if self._table is None or length > len(self._table[0]) or self._table[0].dtype != dtype:
            device = self.post_attention_layernorm.weight.device
            known = torch.arange(max(1024, 2 * length), device=device).unsqueeze(0)
            cos, sin = (angles[0, 0].contiguous() for angles in rotary(known, self.shape, dtype))
            self._table = cos, sin
        return self._table


def rotary(positions: Tensor, shape: LayerShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B, 1, n, d_h]`` of rotary embeddings (Su et al. 2021), halves rotated as Llama's are."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    frequencies = shape.rope_theta**-half
    if shape.rope_scaling is not None:
        frequencies = _scaled(frequencies, shape.rope_scaling)
    angles = positions.unsqueeze(-1).float() * frequencies  # [B, n, d_h / 2]
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Frequencies for a longer context: slowed by a factor, in Llama 3.1's form only where waves are long."""
    slowed = frequencies / float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return slowed
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    context = float(scaling["original_max_position_embeddings"])
    waves = context * frequencies / (2 * math.pi)  # that fit into the first context
    kept = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * slowed


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, H, n, d_h]`` by the angles of ``rotary``."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-right, left], dim=-1) * sin


class CachedAttention:
    """Attention over a drafter's own cache and the tree in flight, as the target's layers do it.

    Args:
        shared: the pass.
        layer: of the cache.
    """

    def __init__(self, shared: AttentionPass, layer: int) -> None:
        self.shared = shared
        self.layer = layer

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(self.shared, self.layer, query, key, value, query.shape[-1] ** -0.5)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention within a text, for training: every token sees itself and those before it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
