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

from specdec.kernels.tree_attention import tree_attention
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
        lengths = cache.lengths.unsqueeze(1)  # [B, 1]
        slots = torch.arange(cache.max_length + depth.shape[1], device=depth.device)  # [S]
        relative = slots - lengths  # [B, S]
        node = relative.clamp(0, depth.shape[1] - 1)
        in_tree = (relative >= 0) & (relative < depth.shape[1])
        seen = ancestors.gather(2, node.unsqueeze(1).expand(-1, num_nodes, -1))
        self._visible = (relative < 0).unsqueeze(1) | (in_tree.unsqueeze(1) & seen)  # [B, n, S]
        self._key_positions = torch.where(in_tree, lengths + depth.gather(1, node), slots)  # [B, S]
        self.positions = lengths + depth[:, self.offset :]  # [B, n]
        self._masks: dict[int | None, Tensor] = {None: self._visible}
        self.windows: dict[int, int | None] = {}  # layer -> the window it asked for

    def mask(self, window: int | None) -> Tensor:
        """``[B, n, S]`` bool, the slots each node may see; ``window`` limits it to that many positions back."""
        if window is not None and window not in self._masks:
            distance = self.positions.unsqueeze(2) - self._key_positions.unsqueeze(1)
            self._masks[window] = self._visible & (distance < window)
        return self._masks[window]


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
    specdec_pass.windows[layer] = sliding_window
    keys, values = specdec_pass.cache.write(layer, key, value, specdec_pass.offset)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = tree_attention(query, keys, values, specdec_pass.mask(sliding_window), scale, softcap, s_aux)
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
