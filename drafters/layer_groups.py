"""Consecutive decoder layers whose attentions run at once, on one device or on several (EasySpec, Wu et al. 2025).

In a group every attention reads the state that entered the group; the MLPs stay in sequence. With ``x_1`` the state
that enters the first of N layers::

    a_i = attention_i(norm_i(x_1))
    x_(i+1) = y + mlp_i(norm'_i(y))   with   y = x_i + a_i

Of one layer this is the layer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.attention import AttentionPass
from specdec.kernels.tree_attention import tree_attention
from specdec.kv_cache import KVCache
from specdec.layer_buffers import LayerBuffers
from specdec.packing import PackedLinear, can_pack
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree

SERVED = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layers that are attention and MLP in sequence, each behind an RMSNorm of its own and nothing else."""

How = Literal["fused", "separate", "ranks"]
"""How a group's attentions run: as batched products, one after the other, or shared out among processes."""


class LayerGroup(nn.Module):
    """A group whose attentions are computed one after the other: what the other forms are compared with.

    Args:
        layers: the decoder layers, in order.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def attend(self, hidden: Tensor, **named: Any) -> Sequence[Tensor]:
        """Per layer what its attention makes of the group's first state ``[B, n, d]``, output projection included."""
        return [self._attention(layer, hidden, **named) for layer in self.layers]

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        """``[B, n, d]`` to ``[B, n, d]``; keywords as a decoder layer takes them."""
        layer: Any
        for layer, attended in zip(self.layers, self.attend(hidden_states, **named), strict=True):
            hidden_states = hidden_states + attended
            hidden_states = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return hidden_states

    @staticmethod
    def _attention(layer: Any, hidden: Tensor, **named: Any) -> Tensor:
        out: Tensor = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **named)[0]
        return out


