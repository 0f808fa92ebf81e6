"""The attention function registered with transformers: it owns the KV cache and the tree's mask.

Models run with ``use_cache=False`` and no mask; keys and values reach this function fresh, for the nodes of the pass
only. It writes them to our cache and attends over it. Nothing here depends on a model's own caching code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.kernels import runs_triton
from specdec.kernels.decoder_layer import PassArguments, find_kernels
from specdec.kernels.shared_prefix import PrefixLevel, shared_prefix
from specdec.kernels.tree_attention import TreeMask, serves_rules, tree_attention
from specdec.kv_cache import KVCache
from specdec.segments import Share, runs

ATTENTION_NAME = "specdec_tree"


class AttentionPass:
    """What the layers of one forward pass share: cache, write offset and visibility.

    Args:
        cache: the KV cache written to and read from.
        depth: ``[B, M]`` int64, depth of the tree's nodes; the last n of them are computed in this pass.
        ancestors: ``[B, n, M]`` bool, what each computed node sees of the tree's nodes.
        counts: how many of its nodes each row has, the first ones; what is computed node by node is ``[1, T]`` then,
            the rows' nodes side by side, and only compiled layers can do it. None where all rows have n.
    """

    def __init__(self, cache: KVCache, depth: Tensor, ancestors: Tensor, counts: Sequence[int] | None = None) -> None:
        self.cache = cache
        num_nodes = ancestors.shape[1]
        self.offset = depth.shape[1] - num_nodes
        self.depth, self.ancestors = depth.contiguous(), ancestors.contiguous()
        self.positions = cache.lengths.unsqueeze(1) + depth[:, self.offset :]  # [B, n]
        self.starts: Tensor | None = None
        """``[B + 1]`` int64, where each row's nodes begin among all rows', where rows differ."""
        self.places: Tensor | None = None
        """``[T]`` int64, where these nodes stand in ``[B * n]``."""
        if counts is not None:
            self.starts = torch.tensor([0, *accumulate(counts)])
            self.places = torch.tensor([row * num_nodes + i for row, count in enumerate(counts) for i in range(count)])
            self.positions = self.positions.flatten()[self.places].unsqueeze(0)  # [1, T]
        self.windows: dict[int, int | None] = {}  # layer -> the window it asked for
        self._masks: dict[int | None, Tensor] = {}
        self._rules: dict[int | None, TreeMask] = {}
        self._key_positions: Tensor | None = None
        self._runs: list[tuple[Share, int, int, Tensor]] | None = None
        self._own_mask: TreeMask | None = None
        self.arguments: PassArguments | None = None
        """Of compiled layers; ``held`` keeps their tensors alive."""
        self.held: tuple[Tensor | None, ...] = ()
        self.copies: dict[int, Tensor | None] = {}
        """Hidden states wanted of a compiled stack, by how many layers came before; it fills them in."""

    @property
    def regular(self) -> bool:
        """Whether compiled layers can read the cache."""
        return self.cache.regular

    @property
    def in_forms(self) -> bool:
        """Whether their parts can, which read some tokens in two forms."""
        return self.cache.in_forms

    @property
    def longest(self) -> int:
        """Nodes per row, n."""
        return self.ancestors.shape[1]

    @property
    def end(self) -> int:
        """Above all positions."""
        return self.cache.max_length + self.depth.shape[1]

    def spread(self, states: Tensor) -> Tensor:
        """``[1, T, ..]`` of rows that differ as ``[B, n, ..]``; what stands where a row has no node is undefined."""
        return self._put_into(states, unfilled)

    def padded(self, states: Tensor) -> Tensor:
        """The same with zeros there."""
        return self._put_into(states, Tensor.new_zeros)

    def _put_into(self, states: Tensor, make: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
        if self.places is None:
            return states
        kernels = find_kernels()
        assert kernels is not None
        shape = (*self.ancestors.shape[:2], states.shape[-1])
        return kernels.put_rows(states[0], self.places, make(states, shape))

    def mask(self, window: int | None) -> Tensor:
        """``[B, n, S]`` bool, the slots each node may see; ``window`` limits it to that many positions back."""
        if not self._masks:
            self._masks[None], self._key_positions = self.cache.visibility(self.depth, self.ancestors)
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

    @property
    def own_mask(self) -> TreeMask:
        """What nodes see of the slots behind their rows' segments."""
        if self._own_mask is None:
            self._own_mask = TreeMask(self.cache.own_lengths, self.ancestors, self.depth)
        return self._own_mask

    def levels(self, layer: int) -> list[PrefixLevel]:
        """A layer's segments, each with the neighbouring rows that refer to it."""
        if self._runs is None:
            device = self.depth.device
            self._runs = [(*run, torch.tensor([run[0].tokens], device=device)) for run in runs(self.cache.shares)]
        found = []
        for share, first, end, length in self._runs:
            keys, values = share.entries(layer)
            found.append(PrefixLevel(keys.unsqueeze(0), values.unsqueeze(0), length, ((first, end),)))
        return found


