"""Clover-2 (Xiao et al. 2024): heads that run in sequence, each told the token drafted before it.

``h_j`` is the target's hidden state before the final norm, ``e`` a frozen embedding: the rows of the target's output
head, normed. Entry j of a row is ``A1(h_j, e(token j + 1))``; a block of decoder layers with a cache of its own runs
over the entries, and what it makes of the last one is the state the draft starts from. The first head reads that state;
every later head mixes in the token drafted before it (the regressive connection) and reads the result.

The paper adds attention's output to h itself. Here h is brought to unit length per channel first: its size, tens in
common models, says nothing about the next token (the final norm drops it) and would drown the embedding for thousands
of training steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.attention import AttentionPass
from specdec.drafters.heads import HeadConfig, HeadDrafter, HeadModule
from specdec.drafters.layer import Attend, CachedAttention, DraftLayer, LayerShape, RMSNorm
from specdec.kv_cache import KVCache
from specdec.target import PREFILL_CHUNK, Feature, HFTarget
from specdec.tree import TokenTree


@dataclass(frozen=True)
class CloverConfig(HeadConfig):
    """Options of Clover; the later heads are one and the same, so ``depth`` may exceed the depths trained."""


class AttentionDecoder(nn.Module):
    """Attention of a state over one embedding, without a softmax: each head adds its value times a cosine.

    Queries and keys start out pointing the same way, so that a cosine starts near 1 and gating is learned on top;
    values start at zero.

    Args:
        width: d.
        num_heads: heads; d is a multiple of it.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        with torch.no_grad():
            self.query.bias.fill_(1.0)
            self.key_value.bias.fill_(0.0)
            self.key_value.bias[:width] = 1.0
            self.key_value.weight[width:] = 0.0

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """``[..., d]`` from states and embeddings ``[..., d]``."""
        width = states.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        query: Tensor = self.query(unit(states)).unflatten(-1, heads)
        key, value = self.key_value(embedded).chunk(2, dim=-1)
        cosine = F.cosine_similarity(query, key.unflatten(-1, heads), dim=-1)  # [..., H]
        mixed: Tensor = states + (cosine.unsqueeze(-1) * value.unflatten(-1, heads)).flatten(-2)
        return mixed


class CloverHead(HeadModule):
    """The trained part.

    Args:
        layer: sizes of the augmenting layers, the target's own.
        num_layers: augmenting layers, 0 allowed.
        num_drafts: tokens ahead it was trained for.
        vocab_size: V', size of the reduced vocabulary; 0 for the target's whole.
    """

    features = ("pre_norm",)

    def __init__(self, layer: LayerShape, num_layers: int = 2, num_drafts: int = 5, vocab_size: int = 0) -> None:
        super().__init__()
        width = layer.hidden_size
        gates = next(n for n in range(layer.num_heads, 0, -1) if width % n == 0)
        self.num_drafts = num_drafts
        self.first = AttentionDecoder(width, gates)
        self.norms = nn.ModuleList(RMSNorm(width, layer.norm_eps) for _ in range(num_layers))
        self.layers = nn.ModuleList(DraftLayer(layer) for _ in range(num_layers))
        self.later = AttentionDecoder(width, gates)
        self.first_out = nn.Linear(width, width, bias=False)
        self.later_out = nn.Linear(2 * width, width, bias=False)
        self.first_norm = RMSNorm(width, layer.norm_eps)
        self.later_norm = RMSNorm(width, layer.norm_eps)
        with torch.no_grad():
            self.first_out.weight.copy_(torch.eye(width))
            self.later_out.weight.copy_(torch.eye(width, 2 * width))
        self.register_buffer("vocabulary", torch.zeros(vocab_size, dtype=torch.int64) if vocab_size else None)

    def augment(
        self, hidden: Tensor, embedded: Tensor, positions: Tensor, attention: Callable[[int], Attend]
    ) -> Tensor:
        """States ``[B, n, d]`` that drafts start from.

        Args:
            hidden: ``[B, n, d]`` the target's hidden states before its final norm.
            embedded: ``[B, n, d]`` embeddings of the tokens that follow each.
            positions: ``[B, n]`` int64.
            attention: the attention of each augmenting layer.
        """
        states: Tensor = self.first(unit(hidden), embedded)
        for index, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            states = layer(norm(states), states, positions, attention(index))
        return unit(states)

    def read_first(self, states: Tensor) -> Tensor:
        """What the output head reads ``[..., d]`` to draft the first token."""
        out: Tensor = self.first_norm(self.first_out(states))
        return out

    def step(self, states: Tensor, embedded: Tensor) -> Tensor:
        """States ``[..., d]`` after one more drafted token."""
        out: Tensor = self.later(states, embedded)
        return out

    def read_later(self, states: Tensor, embedded: Tensor) -> Tensor:
        """What the output head reads ``[..., d]`` to draft the token after the one ``embedded``."""
        out: Tensor = self.later_norm(self.later_out(torch.cat([states, embedded], dim=-1)))
        return out


