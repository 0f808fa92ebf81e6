"""Whether a text that must equal plain decoding's does, and if not, whether rounding explains it.

A pass over several nodes sums in another order than a pass over one, so two scores that are nearly equal may change
places. How near is measured where it happens: the scores of the position are computed again through passes of
different width, and the largest change seen of a gap between scores, times ``SPREAD_FACTOR``, plus one rounding step of
the largest score, bounds the gap that is no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.benchmarks.schema import Difference
from specdec.kv_cache import KVCache
from specdec.prefix import common_prefix
from specdec.sampling import PositionNoise, SamplingParams, derive_seed, filter_logits
from specdec.target import HFTarget
from specdec.tree import PADDING, ROOT, TokenTree

SPREAD_FACTOR = 1.5
"""The computations are a sample: what the run computed may lie outside of what they span."""
RIVALS = 64
"""Best tokens whose gaps to plain decoding's choice are watched: those of two candidates may agree by chance."""
TREE_WIDTHS = (8, 32)
"""Nodes of the padded trees."""
REPLAYED = 32
"""Last new tokens that some of the computations cache one pass each, as plain decoding did."""


class AgreementError(RuntimeError):
    """A lossless policy's text differs from plain decoding's by more than rounding explains."""


@dataclass(frozen=True)
class Check:
    """What the target says of two candidates for one position.

    Attributes:
        gap: distance of their scores, computed as plain decoding did; inf where one of them is excluded.
        below_best: distance of the lesser of them from the best score, likewise.
        bound: what rounding explains.
    """

    gap: float
    below_best: float
    bound: float

    @property
    def rounding(self) -> bool:
        """Whether rounding explains that one was chosen here and the other there."""
        return max(self.gap, self.below_best) <= self.bound


def first_difference(plain: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Index of the first token that differs, or where the shorter has ended; None when they are equal."""
    shared = common_prefix(plain, tokens)
    return None if shared == len(plain) == len(tokens) else shared


def compare(
    target: HFTarget,
    question_id: int,
    prompt: Sequence[int],
    plain: Sequence[int],
    tokens: Sequence[int],
    params: SamplingParams,
) -> Difference | None:
    """The first difference between two continuations of a prompt, judged; None when they are equal.

    A text that only ends earlier than the other is never explained by rounding.
    """
    position = first_difference(plain, tokens)
    if position is None:
        return None
    plain_token, token = (side[position] if position < len(side) else None for side in (plain, tokens))
    if plain_token is None or token is None:
        return Difference(question_id, position, plain_token, token, None, 0.0, False)
    check = check_candidates(target, prompt, plain[:position], plain_token, token, params)
    gap = check.gap if check.gap < float("inf") else None
    return Difference(question_id, position, plain_token, token, gap, check.bound, check.rounding)


@torch.inference_mode()
def check_candidates(
    target: HFTarget, prompt: Sequence[int], emitted: Sequence[int], left: int, right: int, params: SamplingParams
) -> Check:
    """Compute the scores of the token after ``prompt + emitted`` through passes of different width and compare two.

    Args:
        target: the model.
        prompt: token ids.
        emitted: new token ids both texts share.
        left: plain decoding's token.
        right: the run's.
        params: sampling parameters, with the seed the texts were drawn with; the first completion's noise is used.
    """
    logits = torch.stack(_logits(target, prompt, emitted))
    scores = _scores(logits, [*prompt, *emitted], params)  # [K, V]
    as_plain = scores[0]
    gap = _distance(as_plain[left], as_plain[right])
    below_best = _distance(as_plain.max(), torch.minimum(as_plain[left], as_plain[right]))
    rivals = as_plain.topk(min(RIVALS, scores.shape[1])).indices
    rivals = torch.cat([rivals, torch.tensor([left, right], device=rivals.device)])
    gaps = scores[:, rivals] - scores[:, [left]]  # [K, R]
    watched = gaps.isfinite().all(0)
    if not bool(watched.any()):
        return Check(gap, below_best, 0.0)
    spread = float((gaps.amax(0) - gaps.amin(0))[watched].max())
    largest = float(scores[:, rivals[watched]].abs().max())
    return Check(gap, below_best, SPREAD_FACTOR * spread + torch.finfo(target.dtype).eps * largest)


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))


def _logits(target: HFTarget, prompt: Sequence[int], emitted: Sequence[int]) -> list[Tensor]:
    """``[V]`` logits after the last token, first as plain decoding computes them: a pass per token, at least of the
    last ``REPLAYED``; then prefilled whole; both also in trees of several widths."""
    tokens = [*prompt, *emitted]
    capacity = len(tokens) + max(TREE_WIDTHS)
    ahead = max(len(prompt) - 1, len(tokens) - 1 - REPLAYED)
    found = []
    for chunks in ([tokens[:ahead], *([token] for token in tokens[ahead:-1])], [tokens[:-1]]):
        cache = target.new_cache(1, capacity)
        for chunk in filter(None, chunks):
            target.extend([chunk], cache)
        found += [_in_tree(target, cache, tokens[-1], width) for width in (1, *TREE_WIDTHS)]
    found.append(target.extend([tokens], target.new_cache(1, capacity)).logits[0, -1])
    return found


def _in_tree(target: HFTarget, cache: KVCache, token: int, width: int) -> Tensor:
    """``[V]`` logits at a tree's root, the other nodes being padding."""
    nodes = torch.full((1, width), token, device=target.device)
    parents = torch.full_like(nodes, PADDING)
    parents[:, 0] = ROOT
    return target.forward(TokenTree(nodes, parents), cache).logits[0, 0]


def _scores(logits: Tensor, context: Sequence[int], params: SamplingParams) -> Tensor:
    """``[K, V]`` what the deterministic policies take the argmax of."""
    seen = None
    if params.repetition_penalty != 1.0:
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        seen[:, list(context)] = True
    scores = filter_logits(logits, params, seen)
    if params.greedy:
        return scores
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    return scores + PositionNoise(derive_seed(params.seed, 0), vocabulary).gumbel(len(context))
