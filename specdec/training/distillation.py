"""Training drafters that read the target's hidden states and share its output head: Medusa, Clover."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from specdec.drafters.heads import HeadModule, OutputHead, make_vocabulary
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.target import HFTarget
from specdec.training.card import make_card
from specdec.training.method import Method, TrainingBatch

_BLOCK = 256
"""Positions whose logits exist at the same time: over a large vocabulary they are the bulk of the memory."""


@dataclass(frozen=True)
class DistillationOptions:
    """What these methods have in common.

    Attributes:
        vocab_size: tokens that can be drafted, the most frequent ones of the training texts; 0 for all.
        decay: factor on the loss from each draft depth to the next.
        regression: weight of the smooth L1 distance to the target's normed states (Clover-2, section 3.4); such a
            distance says more of a token than its distribution does, which few texts need.
        muon: whether matrices learn by Muon, else by AdamW as all else (``specdec.training.optimizer``).
        int8: store matrices as int8 with a scale per row, else bfloat16.
    """

    vocab_size: int = 8192
    decay: float = 0.8
    regression: float = 0.0
    muon: bool = False
    int8: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size must be at least 0 (0 is the whole vocabulary), got {self.vocab_size}")
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")
        if not self.regression >= 0.0:
            raise ValueError(f"regression must be at least 0, got {self.regression}")


@dataclass(frozen=True)
class Anchors:
    """The positions of a batch that a draft may start from: last known state, with the token after next in the reply.

    Attributes:
        rows: ``[N]`` int64, text of each.
        positions: ``[N]`` int64, ascending within a text without gaps.
        valid: ``[N, K]`` bool, whether the text has the token that draft k is to guess, ``positions + 2 + k``.
    """

    rows: Tensor
    positions: Tensor
    valid: Tensor

    @classmethod
    def of(cls, batch: TrainingBatch, num_drafts: int) -> Anchors:
        """The anchors of a batch for drafts of K tokens."""
        rows, positions = batch.trained(2).nonzero(as_tuple=True)
        goals = positions.unsqueeze(1) + 2 + torch.arange(num_drafts, device=rows.device)
        return cls(rows, positions, goals < batch.lengths[rows].unsqueeze(1))

    def pick(self, values: Tensor, ahead: int = 0) -> Tensor:
        """``[N, ...]`` from ``[B, T, ...]``: what stands ``ahead`` places after each anchor, any value past the end."""
        return values[self.rows, (self.positions + ahead).clamp(max=values.shape[1] - 1)]


class HeadMethod(Method):
    """Soft cross-entropy to the target's own distribution at every draft depth, over the reduced vocabulary.

    The loss is the mean over anchors of ``sum_k decay^k * loss_k``. Every anchor gives K guesses: draft k stands for
    the token k + 2 places after it, whose distribution the target gives at k + 1 places after it.
    """

    module: HeadModule
    options: DistillationOptions
    num_drafts: int

    def __init__(self, target: HFTarget, options: Any) -> None:
        self.target = target
        self.options = options
        self.muon = self.options.muon
        size = self.options.vocab_size
        self.vocab_size = size if size < target.vocab_size else 0

    @property
    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Arguments of the module, to build it again."""

    @abstractmethod
    def drafts(self, batch: TrainingBatch, anchors: Anchors) -> Tensor:
        """``[N, K, d]`` what the output head reads at each anchor and depth, given the true tokens before."""

    def prepare(self, counts: Tensor) -> None:
        vocabulary = self.module.vocabulary
        if vocabulary is not None:
            vocabulary.copy_(make_vocabulary(counts, self.vocab_size, sorted(self.target.eos_token_ids)))
        self._open_head()

    def start_from(self, weights: DrafterWeights) -> None:
        mine = json.loads(json.dumps(self.shape))
        if weights.drafter == self.name and weights.shape != mine:
            raise ValueError(f"the weights to start from have the shape {weights.shape}, the options ask for {mine}")
        super().start_from(weights)
        self._open_head()

    def _open_head(self) -> None:
        """The target's head over the module's vocabulary."""
        vocabulary = self.module.vocabulary
        self.head = OutputHead(self.target, vocabulary).float()
        self._place = torch.full((self.target.vocab_size,), -1, device=self.target.device)  # token -> logit
        ids = torch.arange(self.target.vocab_size, device=self.target.device) if vocabulary is None else vocabulary
        self._place[ids] = torch.arange(len(ids), device=ids.device)

    def loss(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        anchors = Anchors.of(batch, self.num_drafts)
        drafts = self.drafts(batch, anchors)
        goals = anchors.pick(batch.features["last"], 1).float()
        losses = cross_entropies(drafts, goals, self.head, anchors.valid) + self.extra_losses(drafts, goals, anchors)
        weights = self.options.decay ** torch.arange(self.num_drafts, device=losses.device)
        count = len(anchors.rows)
        return (losses * weights).sum() / max(count, 1), count

    def extra_losses(self, drafts: Tensor, goals: Tensor, anchors: Anchors) -> Tensor:
        """``[N, K]`` losses beside the cross-entropy, 0 where an anchor is not valid; ``goals`` as for it."""
        if not self.options.regression:
            return drafts.new_zeros(drafts.shape[:2])
        count, depth = drafts.shape[:2]
        ahead = torch.arange(count, device=drafts.device).unsqueeze(1) + torch.arange(depth, device=drafts.device)
        wanted = goals[ahead.clamp(max=max(count - 1, 0))]  # [N, K, d]
        distances = F.smooth_l1_loss(drafts.to(goals.dtype), wanted, reduction="none").mean(-1)
        return self.options.regression * distances.masked_fill(~anchors.valid, 0.0)

    def hits(self, batch: TrainingBatch, ranks: int = 10) -> tuple[Tensor, Tensor]:
        anchors = Anchors.of(batch, self.num_drafts)
        drafts = self.drafts(batch, anchors)
        found = torch.zeros(self.num_drafts, ranks, dtype=torch.int64, device=drafts.device)
        for depth in range(self.num_drafts):
            place = self._place[anchors.pick(batch.tokens, 2 + depth)]
            known = anchors.valid[:, depth] & (place >= 0)
            blocks = zip(torch.split(drafts[known, depth], _BLOCK), torch.split(place[known], _BLOCK), strict=True)
            for states, at in blocks:
                with torch.autocast(states.device.type, enabled=False):  # ties of rounded logits would count as hits
                    logits = self.head(states.float())
                rank = (logits > logits.gather(1, at.unsqueeze(1))).sum(1)
                found[depth] += torch.bincount(rank[rank < ranks], minlength=ranks)
        return found, anchors.valid.sum(0)

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        weights = DrafterWeights(
            drafter=self.name,
            target=TargetFacts.of(self.target),
            shape=self.shape,
            tensors=self.module.state_dict(),
            facts=dict(facts),
        )
        save_weights(folder, weights, make_card(facts), quantize=self.options.int8)


def cross_entropies(drafts: Tensor, goals: Tensor, head: OutputHead, valid: Tensor) -> Tensor:
    """``[N, K]`` soft cross-entropies of drafts to the target's distributions, 0 where not valid.

    Args:
        drafts: ``[N, K, d]`` what the head reads.
        goals: ``[N, d]``, what the target's own head reads at the token before the one that draft 0 of each anchor is
            for; that of draft k is ``goals[n + k]``, of the same text where it is valid.
        head: from states to logits; frozen.
        valid: ``[N, K]`` bool.
    """
    apply: Any = _CrossEntropies.apply
    losses: Tensor = apply(drafts, goals, head.weight, head.bias, valid)
    return losses


class _CrossEntropies(torch.autograd.Function):
    """Block by block, the gradient with it: logits over a vocabulary are never held for the backward pass.

    With z a draft's logits and p the target's probabilities the loss is ``logsumexp(z) - sum(p * z)``. The gradient
    with respect to a logit is the difference of the two probabilities, so all that has to be kept is that difference
    times the frozen head, as large as the drafts themselves. ``sum(p * z)`` is the draft times ``p @ head``, which all
    depths have in common. Everything as wide as the vocabulary has autocast's dtype: memory is what it waits for.
    """

    @staticmethod
    def forward(ctx: Any, drafts: Tensor, goals: Tensor, weight: Tensor, bias: Tensor | None, valid: Tensor) -> Tensor:
        count, depth, _ = drafts.shape
        losses = torch.zeros(count, depth, dtype=torch.float32, device=drafts.device)
        gradient = torch.zeros_like(drafts)
        dtype = computing_dtype(drafts)
        weight, bias, inputs = weight.to(dtype), None if bias is None else bias.to(dtype), drafts.to(dtype)
        for start in range(0, count, _BLOCK):
            end = min(start + _BLOCK, count)
            wanted = F.linear(goals[start : end + depth - 1].to(dtype), weight, bias).softmax(-1)  # [n, V']
            mean = (wanted @ weight).float()  # [n, d]
            offset = None if bias is None else (wanted @ bias).float()  # [n]
            for k in range(depth):
                stop = min(end, count - k)  # the last anchors have no goal so far ahead
                if stop <= start:
                    break
                known = slice(k, k + stop - start)
                logits = F.linear(inputs[start:stop, k], weight, bias)
                probs = logits.softmax(-1)
                log_sum = logits.amax(-1).float() - probs.amax(-1).float().log()
                expected = (drafts[start:stop, k].float() * mean[known]).sum(-1)
                losses[start:stop, k] = log_sum - (expected if offset is None else expected + offset[known])
                gradient[start:stop, k] = probs.sub_(wanted[known]) @ weight
        ctx.save_for_backward(gradient.masked_fill_(~valid.unsqueeze(2), 0.0))
        return losses.masked_fill_(~valid, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].unsqueeze(2).to(gradient.dtype), None, None, None, None


def computing_dtype(like: Tensor) -> torch.dtype:
    """The dtype of matrix products with a tensor: autocast's where it is on."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
