"""Training of PPD's prompt tokens (Chen et al. 2024, section 3.2): a few embeddings learn, through the frozen target.

A text is cut at many places at once. The target runs over the text once, without a gradient; then the cuts' prompt
tokens run in one pass in which each sees the text up to its cut and the earlier prompt tokens of its own chain. That is
the attention they have when they draft, so nothing here is an approximation of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.heads import OutputHead, make_vocabulary
from specdec.drafters.ppd import PromptTokens, average
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.kv_cache import KVCache
from specdec.packing import PackedLinear
from specdec.target import HFTarget
from specdec.training.card import make_card
from specdec.training.method import Method, TrainingBatch

PASS_NODES = 1024
"""Prompt-token nodes of one pass with a gradient, about; its memory grows with them."""

_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class PPDOptions:
    """Options of training PPD.

    Attributes:
        num_tokens: prompt tokens, k; the deepest guess.
        ensembles: embeddings per prompt token, m.
        cuts: places in a text at which prompt tokens are inserted.
        decay: weight of a prompt token's loss against the one before it.
        vocab_size: most frequent tokens the loss compares distributions over, 0 for all.
    """

    num_tokens: int = 3
    ensembles: int = 1
    cuts: int = 64
    decay: float = 0.8
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        for name, least in (("num_tokens", 1), ("ensembles", 1), ("cuts", 1), ("vocab_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")


@dataclass(frozen=True)
class Cuts:
    """What the prompt tokens of some texts' cuts make of them.

    Attributes:
        states: ``[B, C, m, k, d]`` the target's last hidden states at the prompt tokens.
        teacher: ``[B, C, k, d]`` its last hidden states at the text's own tokens in their places.
        goals: ``[B, C, k]`` int64, the tokens to be predicted.
        valid: ``[B, C, k]`` bool, whether there is such a token in the reply.
    """

    states: Tensor
    teacher: Tensor
    goals: Tensor
    valid: Tensor


class PPDMethod(Method):
    """The loss is ``sum of 0.8^i KL(teacher || student)``, the teacher being the target's own distribution."""

    name = "ppd"
    Options = PPDOptions
    features = ()
    learning_rate = 1e-2  # the paper's
    module: PromptTokens

    def __init__(self, target: HFTarget, options: PPDOptions | None = None) -> None:
        self.options = options or PPDOptions()
        self.target = target
        if any(isinstance(module, PackedLinear) for module in target.model.modules()):
            raise ValueError("PPD trains through the target: load it anew, this one's weights were packed for decoding")
        target.model.requires_grad_(False)
        self.module = PromptTokens(int(target.config.hidden_size), self.options.num_tokens, self.options.ensembles)
        self.module = self.module.to(target.device)
        self._head = self._loss_head = OutputHead(target, None)
        self._begin_with(torch.arange(self._num_embeddings) * target.vocab_size // self._num_embeddings)

    def prepare(self, counts: Tensor) -> None:
        """Start from the embeddings of the most frequent tokens, and compare distributions over those alone."""
        self._begin_with(make_vocabulary(counts, self._num_embeddings))
        size = self.options.vocab_size
        if 0 < size < self.target.vocab_size:
            vocabulary = make_vocabulary(counts, size, sorted(self.target.eos_token_ids))
            self._loss_head = OutputHead(self.target, vocabulary)

    def loss(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        """See ``Method.loss``; the mean is over prompt tokens.

        Texts go through a few at a time, each few's gradient is taken at once and its graph dropped: what is returned
        has the value of the loss and its gradient.
        """
        places, valid = self._choose(batch, at_random=True)
        parameter = self.module.embeddings
        total, gradient = parameter.new_zeros(()), torch.zeros_like(parameter)
        count = int(self._valid_goals(batch, places, valid).sum())
        for cuts in self._run(batch, places, valid):
            part = self._divergence(cuts)
            if part.requires_grad:
                gradient += torch.autograd.grad(part, parameter)[0]
            total += part.detach()
        total, gradient = total / max(1, count), gradient / max(1, count)
        if torch.is_grad_enabled():
            slope = (parameter * gradient).sum()
            total = total + slope - slope.detach()
        return total, count

    @torch.no_grad()
    def hits(self, batch: TrainingBatch, ranks: int = 10) -> tuple[Tensor, Tensor]:
        """See ``Method.hits``. A guess does not depend on the tokens between; the cuts are spread evenly."""
        depth = self.options.num_tokens
        hits = torch.zeros(depth, ranks, dtype=torch.int64, device=batch.tokens.device)
        totals = torch.zeros(depth, dtype=torch.int64, device=batch.tokens.device)
        for cuts in self._run(batch, *self._choose(batch, at_random=False)):
            for level in range(depth):
                logits = average(self._head(cuts.states[:, :, :, level]), dim=2)  # [B, C, V]
                own = logits.gather(-1, cuts.goals[:, :, level : level + 1])
                place = (logits > own).sum(-1)[cuts.valid[:, :, level]]
                hits[level] += torch.bincount(place.clamp(max=ranks), minlength=ranks + 1)[:ranks]
                totals[level] += place.numel()
        return hits, totals

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        facts_of_target = TargetFacts.of(self.target)
        shape = {
            "hidden_size": facts_of_target.hidden_size,
            "num_tokens": self.options.num_tokens,
            "ensembles": self.options.ensembles,
        }
        tensors = {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        weights = DrafterWeights(self.name, facts_of_target, shape, tensors, dict(facts))
        save_weights(folder, weights, make_card(facts))

    @property
    def _num_embeddings(self) -> int:
        return self.options.num_tokens * self.options.ensembles

    @torch.no_grad()
    def _begin_with(self, ids: Tensor) -> None:
        """Set the embeddings to those of ordinary tokens, ``[k * m]`` of them."""
        embedded = self.target.model.get_input_embeddings()(ids.to(self.target.device))
        self.module.embeddings.copy_(embedded.view_as(self.module.embeddings))

    def _choose(self, batch: TrainingBatch, at_random: bool) -> tuple[Tensor, Tensor]:
        """``[B, C]`` int64 positions of the token before each cut, and ``[B, C]`` bool which of them are any."""
        allowed = batch.trained(2)  # the first prompt token's goal lies two places on
        if at_random:
            score = torch.rand(allowed.shape, device=allowed.device)
        else:  # multiples of the golden ratio, which lie evenly however many are taken
            score = torch.arange(allowed.shape[1], device=allowed.device).mul(_GOLDEN_RATIO).frac().expand_as(allowed)
        count = min(self.options.cuts, max(1, int(allowed.sum(1).max())))
        places = score.masked_fill(~allowed, -1.0).topk(count, dim=1).indices.sort(dim=1).values
        return places, allowed.gather(1, places)

    def _valid_goals(self, batch: TrainingBatch, places: Tensor, valid: Tensor) -> Tensor:
        """``[B, C, k]`` bool: goals that lie within the text."""
        goals = places.unsqueeze(-1) + 2 + torch.arange(self.options.num_tokens, device=places.device)
        return valid.unsqueeze(-1) & (goals < batch.lengths.view(-1, 1, 1))

    def _run(self, batch: TrainingBatch, places: Tensor, valid: Tensor) -> Iterator[Cuts]:
        """The cuts of all texts, as many at a time as a pass holds; each must be done with before the next."""
        goals_valid = self._valid_goals(batch, places, valid)
        texts = max(1, PASS_NODES // (places.shape[1] * self._num_embeddings))
        cuts = max(1, PASS_NODES // (texts * self._num_embeddings))
        for start in range(0, len(batch.tokens), texts):
            rows = slice(start, start + texts)
            width = int(batch.lengths[rows].max())
            tokens = batch.tokens[rows, :width]
            cache = self.target.new_cache(len(tokens), width + min(cuts, places.shape[1]) * self._num_embeddings)
            with torch.no_grad():
                # Rows of one length: what stands behind a text's end is seen by none of its tokens.
                states = self.target.extend(tokens.tolist(), cache, ("last",)).features["last"]
            cache.truncate([0] * len(tokens))  # now the text is a tree's first nodes, and a cut may see a part of it
            for first in range(0, places.shape[1], cuts):
                some = slice(first, first + cuts)
                yield self._run_cuts(cache, tokens, states, places[rows, some], goals_valid[rows, some])
                for buffers in cache.layers.values():  # the text's entries go on, the graph behind the others does not
                    buffers.keys, buffers.values = buffers.keys.detach(), buffers.values.detach()

    def _run_cuts(self, cache: KVCache, tokens: Tensor, text: Tensor, places: Tensor, valid: Tensor) -> Cuts:
        """One pass over the prompt tokens of cuts.

        Args:
            cache: holds the texts.
            tokens: ``[B, T]``.
            text: ``[B, T, d]`` the target's last hidden states at them.
            places: ``[B, C]`` positions of the token before each cut.
            valid: ``[B, C, k]``.
        """
        (size, width), num_cuts, device = tokens.shape, places.shape[1], tokens.device
        chains, num_tokens = num_cuts * self.options.ensembles, self.options.num_tokens
        steps = torch.arange(1, num_tokens + 1, device=device)
        seats = places.unsqueeze(2) + steps  # [B, C, k] positions
        positions = torch.arange(width, device=device)
        depth = [positions.expand(size, -1), seats.repeat_interleave(self.options.ensembles, dim=1).flatten(1)]
        before = (positions <= places.unsqueeze(2)).repeat_interleave(self._num_embeddings, dim=1)  # [B, n, T]
        own = torch.kron(torch.eye(chains), torch.ones(num_tokens, num_tokens).tril()).to(device).bool()
        virtual = torch.ones(size, chains * num_tokens, dtype=torch.bool, device=device)
        out = self.target.run(
            torch.zeros_like(virtual, dtype=torch.int64),
            (virtual, self.module.flat().repeat(num_cuts, 1).expand(size, -1, -1)),
            cache,
            torch.cat(depth, dim=1),
            torch.cat([before, own.expand(size, -1, -1)], dim=2),
            ("last",),
            logits_at=[0],
        )
        rows = torch.arange(size, device=device).view(-1, 1, 1)
        return Cuts(
            states=out.features["last"].view(size, num_cuts, self.options.ensembles, num_tokens, -1),
            teacher=text[rows, seats.clamp(max=width - 1)],
            goals=tokens[rows, (seats + 1).clamp(max=width - 1)],
            valid=valid,
        )

    def _divergence(self, cuts: Cuts) -> Tensor:
        """Sum over the prompt tokens of ``decay^i KL(teacher || student)``."""
        with torch.no_grad():
            teacher = self._loss_head(cuts.teacher).float().log_softmax(-1)  # [B, C, k, V']
        student = average(self._loss_head(cuts.states), dim=2).log_softmax(-1)
        divergence = (teacher.exp() * (teacher - student)).sum(-1)  # [B, C, k]
        weight = self.options.decay ** torch.arange(self.options.num_tokens, device=divergence.device)
        total: Tensor = (divergence * weight * cuts.valid).sum()
        return total