class FusedGroup(LayerGroup):
    """One product for all queries, keys and values, one attention over all heads, one product for all outputs.

    The norms before the attentions differ in their factors alone, which go into the columns of the first product: it
    reads one normed state. Keys and values of the layers lie head by head in one buffer, see ``GroupedKVCache``.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers)
        attentions = [layer.self_attn for layer in layers]
        first = attentions[0]
        self._first: int = first.layer_idx
        self._head_dim: int = first.head_dim
        self._scaling: float = first.scaling
        self._window: int | None = getattr(first, "sliding_window", None)
        self._eps: float = layers[0].input_layernorm.variance_epsilon
        norms = [layer.input_layernorm.weight for layer in layers]
        self._widths = []
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for name in ("q_proj", "k_proj", "v_proj"):
            linears = [getattr(attention, name) for attention in attentions]
            folded = [linear.weight.detach() * norm.detach() for linear, norm in zip(linears, norms, strict=True)]
            self._widths.append(sum(map(len, folded)))
            weights += folded
            biases += [linear.bias for linear in linears if linear.bias is not None]
        self._projection = _linear(torch.cat(weights), torch.cat(biases) if biases else None)
        outputs = [attention.o_proj for attention in attentions]
        stacked = bias = None
        if all(type(linear) is nn.Linear for linear in outputs):  # packed ones are faster one by one
            stacked = torch.stack([linear.weight.detach().T for linear in outputs])  # [N, H * d_h, d]
            if outputs[0].bias is not None:
                bias = torch.stack([linear.bias.detach() for linear in outputs]).unsqueeze(1)
        self.register_buffer("_output", stacked, persistent=False)
        self.register_buffer("_output_bias", bias, persistent=False)
        for name in ("q_norm", "k_norm"):
            factors = [getattr(attention, name).weight for attention in attentions if hasattr(attention, name)]
            heads = (self._widths[0 if name == "q_norm" else 1] // self._head_dim) // len(layers)
            merged = torch.stack(factors).detach().repeat_interleave(heads, dim=0) if factors else None
            self.register_buffer(f"_{name}", merged, persistent=False)  # [N * heads, d_h]

    _output: Tensor | None
    _output_bias: Tensor | None
    _q_norm: Tensor | None
    _k_norm: Tensor | None

    def attend(self, hidden: Tensor, **named: Any) -> Sequence[Tensor]:
        batch, nodes, _ = hidden.shape
        shared: AttentionPass = named["specdec_pass"]
        projected = self._projection(_normed(hidden, self._eps)).split(self._widths, dim=-1)
        query, key, value = (part.view(batch, nodes, -1, self._head_dim) for part in projected)
        if self._q_norm is not None and self._k_norm is not None:
            query = self._q_norm * _normed(query, self._eps)
            key = self._k_norm * _normed(key, self._eps)
        cos, sin = named["position_embeddings"]
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        cache = shared.cache
        assert isinstance(cache, GroupedKVCache)
        keys, values = cache.write_group(self._first, key, value.transpose(1, 2), shared.offset)
        out = tree_attention(query, keys, values, shared.mask(self._window), self._scaling)  # [B, N * H, n, d_h]
        count = len(self.layers)
        per_layer = out.view(batch, count, -1, nodes, self._head_dim).permute(1, 0, 3, 2, 4)  # [N, B, n, H, d_h]
        if self._output is None:
            layers: list[Any] = list(self.layers)
            parts = per_layer.reshape(count, batch, nodes, -1)
            return [layer.self_attn.o_proj(part) for layer, part in zip(layers, parts, strict=True)]
        product = torch.bmm(per_layer.reshape(count, batch * nodes, -1), self._output)
        if self._output_bias is not None:
            product = product + self._output_bias
        return product.view(count, batch, nodes, -1).unbind()


class RankGroup(LayerGroup):
    """Layer i's attention runs in process ``i mod world size``; every process gets all outputs.

    All processes run the same program on the same inputs. What is committed, an exact pass computes in all of them, so
    only the outputs travel: ``[N, B, n, d]`` per group and pass.
    """

    def attend(self, hidden: Tensor, **named: Any) -> Sequence[Tensor]:
        world, rank, count = distributed.get_world_size(), distributed.get_rank(), len(self.layers)
        mine = hidden.new_zeros(-(-count // world), *hidden.shape)
        for place, layer in enumerate(list(self.layers)[rank::world]):
            mine[place] = self._attention(layer, hidden, **named)
        gathered = [torch.empty_like(mine) for _ in range(world)]
        distributed.all_gather(gathered, mine)
        return [gathered[index % world][index // world] for index in range(count)]


GROUPS: dict[How, type[LayerGroup]] = {"fused": FusedGroup, "separate": LayerGroup, "ranks": RankGroup}


class GroupedKVCache(KVCache):
    """A cache in which the layers of a group share buffers ``[B, N * H_kv, S, d]``, one layer's heads after another's.

    Args:
        groups: layer indices of each group.
        batch_size, capacity, device: as ``KVCache`` takes them.
    """

    regular = False  # compiled layers would write each to buffers of its own

    def __init__(
        self, groups: Sequence[range], batch_size: int, capacity: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(batch_size, capacity, device)
        self._group = {layer: group for group in groups for layer in group}

    def write(self, layer: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        group = self._group.get(layer)
        if group is None:
            return super().write(layer, keys, values, offset)
        first, heads = group[0], keys.shape[1]
        if first not in self.layers:
            wide = (tensor.repeat(1, len(group), 1, 1) for tensor in (keys, values))
            self.layers[first] = LayerBuffers(*map(self._allocate, wide))
        whole, own = self.layers[first], slice((layer - first) * heads, (layer - first + 1) * heads)
        return self._store(LayerBuffers(whole.keys[:, own], whole.values[:, own]), keys, values, offset)

    def write_group(self, first: int, keys: Tensor, values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """``write`` for all layers of the group that begins with layer ``first``: ``[B, N * H_kv, n, d]``."""
        return super().write(first, keys, values, offset)


class LayerParallelModel(HFTarget):
    """A model whose draft passes run groups of layers at once; passes from a tree's root on are exact.

    Args:
        model: a transformers model.
        size: layers of a group, N; 1 is the model as it is.
        how: how a group's attentions run.

    Raises:
        ValueError: for layers of another kind, naming them.
    """

    quantizes_kv = False

    def __init__(self, model: Any, size: int, how: How) -> None:
        self.groups: list[range] = []
        super().__init__(model)
        layers = list(self.decoder_layers())
        for layer in layers:
            if type(layer).__name__ not in SERVED:
                raise ValueError(
                    f"{type(model).__name__} cannot draft layer-parallel: its layers are {type(layer).__name__}, not "
                    f"one of {', '.join(SERVED)}; use drafter 'model'"
                )
        self.groups = group_layers([getattr(layer.self_attn, "sliding_window", None) for layer in layers], size)
        grouped: list[nn.Module] = []
        starts = {group[0]: group for group in self.groups}
        inside = {layer for group in self.groups for layer in group}
        for index, layer in enumerate(layers):
            if index in starts:
                grouped.append(GROUPS[how]([layers[i] for i in starts[index]]))
            elif index not in inside:
                grouped.append(layer)
        self.draft_layers = nn.ModuleList(grouped)

    def new_cache(self, batch_size: int, capacity: int) -> GroupedKVCache:
        return GroupedKVCache(self.groups, batch_size, capacity, self.device)

    def forward(
        self, tree: TokenTree, cache: KVCache, features: Sequence[Any] = (), first_node: int = 0
    ) -> TargetOutput:
        """As ``HFTarget.forward``; what lies below nodes computed before is only drafted, group by group."""
        if first_node == 0:
            return super().forward(tree, cache, features, first_node)
        base = self.model.base_model
        exact = base.layers
        base.layers = self.draft_layers
        try:
            return super().forward(tree, cache, features, first_node)
        finally:
            base.layers = exact


def group_layers(windows: Sequence[int | None], size: int) -> list[range]:
    """Groups of up to ``size`` layers between the first and the last, none of a single layer.

    Args:
        windows: per layer how far back it attends; a group does not mix them.
        size: at least 1.
    """
    groups, start, last = [], 1, len(windows) - 1
    while start < last:
        end = start + 1
        while end < last and end - start < size and windows[end] == windows[start]:
            end += 1
        if end - start > 1:
            groups.append(range(start, end))
        start = end
    return groups


def _normed(states: Tensor, eps: float) -> Tensor:
    """RMSNorm without its factors, in float32 as the models do it."""
    exact = states.float()
    return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(states.dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return PackedLinear(linear) if can_pack(linear) else linear
