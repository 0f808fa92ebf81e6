"""A stack of decoder layers as one compiled call, from token ids to the states that the output head reads.

With several small operations a layer, calling them takes longer than a small model's arithmetic; here Python is left
with what differs between passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

from specdec.attention import AttentionPass, JoinedPass
from specdec.kernels.decoder_layer import Kernels, Linear, PassEnd, find_kernels
from specdec.lean import LayerRun, LeanLayer, can_be_lean, compiles, is_whole, widths_fit
from specdec.packing import PackedLinear
from specdec.panels import PanelWeight

KNOWN_STACKS = {"LlamaModel", "MistralModel", "Qwen2Model"}
"""Classes of transformers that are an embedding, rotary angles, layers and a norm."""

KNOWN_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
"""Classes that are such a stack and an output head, ``lm_head``, and nothing else."""


def make_lean(model: nn.Module) -> int:
    """Give a model's decoder layers their short ``forward``, where they are known and packed.

    Returns:
        How many layers have it.
    """
    count = 0
    for module in model.modules():
        if can_be_lean(module):
            if not isinstance(module.forward, LeanLayer):
                module.forward = LeanLayer(module)
            count += 1
        elif type(module).__name__ in KNOWN_STACKS and not isinstance(module.forward, LeanStack):
            module.forward = LeanStack(module)
    return count


def will_compile(model_class: str, config: Any) -> bool:
    """Whether a model that is not loaded yet will run as one compiled call, in bfloat16 with its weights in panels.

    Args:
        model_class: its name.
        config: transformers' configuration.
    """
    if model_class not in KNOWN_MODELS or config.hidden_act not in ("silu", "swish"):
        return False
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return widths_fit(config.hidden_size, config.intermediate_size, head)


def is_stack_and_head(model: Any) -> bool:
    """Whether logits are what the output head makes of the stack's states, and nobody listens to the model."""
    kind, stack = type(model), model.base_model
    return (
        kind.__name__ in KNOWN_MODELS
        and kind.__module__.startswith("transformers.models.")
        and "forward" not in vars(model)
        and _is_transformers(kind.forward.__code__.co_filename)  # else it was patched
        and not any((model._forward_hooks, model._forward_pre_hooks, stack._forward_hooks, stack._forward_pre_hooks))
    )


@cache
def _is_transformers(source: str) -> bool:
    """Whether a file is the library's."""
    return Path(transformers.__file__).parent in Path(source).parents