def unfilled(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for results, with anything in it."""
    return like.new_empty(shape)


class JoinedPass:
    """Several passes as one: all their nodes stand side by side in one row, ``[1, T]``, and each keeps its own cache.

    What a layer does node by node, products above all, is done for all of them at once; attention is each one's own.

    Args:
        parts: the passes; part i has ``B_i * n_i`` nodes, row by row.
    """

    def __init__(self, parts: Sequence[AttentionPass]) -> None:
        self.parts = tuple(parts)
        self.positions = torch.cat([part.positions.reshape(1, -1) for part in parts], dim=1)  # [1, T]
        self.copies: dict[int, Tensor | None] = {}

    @property
    def regular(self) -> bool:
        """Whether compiled layers can read all caches."""
        return all(part.regular for part in self.parts)

    @property
    def in_forms(self) -> bool:
        """Whether parts of compiled layers can, which read some tokens in two forms."""
        return all(part.in_forms for part in self.parts)

    @property
    def longest(self) -> int:
        """Most nodes per row of a part."""
        return max(part.longest for part in self.parts)

    @property
    def end(self) -> int:
        """Above all positions."""
        return max(part.end for part in self.parts)

    def split(self, states: Tensor) -> list[Tensor]:
        """``[1, T, ...]`` to each part's ``[B_i, n_i, ...]``."""
        shapes = [part.positions.shape for part in self.parts]
        cut = torch.split(states[0], [rows * nodes for rows, nodes in shapes])
        return [part.view(*shape, *states.shape[2:]) for part, shape in zip(cut, shapes, strict=True)]

    @staticmethod
    def join(states: Sequence[Tensor]) -> Tensor:
        """Each part's ``[B_i, n_i, ...]`` to ``[1, T, ...]``."""
        return torch.cat([part.flatten(0, 1) for part in states]).unsqueeze(0)


def attend(
    specdec_pass: AttentionPass | JoinedPass,
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
    if isinstance(specdec_pass, JoinedPass):
        split = zip(*(specdec_pass.split(states.transpose(1, 2)) for states in (query, key, value)), strict=True)
        outputs = []
        for part, own in zip(specdec_pass.parts, split, strict=True):
            q, k, v = (states.transpose(1, 2) for states in own)
            outputs.append(attend(part, layer, q, k, v, scale, window, softcap, sinks))
        return specdec_pass.join([out.transpose(1, 2) for out in outputs]).transpose(1, 2)
    if layer in specdec_pass.windows:
        raise RuntimeError(f"layer {layer} attends twice in a pass, and there is one place for its keys and values")
    specdec_pass.windows[layer] = window
    # Parts of a softmax are put together in float32. PyTorch's kernel for the CPU rounds 16-bit ones before; there, as
    # with a window, which leaves a prefix row by row, keys are gathered, and results are those of rows that hold them.
    exact = query.dtype.itemsize > 2 or runs_triton(query)
    if specdec_pass.cache.shares_segments and window is None and exact:
        keys, values = specdec_pass.cache.write_own(layer, key, value, specdec_pass.offset)
        return shared_prefix(
            query, specdec_pass.levels(layer), keys, values, specdec_pass.own_mask, scale, softcap, sinks
        )
    keys, values = specdec_pass.cache.write(layer, key, value, specdec_pass.offset)
    by_rules = specdec_pass.cache.regular and serves_rules(query, keys, values)
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
    specdec_pass: AttentionPass | JoinedPass | None = None,
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
    if not getattr(module, "is_causal", True):
        raise RuntimeError(f"{type(module).__name__} sees later tokens: load the model as a decoder (is_decoder=True)")
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
