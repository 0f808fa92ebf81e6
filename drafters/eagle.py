"""EAGLE (Li et al. 2024, 2025): one decoder layer that runs ahead on its own hidden states.

Entry j of a row pairs what the target made of token j with the embedding of token j + 1. In EAGLE-3's form, states of
a low, a middle and a high layer of the target are fused into one; from the second drafted token on, the layer's own
output takes its place. The layer attends to all entries and, while a tree is drafted, to the nodes above.

EAGLE-3 fuses the target's states as they are, and lets the layer add to the fused state. Here each state is brought
to unit length per channel first: their sizes differ by orders of magnitude between layers, which a short training does
not unlearn. And the layer adds to a linear mix of embedding and state, as the first EAGLE had one (Li et al. 2024): it
can be fitted in closed form before training begins. Published weights are run as they were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from specdec.attention import AttentionPass
from specdec.batch import Batch
from specdec.drafters.compiled import UNIT_EPS, CompiledDrafter, can_compile
from specdec.drafters.heads import HeadConfig, HeadDrafter, HeadModule, latest
from specdec.drafters.layer import Attend, CachedAttention, DraftLayer, LayerShape, RMSNorm, rms_norm
from specdec.kernels.decoder_layer import MOST_TOP
from specdec.kv_cache import KVCache
from specdec.target import PREFILL_CHUNK, Feature, HFTarget
from specdec.tree import TokenTree


@dataclass(frozen=True)
class EagleConfig(HeadConfig):
    """Options of EAGLE; the layer runs on its own states, so ``depth`` may exceed the depths trained."""


class EagleHead(HeadModule):
    """The trained part.

    Args:
        layer: sizes of the decoder layer.
        states: the target's hidden states that are fused; one or three.
        vocab_size: V', size of the reduced vocabulary; 0 for the target's whole.
        own_output: whether it has an output head of its own.
        scaled: whether the target's states are brought to unit length per channel.
        mixed: whether the layer adds to a mix of embedding and state, in place of the state.
        fc_bias: whether the fusion has a bias.
        norm_before_residual: whether the layer adds to the normed hidden state.
    """

    def __init__(
        self,
        layer: LayerShape,
        states: Sequence[Feature],
        vocab_size: int = 0,
        own_output: bool = False,
        scaled: bool = True,
        mixed: bool = True,
        fc_bias: bool = False,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__()
        width = layer.hidden_size
        self.features = tuple(states)
        self.scaled = scaled
        self.norm_before_residual = norm_before_residual
        self.fc = nn.Linear(len(self.features) * width, width, bias=fc_bias)
        self.embedding_norm = RMSNorm(width, layer.norm_eps)
        self.hidden_norm = RMSNorm(width, layer.norm_eps)
        self.mix = nn.Linear(2 * width, width, bias=False) if mixed else None
        self.layer = DraftLayer(layer, 2 * width)
        self.norm = RMSNorm(width, layer.norm_eps)
        self.register_buffer("vocabulary", torch.zeros(vocab_size, dtype=torch.int64) if vocab_size else None)
        if own_output:
            self.output = nn.Linear(width, vocab_size, bias=False)

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm, RMSNorm]:
        """Of the embedding, of the state before it, and of what the output head reads."""
        return self.embedding_norm, self.hidden_norm, self.norm

    def fuse(self, features: Mapping[Feature, Tensor]) -> Tensor:
        """One state ``[..., d]`` from the target's ``[..., d]`` each."""
        dtype = self.norm.weight.dtype
        states = torch.cat([features[name] for name in self.features], dim=-1).to(dtype)
        if self.scaled:
            width = self.fc.out_features
            ones = torch.ones(width, dtype=dtype, device=states.device)
            states = rms_norm(states.view(*states.shape[:-1], -1, width), ones, UNIT_EPS).flatten(-2)
        fused: Tensor = self.fc(states)
        return fused

    def forward(self, hidden: Tensor, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The layer's output ``[B, n, d]``.

        Args:
            hidden: ``[B, n, d]`` fused states of the target, or the layer's own output one token before.
            embedded: ``[B, n, d]`` embeddings of the tokens that follow each.
            positions: ``[B, n]`` int64.
            attend: the attention.
        """
        normed = self.hidden_norm(hidden)
        inputs = torch.cat([self.embedding_norm(embedded), normed], dim=-1)
        residual = normed if self.norm_before_residual else hidden
        out: Tensor = self.layer(inputs, residual if self.mix is None else self.mix(inputs), positions, attend)
        return out

    def read(self, states: Tensor) -> Tensor:
        """What the output head reads ``[..., d]``."""
        out: Tensor = self.norm(states)
        return out


class FirstEagleHead(HeadModule):
    """EAGLE's first form, which EAGLE-2 drafts its trees with; only published weights have it.

    Embedding and last state are mixed into what the layer both reads and adds to. Nothing is normed before it or after,
    and the output head is the target's.

    Args:
        layer: sizes of the decoder layer.
        fc_bias: whether the mix has a bias.
    """

    features = ("last",)

    def __init__(self, layer: LayerShape, fc_bias: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * layer.hidden_size, layer.hidden_size, bias=fc_bias)
        self.layer = DraftLayer(layer)
        self.register_buffer("vocabulary", None)

    def fuse(self, features: Mapping[Feature, Tensor]) -> Tensor:
        """The last state ``[..., d]``."""
        return features["last"].to(self.layer.post_attention_layernorm.weight.dtype)

    def forward(self, hidden: Tensor, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """As ``EagleHead``'s."""
        mixed = self.fc(torch.cat([embedded, hidden], dim=-1))
        out: Tensor = self.layer(mixed, mixed, positions, attend)
        return out

    def read(self, states: Tensor) -> Tensor:
        """As ``EagleHead``'s."""
        return states


class EagleDrafter(HeadDrafter):
    """Keeps the layer's keys and values of every committed entry; what is drafted stands behind them until the pass."""

    name = "eagle"
    Config = EagleConfig
    takes_rows = True
    module: EagleHead | FirstEagleHead

    def make_module(self, shape: Mapping[str, Any]) -> EagleHead | FirstEagleHead:
        return make_eagle(shape) if "states" in shape else make_first_eagle(shape)

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        super().bind(target, tokenizer)
        self._table = target.model.get_input_embeddings().weight.detach()  # [V, d]
        self._compiled = self._compile()

    def _compile(self) -> CompiledDrafter | None:
        """Kernels for the module, where they can read its weights."""
        module, table = self.module, self._table
        if not isinstance(module, EagleHead) or self.config.branching > MOST_TOP:
            return None
        layer = module.layer.whole()
        if not can_compile(table, [layer], [self._head, module.fc, *([module.mix] if module.mix else [])]):
            return None
        assert layer is not None
        norms = [(norm.weight, norm.eps or torch.finfo(table.dtype).eps) for norm in module.norms]
        return CompiledDrafter(
            [layer], module.layer.shape.num_kv_heads, module.layer.shape.head_dim, table, norms, self._head,
            lambda length: module.layer.angle_table(length, table.dtype), module.fc, module.scaled, module.mix,
            module.norm_before_residual, module.vocabulary, self._hit_rates,
        )  # fmt: skip

    def begin(self, batch_size: int) -> None:
        self._cache = KVCache(batch_size, PREFILL_CHUNK, self._table.device)
        self._start = self._table.new_zeros(batch_size, self._table.shape[1])  # [B, d] after the last entry
        self._level, self._level_first = self._start.unsqueeze(1), 0

    def absorb(self, features: Mapping[Feature, Tensor], tokens: Tensor, counts: Sequence[int]) -> None:
        for start in range(0, max(counts), PREFILL_CHUNK):
            part = [min(max(count - start, 0), PREFILL_CHUNK) for count in counts]
            end, width = start + max(part), max(part)
            read = {name: states[:, start:end] for name, states in features.items()}
            if self._compiled is not None:
                states = self._compiled.enter(
                    self._cache, tokens[:, start:end], [read[name] for name in self.module.features]
                )
            else:
                hidden = self.module.fuse(read)
                depth = torch.arange(width, device=tokens.device).expand(len(counts), -1)
                causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).tril()
                states = self._run(hidden, tokens[:, start:end], depth, causal.expand(len(counts), -1, -1))
            self._cache.advance(part)
            self._start = latest(states, part, self._start)

    def absorb_path(
        self, features: Mapping[Feature, Tensor], path: Tensor, tokens: Tensor, counts: Sequence[int]
    ) -> None:
        if self._compiled is None or path.shape[1] > PREFILL_CHUNK:
            super().absorb_path(features, path, tokens, counts)
            return
        states = self._compiled.enter(self._cache, tokens, [features[name] for name in self.module.features], path)
        self._cache.advance(counts)
        self._start = latest(states, counts, self._start)

    def _run(self, hidden: Tensor, tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
        """The layer over entries ``[B, n, d]`` and ``[B, n]``; depth and ancestors as ``AttentionPass`` has them."""
        needed = self._cache.max_length + depth.shape[1]
        if needed > self._cache.capacity:
            self._cache.reserve(2 * needed)
        shared = AttentionPass(self._cache, depth, ancestors)
        states: Tensor = self.module(hidden, self._table[tokens], shared.positions, CachedAttention(shared, 0))
        return states

    def compiled_tree(self, batch: Batch, depth: int, max_nodes: int) -> TokenTree | None:
        if self._compiled is None:
            return None
        sizes = (depth, self._width, self.config.branching, max_nodes, batch.total_nodes(max_nodes))
        return self._compiled.grow(self._cache, batch.pending, self._start, sizes)

    def logits(self, tree: TokenTree, first: int, level: int) -> Tensor:
        if level == 1:
            self._level, self._level_first = self._start.unsqueeze(1), 0
        else:
            parents = (tree.parents[:, first:] - self._level_first).clamp(min=0)  # padding may look at any state
            hidden = self._level.gather(1, parents.unsqueeze(2).expand(-1, -1, self._level.shape[2]))
            # The root's entry is in the cache: the drafter's own tree is the one below it.
            depth, ancestors = (tree.depth[:, 1:] - 1).clamp(min=0), tree.ancestors[:, first:, 1:]
            self._level = self._run(hidden, tree.tokens[:, first:], depth, ancestors)
            self._level_first = first
        return self.output_logits(self.module.read(self._level))

    def keep_rows(self, rows: Tensor) -> None:
        self._start = self._start[rows]
        self._cache.keep_rows(rows.tolist())

    def add_rows(self, other: Self) -> None:
        self._start = torch.cat([self._start, other._start])
        self._cache.take_rows(other._cache)

    def stop(self) -> None:
        self.begin(0)


def make_eagle(shape: Mapping[str, Any]) -> EagleHead:
    """The module that weights of this shape belong to."""
    return EagleHead(**{**shape, "layer": LayerShape(**shape["layer"])})


def make_first_eagle(shape: Mapping[str, Any]) -> FirstEagleHead:
    """The same for the first form."""
    return FirstEagleHead(**{**shape, "layer": LayerShape(**shape["layer"])})