class CloverDrafter(HeadDrafter):
    """Keeps the augmenting layers' keys and values of every committed entry; nothing drafted enters that cache."""

    name = "clover"
    Config = CloverConfig
    takes_rows = True
    module: CloverHead

    def make_module(self, shape: Mapping[str, Any]) -> CloverHead:
        return make_clover(shape)

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        super().bind(target, tokenizer)
        self._table = output_table(target)
        self._empty = torch.zeros(0, self._table.shape[1], dtype=target.dtype, device=target.device)

    def begin(self, batch_size: int) -> None:
        self._cache = KVCache(batch_size, PREFILL_CHUNK, self._empty.device)
        self._start = self._empty.new_zeros(batch_size, self._empty.shape[1])  # [B, d] after the last entry
        self._level, self._level_first = self._start.unsqueeze(1), 0

    def absorb(self, features: Mapping[Feature, Tensor], tokens: Tensor, counts: Sequence[int]) -> None:
        hidden = features["pre_norm"]
        for start in range(0, max(counts), PREFILL_CHUNK):
            part = [min(max(count - start, 0), PREFILL_CHUNK) for count in counts]
            end = start + max(part)
            count = torch.tensor(part, device=tokens.device)
            latest = self._run(hidden[:, start:end], embed(self._table, tokens[:, start:end]), count, part)
            self._start = torch.where((count > 0).unsqueeze(1), latest, self._start)

    def _run(self, hidden: Tensor, embedded: Tensor, count: Tensor, part: Sequence[int]) -> Tensor:
        """Append entries ``[B, n, d]`` to the rows; states ``[B, d]`` after the last of each."""
        size, width = hidden.shape[:2]
        rows = torch.arange(size, device=hidden.device)
        last = (count - 1).clamp(min=0)
        if not self.module.layers:
            at = (rows.unsqueeze(1), last.unsqueeze(1))
            return self.module.augment(hidden[at], embedded[at], last.unsqueeze(1), _no_attention)[:, 0]
        needed = self._cache.max_length + width
        if needed > self._cache.capacity:
            self._cache.reserve(2 * needed)
        depth = torch.arange(width, device=hidden.device).expand(size, -1)
        causal = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril().expand(size, -1, -1)
        shared = AttentionPass(self._cache, depth, causal)
        states = self.module.augment(hidden, embedded, shared.positions, lambda layer: CachedAttention(shared, layer))
        self._cache.advance(part)
        return states[rows, last]

    def logits(self, tree: TokenTree, first: int, level: int) -> Tensor:
        if level == 1:
            self._level, self._level_first = self._start.unsqueeze(1), 0
            return self.output_logits(self.module.read_first(self._level))
        parents = (tree.parents[:, first:] - self._level_first).clamp(min=0)  # padding may look at any state
        states = self._level.gather(1, parents.unsqueeze(2).expand(-1, -1, self._level.shape[2]))  # [B, n, d]
        embedded = embed(self._table, tree.tokens[:, first:])
        self._level, self._level_first = self.module.step(states, embedded), first
        return self.output_logits(self.module.read_later(self._level, embedded))

    def keep_rows(self, rows: Tensor) -> None:
        self._start = self._start[rows]
        self._cache.keep_rows(rows.tolist())

    def add_rows(self, other: Self) -> None:
        self._start = torch.cat([self._start, other._start])
        self._cache.take_rows(other._cache)

    def stop(self) -> None:
        self.begin(0)


def make_clover(shape: Mapping[str, Any]) -> CloverHead:
    """The module that weights of this shape belong to."""
    return CloverHead(**{**shape, "layer": LayerShape(**shape["layer"])})


def output_table(target: HFTarget) -> Tensor:
    """``[V, d]`` rows of the target's output head, shared where they can be."""
    inputs, outputs = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    tied = getattr(target.config, "tie_word_embeddings", False)
    # A packed head would give a copy of what the input embeddings hold anyway.
    table: Tensor = (inputs if tied and inputs.weight.shape == outputs.weight.shape else outputs).weight.detach()
    return table


def embed(table: Tensor, tokens: Tensor) -> Tensor:
    """Frozen embeddings ``[..., d]`` of tokens ``[...]``, of unit size per channel."""
    return unit(table[tokens])


def unit(states: Tensor) -> Tensor:
    """States ``[..., d]`` scaled to a root mean square of 1."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


def _no_attention(layer: int) -> Attend:
    raise AssertionError(f"there is no augmenting layer {layer}")
