"""From logits to a choice: one function for target and draft, and noise keyed by position.

The noise is a pure function of (seed, position, token id), so a row's text for a seed depends on nothing else: not on
the drafter, not on the shape of its trees, not on the batch (Daliri et al. 2024, "Coupling without communication and
drafter-invariant speculative decoding").
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-6
"""Lowest temperature above 0; logits divided by less may overflow float32."""

_NUCLEUS = 256
_TARGET_STREAM = 0

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How a completion is chosen and where it ends.

    Attributes:
        max_new_tokens: most tokens to emit, >= 1.
        temperature: 0 is greedy; from 1e-6 on, logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens less probable than min_p times the most probable one, in [0, 1].
        repetition_penalty: > 1 makes tokens of prompt and output less likely (Keskar et al. 2019), > 0.
        seed: same seed, same text, whatever the drafter and batch (on a fresh decoder, with the rejection policy); None
            draws one.
        n: completions per prompt, >= 1.
        stop: strings that end the text; the text is cut before the string.
        stop_token_ids: token ids that end the text besides the model's own end-of-sequence ids.
        ignore_eos: go on past the model's own end-of-sequence ids.
        logprobs: record the target's log-probability (temperature 1, unfiltered) of each emitted token.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "n", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "seed" and value is None):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if isinstance(self.stop_token_ids, Integral):
            raise ValueError(f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}")
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature!r}")
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("temperature", 0.0, None),
            ("top_k", 0, None),
            ("min_p", 0.0, 1.0),
            ("n", 1, None),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high) or value == float("inf"):
                bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise ValueError(f"{name} must be {bounds}, got {value!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty!r}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if any(not stop for stop in self.stop):
            raise ValueError("stop strings must not be empty")

    @property
    def filters(self) -> bool:
        """Whether sampling excludes tokens: by top-k, top-p or min-p."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def choice(self) -> tuple[float, ...]:
        """What chooses a token, a seed apart: rows that agree in it are filtered together."""
        if self.greedy:
            return 0.0, 0, 1.0, 0.0, self.repetition_penalty
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields' names, in order."""
        return tuple(field.name for field in fields(cls))


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens (Keskar et al. 2019, section 4.1).

    Args:
        logits: ``[R, V]``.
        seen: ``[R, V]`` bool, tokens of the context.
        penalty: > 0; 1 changes nothing.
    """
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def filter_logits(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """Logits as the sampling parameters change them: at least float32, -inf where a token is excluded.

    Order: repetition penalty, temperature, top-k, top-p, min-p, each on what the one before left. At temperature 0 only
    the penalty applies, and the argmax is the greedy choice.

    Args:
        logits: ``[R, V]``.
        params: the sampling parameters.
        seen: ``[R, V]`` bool, tokens of each row's context; needed with a repetition penalty.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if params.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError(f"repetition_penalty={params.repetition_penalty} needs the tokens seen so far")
        scores = apply_repetition_penalty(scores, seen, params.repetition_penalty)
    if params.greedy:
        return scores
    scores = scores / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        threshold = scores.topk(params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if params.top_p < 1.0:
        scores = _filter_top_p(scores.view(-1, scores.shape[-1]), params.top_p).view(scores.shape)
    if params.min_p > 0.0:
        ratio = scores - scores.amax(-1, keepdim=True)
        scores = scores.masked_fill(ratio.exp() < params.min_p, -torch.inf)
    return scores


def _filter_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Exclude what stands behind the first tokens, best first, whose probability reaches ``top_p``; ties by token id.

    A vocabulary is not sorted for it: its best few hundred tokens nearly always reach that far. Each row is decided by
    itself.
    """
    normaliser = scores.logsumexp(-1, keepdim=True)
    size = scores.shape[-1]
    pending = torch.arange(len(scores), device=scores.device)
    kept = torch.ones_like(scores, dtype=torch.bool)
    for count in (_NUCLEUS, size):
        rows, count = scores[pending], min(count, size)
        best = rows.topk(count, dim=-1).values
        probs = (best - normaliser[pending]).exp()
        # Tokens before which top_p is not reached, the best one in any case.
        number = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True).clamp(min=1)
        last = best.gather(-1, number - 1)
        tied = rows == last
        room = number - (rows > last).sum(-1, keepdim=True)
        kept[pending] = (rows > last) | (tied & (tied.cumsum(-1) <= room))
        pending = pending[(number == count).squeeze(-1)]
        if count == size or len(pending) == 0:
            break
    return scores.masked_fill(~(kept | scores.isnan()), -torch.inf)  # NaN stays, for whoever looks out for it


def log_probs(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """Log-probabilities of the distribution tokens are drawn from; arguments as ``filter_logits``.

    At temperature 0 this is the penalised distribution at temperature 1, whose argmax is the greedy choice.
    """
    return filter_logits(logits, params, seen).log_softmax(-1)


def _mix64(value: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014) on a Python integer."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _hash32(value: Tensor) -> Tensor:
    """A bijective mixing of 32-bit integers held in int64, two rounds of multiply and xor-shift (Wellons 2018)."""
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK32
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK32
    return value ^ (value >> 16)


def derive_seed(seed: int | None, index: int) -> int:
    """The 64-bit seed of completion ``index`` of a prompt; fresh entropy where ``seed`` is None."""
    return _mix64(_mix64(secrets.randbits(64) if seed is None else seed & _MASK64) ^ index)


def noise_key(seed: int, stream: int, position: int) -> int:
    """The 64-bit key from which the noise of one position follows; ``stream`` keeps uses of noise independent."""
    return _mix64(_mix64(seed ^ _mix64(stream)) ^ position)


def keyed_uniform(key: int, index: Tensor) -> Tensor:
    """Numbers in (0, 1), float64, each a function of the key and its index (integers in int64) alone."""
    bits = _hash32(_hash32(index ^ (key & _MASK32)) ^ (key >> 32))
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def keyed_gumbel(key: int, index: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, float32: computed in float64, so that devices agree but for their logarithms' last bit."""
    return -torch.log(-torch.log(keyed_uniform(key, index))).float()


class PositionNoise:
    """Random numbers of one row, each a function of (seed, stream, position, index) alone.

    Args:
        seed: 64-bit seed of the row.
        index: ``[V]`` int64, 0..V-1 on the device where noise is wanted; rows share it.
    """

    def __init__(self, seed: int, index: Tensor) -> None:
        self.seed = seed
        self._index = index
        self._gumbel: dict[int, Tensor] = {}

    def _uniform(self, stream: int, position: int, index: Tensor) -> Tensor:
        return keyed_uniform(noise_key(self.seed, stream, position), index)

    def gumbel_key(self, position: int) -> int:
        """The key that ``gumbel`` of this position is made from, for a kernel that makes it itself."""
        return noise_key(self.seed, _TARGET_STREAM, position)

    def gumbel(self, position: int) -> Tensor:
        """``[V]`` float32 Gumbel(0, 1) noise for the token that will stand at ``position``; kept until forgotten."""
        noise = self._gumbel.get(position)
        if noise is None:
            noise = keyed_gumbel(self.gumbel_key(position), self._index)
            self._gumbel[position] = noise
        return noise

    def uniform(self, position: int, draw: int) -> float:
        """Uniform number in (0, 1) for the ``draw``-th decision about the token at ``position``."""
        return float(self._uniform(1, position, self._index[:1] + draw))

    def draft_gumbel(self, position: int, draw: int) -> Tensor:
        """``[V]`` float32 noise independent of the target's choices, to sample draft tokens with."""
        return keyed_gumbel(noise_key(self.seed, 2 + draw, position), self._index)

    def forget_before(self, position: int) -> None:
        """Drop kept noise of positions that are settled."""
        for settled in [kept for kept in self._gumbel if kept < position]:
            del self._gumbel[settled]
