"""Medusa (Cai et al. 2024): heads that read one hidden state and guess several tokens ahead, each for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.drafters.heads import HeadConfig, HeadDrafter, HeadModule, latest
from specdec.target import Feature
from specdec.tree import TokenTree


@dataclass(frozen=True)
class MedusaConfig(HeadConfig):
    """Options of Medusa; a head per depth, so ``depth`` is at most the number of heads trained."""

    width: int = 24


class MedusaHeads(HeadModule):
    """K heads of L residual blocks ``x + SiLU(W x + b)`` each (section 2.1.1), W zero at first.

    Mixed, the first block of head k adds to ``M_k x`` in place of x: a linear map can be fitted in closed form before
    training begins, where the identity guesses the token that is known already.

    Args:
        hidden_size: d.
        num_heads: K.
        num_layers: L.
        vocab_size: V', size of the reduced vocabulary; 0 for the target's whole.
        own_output: width of the heads' own output layers, as published checkpoints have them; 0 for none.
        mixed: whether there is a linear map per head; published checkpoints have none.
    """

    features = ("last",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_layers: int = 1,
        vocab_size: int = 0,
        own_output: int = 0,
        mixed: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size))
        self.mix = nn.Parameter(torch.eye(hidden_size).repeat(num_heads, 1, 1)) if mixed else None  # [K, d, d]
        vocabulary = torch.zeros(vocab_size, dtype=torch.int64) if vocab_size else None
        self.register_buffer("vocabulary", vocabulary)
        if own_output:
            self.output = OutputPerHead(num_heads, hidden_size, own_output)

    @property
    def num_heads(self) -> int:
        """K."""
        return self.weight.shape[1]

    def forward(self, hidden: Tensor) -> Tensor:
        """What each head makes of hidden states ``[..., d]``: ``[..., K, d]``, to be read by the output head."""
        shape = self.weight.shape[1:3]  # K, d
        # The first block reads the same state in every head: one product, whatever the batch.
        first = F.linear(hidden, self.weight[0].flatten(0, 1), self.bias[0].flatten())
        first = F.silu(first).view(*hidden.shape[:-1], *shape)
        if self.mix is None:
            states = hidden.unsqueeze(-2) + first
        else:
            states = F.linear(hidden, self.mix.flatten(0, 1)).view_as(first) + first
        for weight, bias in zip(self.weight[1:], self.bias[1:], strict=True):
            flat = states.reshape(-1, *shape).transpose(0, 1)  # [K, N, d]
            mixed = torch.baddbmm(bias.unsqueeze(1), flat, weight.transpose(1, 2))
            states = states + F.silu(mixed).transpose(0, 1).view_as(states)
        return states


class OutputPerHead(nn.Module):
    """An output layer ``[V', d]`` for every head."""

    def __init__(self, num_heads: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, vocab_size, hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[B, K, V']`` of states ``[B, K, d]``."""
        return torch.einsum("bkd,kvd->bkv", states, self.weight)


class MedusaDrafter(HeadDrafter):
    """Head i guesses the token i + 2 places after the last one whose hidden state is known."""

    name = "medusa"
    Config = MedusaConfig
    takes_rows = True
    module: MedusaHeads

    def make_module(self, shape: Mapping[str, Any]) -> MedusaHeads:
        return MedusaHeads(**shape)

    @property
    def max_depth(self) -> int:
        return min(self.config.depth, self.module.num_heads)

    def begin(self, batch_size: int) -> None:
        weight = self.module.weight
        self._hidden = weight.new_zeros(batch_size, weight.shape[-1])  # [B, d] at the last committed token
        self._logits: Tensor | None = None

    def absorb(self, features: Mapping[Feature, Tensor], tokens: Tensor, counts: Sequence[int]) -> None:
        self._hidden = latest(features["last"], counts, self._hidden)
        self._logits = None

    def logits(self, tree: TokenTree, first: int, level: int) -> Tensor:
        if self._logits is None:
            self._logits = self.output_logits(self.module(self._hidden))  # [B, K, V']
        return self._logits[:, level - 1 : level]

    def keep_rows(self, rows: Tensor) -> None:
        self._hidden = self._hidden[rows]
        self._logits = None

    def add_rows(self, other: Self) -> None:
        self._hidden = torch.cat([self._hidden, other._hidden])
        self._logits = None

    def stop(self) -> None:
        self._logits = None
