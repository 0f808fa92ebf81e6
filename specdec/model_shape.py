"""What of a model decides its memory, and what its passes take beside weights and cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from specdec.architecture import configs_by_layer
from specdec.kv_groups import kv_bytes
from specdec.kv_quantized import IN_FULL
from specdec.memory import stored_bytes
from specdec.target import HFTarget


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its memory; all sizes in elements but ``weights`` (bytes) and ``element`` (bytes each).

    Where layers differ, widths are the widest layer's.

    Attributes:
        weights: parameters and buffers.
        layers: number of decoder layers.
        hidden: width of the hidden states.
        inner: width of the MLP.
        queries: width of all query heads together.
        keys: width of all key heads together, and of the values.
        cached: the same of all layers together.
        group: query heads per key head.
        vocab: width of the logits.
        element: bytes of a number.
        scores: whether attention holds its scores: with a soft-cap or sinks there is no fused kernel.
        kv_bits: of a number in the KV cache; None where it is not quantized.
        width: of a head.
        compiled: whether passes run through compiled layers, in one call.
    """

    weights: int
    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    cached: int
    group: int
    vocab: int
    element: int
    scores: bool = False
    kv_bits: int | None = None
    width: int = 0
    compiled: bool = False

    @classmethod
    def of(cls, target: HFTarget) -> ModelShape:
        """The shape of a loaded model."""
        weights = stored_bytes([*target.model.parameters(), *target.model.buffers()])
        shape = cls.from_config(target.config, weights, target.dtype.itemsize)
        return replace(shape, kv_bits=target.kv_bits, compiled=target.takes_uneven)

    @classmethod
    def from_config(cls, config: Any, weights: int, element: int) -> ModelShape:
        """The shape of the model that a decoder's configuration describes, loaded or not, and not compiled.

        Args:
            config: transformers' configuration of the text model.
            weights: bytes of parameters and buffers.
            element: bytes of a number.
        """
        hidden = int(config.hidden_size)
        heads, kv_heads, widths = zip(*map(_heads, configs_by_layer(config)), strict=True)
        keys = [count * width for count, width in zip(kv_heads, widths, strict=True)]
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
        return cls(
            weights=weights,
            layers=int(config.num_hidden_layers),
            hidden=hidden,
            inner=max(inner) if isinstance(inner, (list, tuple)) else int(inner),
            queries=max(count * width for count, width in zip(heads, widths, strict=True)),
            keys=max(keys),
            cached=sum(keys),
            group=max(count // own for count, own in zip(heads, kv_heads, strict=True)),
            vocab=int(config.vocab_size),
            element=element,
            scores=bool(getattr(config, "attn_logit_softcapping", None)) or config.model_type == "gpt_oss",
            width=max(widths),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of a token, all layers together."""
        if self.kv_bits is not None:
            return math.ceil(self.cached / self.width * kv_bytes(self.kv_bits, self.width, self.element))
        return 2 * self.cached * self.element

    def kv_bytes(self, tokens: int) -> int:
        """A row of the KV cache with room for so many tokens."""
        in_full = 0 if self.kv_bits is None else 2 * self.cached * self.element * min(tokens, IN_FULL)
        return tokens * self.kv_bytes_per_token + in_full


def _heads(config: Any) -> tuple[int, int, int]:
    """A layer's query heads, key heads and width of a head."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)


def layer_bytes(model: ModelShape, rows: int, nodes: int, slots: int) -> tuple[int, int]:
    """Masks and activations of a pass over ``nodes`` nodes per row that attends to ``slots`` slots."""
    if model.compiled:
        return _compiled_bytes(model, rows, nodes)
    pairs, count = rows * nodes * slots, rows * nodes
    visible = pairs
    masks = pairs * model.group * (1 + model.element) if not model.scores else 0  # repeated per query head, then added
    scores = 3 * pairs * (model.queries // max(model.keys // model.group, 1)) * 4 if model.scores else 0
    attention = count * (2 * model.hidden + 4 * model.queries + 2 * model.keys) * model.element
    if model.kv_bits is not None:  # decoded in float32, and in the dtype
        attention += rows * slots * 2 * model.keys * (8 + model.element)
    mlp = count * (4 * model.hidden + 3 * model.inner) * model.element
    if masks + scores + attention >= mlp:
        return visible + masks, attention + scores
    return visible, mlp


def _compiled_bytes(model: ModelShape, rows: int, nodes: int) -> tuple[int, int]:
    """The same of compiled layers: what nodes see of each other, as bytes; one layer's results, states, and angles."""
    widest = max(model.hidden, model.queries, model.inner)
    layer = 2 * (model.hidden + 2 * (model.queries + model.keys) + 3 * model.inner)
    in_8_bit = widest + widest // 4  # inputs of products, and their scales
    states = 3 * model.hidden * model.element  # before and after the layers, and normed
    angles = 2 * model.width * model.element
    return nodes * nodes * (rows + 1), rows * nodes * (layer + in_8_bit + states + angles)