class LeanStack:
    """The ``forward`` of a stack of decoder layers during our passes: all of them in one call where all are compiled.

    A layer that somebody listens to, through a hook, runs through its module, and those between such layers together.

    Args:
        stack: of a class in ``KNOWN_STACKS``.
    """

    def __init__(self, stack: Any) -> None:
        self._stack = stack
        self._own: Callable[..., Any] = stack.forward
        self._angles: tuple[Tensor, Tensor] | None = None
        self._forwards: list[Any] = []  # of the layers, as last looked at
        self._whole_run: LayerRun | None = None  # all of them, where each is one compiled call
        self._hooks: list[Any] = []  # theirs, which PyTorch fills in place
        self._head: tuple[PanelWeight, Linear] | None = None  # that logits were asked of last
        rotary = stack.rotary_emb
        self.has_table = getattr(rotary, "rope_type", None) in ("default", "linear", "llama3", "yarn")
        """Angles of these kinds depend on the position alone, those of others on how long the text is."""

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._stack.embed_tokens.weight.dtype
        return dtype

    @property
    def compiles(self) -> bool:
        """Whether there are compiled layers for passes in the model's dtype."""
        return self._dtype == torch.bfloat16 and find_kernels() is not None and self._all_whole()

    def takes(self, now: AttentionPass | JoinedPass) -> bool:
        """Whether a pass runs through compiled layers, which also fill ``copies``."""
        return compiles(self._dtype, now) and self.compiles

    def __call__(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        specdec_pass: AttentionPass | JoinedPass | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stack's own forward."""
        kernels = find_kernels()
        if specdec_pass is None or position_ids is None or kernels is None or not self._all_whole():
            kwargs |= {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "specdec_pass": specdec_pass}
            return self._own(input_ids, *args, **kwargs)
        states = self._embedded(kernels, input_ids) if inputs_embeds is None else inputs_embeds
        if not compiles(states.dtype, specdec_pass):
            kwargs |= {"inputs_embeds": states, "position_ids": position_ids, "specdec_pass": specdec_pass}
            return self._own(None, *args, **kwargs)
        normed, _ = self._states(kernels, states, position_ids, specdec_pass)
        return BaseModelOutputWithPast(last_hidden_state=normed)

    def states(
        self, tokens: Tensor, positions: Tensor, now: AttentionPass | JoinedPass, head: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Of tokens ``[B, n]`` in a pass that it ``takes``.

        Args:
            tokens: int64.
            positions: ``[B, n]`` int64.
            now: the pass.
            head: the output head, where logits are wanted of all nodes.

        Returns:
            Normed states ``[B, n, d]``, and logits ``[B, n, V]`` where a compiled call can go on to them; of rows that
            differ in size the states are ``[1, T, d]``, and logits stand as ``AttentionPass.spread`` puts them.
        """
        kernels = find_kernels()
        assert kernels is not None
        return self._states(kernels, self._embedded(kernels, tokens), positions, now, head)

    def _states(
        self, kernels: Kernels, states: Tensor, positions: Tensor, now: AttentionPass | JoinedPass, head: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        layers, norm, first, copies = list(self._stack.layers), self._stack.norm, 0, now.copies
        rotary = self._rotary(states, positions, now.end)
        hears = norm._forward_hooks or norm._forward_pre_hooks
        if 0 in copies:
            copies[0] = states
        if not hears and not any(self._hooks):
            end = PassEnd(norm.weight, norm.variance_epsilon, self._linear(head), *_spread(now))
            return self._through(kernels, layers, 0, states, rotary, now, end)
        for index, layer in enumerate(layers):
            if layer._forward_hooks or layer._forward_pre_hooks:
                states, _ = self._through(kernels, layers[first:index], first, states, rotary, now)
                states = layer(states, position_embeddings=rotary, specdec_pass=now)
                if index + 1 in copies:
                    copies[index + 1] = states
                first = index + 1
        states, _ = self._through(kernels, layers[first:], first, states, rotary, now)
        return norm(states) if hears else kernels.rms_norm(states, norm.weight, norm.variance_epsilon), None

    def _linear(self, head: Any) -> Linear | None:
        """An output head for a compiled call; None where it has to be called itself."""
        packed = head.packed if type(head) is PackedLinear else None
        heard = packed is None or head._forward_hooks or head._forward_pre_hooks
        if heard or not isinstance(packed, PanelWeight) or "forward" in vars(head):
            return None
        if self._head is None or self._head[0] is not packed:
            self._head = packed, Linear.of(packed)
        return self._head[1]

    def _all_whole(self) -> bool:
        """Whether each layer runs in one compiled call."""
        forwards = [layer.forward for layer in self._stack.layers]
        if forwards != self._forwards:
            self._forwards = forwards
            self._whole_run = LayerRun(forwards) if all(map(is_whole, self._stack.layers)) else None
            pairs = ((layer._forward_hooks, layer._forward_pre_hooks) for layer in self._stack.layers)
            self._hooks = [hooks for pair in pairs for hooks in pair]
        return self._whole_run is not None

    def _through(
        self, kernels: Kernels, layers: list[Any], first: int, states: Tensor, rotary: tuple[Tensor, Tensor],
        now: AttentionPass | JoinedPass, end: PassEnd | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The layers from the ``first`` on that nobody listens to, and what follows them."""
        if not layers:
            return states, None
        run = self._whole_run if len(layers) == len(self._forwards) else None
        run = run or LayerRun([layer.forward for layer in layers])
        copies = None
        if now.copies:
            ends = range(first + 1, first + 1 + len(layers))
            now.copies.update({end: torch.empty_like(states) for end in ends if end in now.copies})
            copies = [now.copies.get(end) for end in ends]
        return kernels.layers(run.table, run.parts(kernels, rotary, now), states, copies=copies, end=end)

    def _embedded(self, kernels: Kernels, tokens: Tensor | None) -> Tensor:
        embed: Any = self._stack.embed_tokens
        plain = type(embed) is nn.Embedding and embed.max_norm is None and embed.weight.is_contiguous()
        heard = embed._forward_hooks or embed._forward_pre_hooks or "forward" in vars(embed)
        if tokens is None or not plain or heard or (torch.is_grad_enabled() and embed.weight.requires_grad):
            states: Tensor = embed(tokens)
            return states
        return kernels.take_rows(embed.weight, tokens.contiguous())

    def _rotary(self, states: Tensor, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[B, n, d]``, looked up where they are functions of the position, below ``end``."""
        if not self.has_table:
            cos, sin = self._stack.rotary_emb(states, position_ids=positions)
            return cos.contiguous(), sin.contiguous()
        cos, sin = self.angle_table(end, states.dtype)
        kernels, positions = find_kernels(), positions.contiguous()
        if kernels is None:
            return F.embedding(positions, cos), F.embedding(positions, sin)
        return kernels.take_rows(cos, positions), kernels.take_rows(sin, positions)

    def angle_table(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[positions, d]`` of ``length`` positions at least; with ``has_table``."""
        if self._angles is None or length > len(self._angles[0]) or self._angles[0].dtype != dtype:
            like = next(self._stack.parameters())
            known = torch.arange(max(1024, 2 * length), device=like.device).unsqueeze(0)
            cos, sin = self._stack.rotary_emb(like.new_empty(0, dtype=dtype), position_ids=known)
            self._angles = (cos[0].contiguous(), sin[0].contiguous())
        return self._angles


def _spread(now: AttentionPass | JoinedPass) -> tuple[tuple[int, int] | None, Tensor | None]:
    """Shape and places of logits where rows differ in size."""
    if isinstance(now, JoinedPass) or now.places is None:
        return None, None
    rows, longest, _ = now.ancestors.shape
    return (rows, longest), now.places
