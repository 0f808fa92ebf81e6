"""The attention function registered with transformers: it owns the KV cache and the tree's mask.

Models run with ``use_cache=False`` and no mask; keys and values reach this function fresh, for the nodes of the pass
only. It writes them to our cache and attends over it. Nothing here depends on a model's own caching code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.kernels.decoder_layer import PassArguments
from specdec.kernels.tree_attention import TreeMask, serves_rules, tree_attention
from specdec.kv_cache import KVCache

ATTENTION_NAME = "specdec_tree"


class AttentionPass:
    """What the layers of one forward pass share: cache, write offset and visibility.

    Args:
        cache: the KV cache written to and read from.
        depth: ``[B, M]`` int64, depth of the tree's nodes; the last n of them are computed in this pass.
        ancestors: ``[B, n, M]`` bool, what each computed node sees of the tree's nodes.
    """

    def __init__(self, cache: KVCache, depth: Tensor, ancestors: Tensor) -> None:
        self.cache = cache
        num_nodes = ancestors.shape[1]
        self.offset = depth.shape[1] - num_nodes
        self.depth, self.ancestors = depth.contiguous(), ancestors.contiguous()
        self.positions = cache.lengths.unsqueeze(1) + depth[:, self.offset :]  # [B, n]
        self.windows: dict[int, int | None] = {}  # layer -> the window it asked for
        self._masks: dict[int | None, Tensor] = {}
        self._rules: dict[int | None, TreeMask] = {}
        self._key_positions: Tensor | None = None
        self.arguments: PassArguments | None = None
        """Of compiled layers; ``held`` keeps their tensors alive."""
        self.held: tuple[Tensor, ...] = ()

    def mask(self, window: int | None) -> Tensor:
        """``[B, n, S]`` bool, the slots each node may see; ``window`` limits it to that many positions back."""
        if not self._masks:
            self._masks[None], self._key_positions = self._visibility()
        if window is not None and window not in self._masks:
            assert self._key_positions is not None
            distance = self.positions.unsqueeze(2) - self._key_positions.unsqueeze(1)
            self._masks[window] = self._masks[None] & (distance < window)
        return self._masks[window]

    def rules(self, window: int | None) -> TreeMask:
        """What ``mask`` says, as the rules it follows from: GPU kernels read no matrix of a long context."""
        if window not in self._rules:
            self._rules[window] = TreeMask(self.cache.lengths, self.ancestors, self.depth, window)
        return self._rules[window]

    def _visibility(self) -> tuple[Tensor, Tensor]:
        """What each node sees of the slots, ``[B, n, S]`` bool, and the slots' positions ``[B, S]``."""
        depth, num_nodes = self.depth, self.ancestors.shape[1]
        lengths = self.cache.lengths.unsqueeze(1)  # [B, 1]
        slots = torch.arange(self.cache.max_length + depth.shape[1], device=depth.device)  # [S]
        relative = slots - lengths  # [B, S]
        node = relative.clamp(0, depth.shape[1] - 1)
        in_tree = (relative >= 0) & (relative < depth.shape[1])
        seen = self.ancestors.gather(2, node.unsqueeze(1).expand(-1, num_nodes, -1))
        visible = (relative < 0).unsqueeze(1) | (in_tree.unsqueeze(1) & seen)
        return visible, torch.where(in_tree, lengths + depth.gather(1, node), slots)


def attend(
    specdec_pass: AttentionPass,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Write a layer's keys and values to the cache and attend over it: ``[B, H, n, d]`` to ``[B, H, n, d_v]``."""
    specdec_pass.windows[layer] = window
    keys, values = specdec_pass.cache.write(layer, key, value, specdec_pass.offset)
    by_rules = serves_rules(query, keys, values)
    visible = specdec_pass.rules(window) if by_rules else specdec_pass.mask(window)
    return tree_attention(query, keys, values, visible, scale, softcap, sinks)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    specdec_pass: AttentionPass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form ``AttentionInterface`` asks for: ``[B, H, n, d]`` in, ``[B, n, H, d_v]`` out."""
    layer = getattr(module, "layer_idx", None)
    if specdec_pass is None or layer is None:
        raise RuntimeError(
            f"{type(module).__name__} did not hand the pass through to its attention: the model drops keyword "
            "arguments, or was called outside specdec"
        )
    if attention_mask is not None or position_bias is not None:
        raise RuntimeError(f"{type(module).__name__} adds a mask or bias of its own, which token trees cannot honour")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(specdec_pass, layer, query, key, value, scale, sliding_window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)


class AttentionSwitch:
    """Points a model's configurations at our attention while it runs for us, and back afterwards.

    The model stays usable through its own ``generate`` between our passes.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs: list[Any] = list(configs.values())

    @contextmanager
    def on(self) -> Iterator[None]:
        """Our attention within the block. Names go straight to the field, past validation of known ones."""
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ATTENTION_NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
