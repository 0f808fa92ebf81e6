"""The rows of a call while they are generated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.sampling import PositionNoise, SamplingParams, filter_logits
from specdec.stats import DecodeStats
from specdec.text import TextStream
from specdec.tree import SiblingSampling

FinishReason = Literal["eos", "stop", "length", "context", "error", "cancelled"]
"""Why a text ended: end-of-sequence token, stop string or stop token, max_new_tokens, end of the model's context, the
target failed, or the caller closed the stream."""

_row_ids = itertools.count()


@dataclass
class Row:
    """One completion in flight.

    Invariant: ``tokens`` is prompt plus emitted tokens; its last entry is the pending token, all before it are in the
    target's cache between steps.

    Attributes:
        tokens: token ids, prompt first.
        prompt_len: number of prompt tokens.
        max_len: length at which the row must end, from max_new_tokens and the model's context.
        params: sampling parameters.
        noise: the row's random numbers.
        eos_token_ids: ids that end the row as "eos".
        prompt_index: which prompt of the call this completes.
        completion_index: which of its n completions this is.
        text: decodes tokens as they come; None without a tokenizer.
        row_id: unique in the process, for drafters that keep state per row.
    """

    tokens: list[int]
    prompt_len: int
    max_len: int
    params: SamplingParams
    noise: PositionNoise
    eos_token_ids: frozenset[int] = frozenset()
    prompt_index: int = 0
    completion_index: int = 0
    text: TextStream | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[float] = field(default_factory=list)
    row_id: int = field(default_factory=lambda: next(_row_ids))

    @property
    def pending(self) -> int:
        """The token emitted last, root of the next tree."""
        return self.tokens[-1]

    @property
    def emitted(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_len :]

    @property
    def max_depth(self) -> int:
        """Deepest draft node that could still be emitted; the bonus token needs a place too."""
        return self.max_len - len(self.tokens) - 1

    def push(self, token: int) -> str:
        """Emit one token, end the row where it must, and return the text that became certain."""
        self.tokens.append(token)
        self.stats.emitted += 1
        if token in self.eos_token_ids:
            self.finish_reason = "eos"
        elif token in self.params.stop_token_ids or (self.text is not None and self.text.push(token)):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.prompt_len + self.params.max_new_tokens:
            self.finish_reason = "length"
        elif len(self.tokens) == self.max_len:
            self.finish_reason = "context"
        if self.text is None:
            return ""
        if self.finish_reason is not None:
            self.text.finish()
        return self.text.take(final=self.finish_reason is not None)

    def fail(self, error: str) -> str:
        """End the row because the target failed, and return the text that was still held back."""
        self.finish_reason, self.error = "error", error
        if self.text is None:
            return ""
        self.text.finish()
        return self.text.take(final=True)


class Batch:
    """The rows still running, and what drafters and verifiers need to know of them.

    Args:
        rows: the rows; what chooses their tokens may differ where the verifier is coupled or greedy.
        vocab_size: width of the logits.
        device: the target's device.
        coupled: whether the verifier's choice is a function of the rows' position noise, so that a drafter does well
            to rank its candidates with the same noise.
        siblings: how the verifier wants the children of a node to be chosen.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        vocab_size: int,
        device: torch.device | str = "cpu",
        coupled: bool = False,
        siblings: SiblingSampling = "deterministic",
    ) -> None:
        self.rows = list(rows)
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.coupled = coupled
        self.siblings: SiblingSampling = siblings
        self.max_nodes = 1 << 30
        """Most nodes the next trees are used for; what is beyond is cut, making fewer saves time."""
        self.mean_nodes = 1 << 30
        """Most nodes of the next trees on average over the rows, where it is known which are the most promising."""
        self.trying = False
        """Whether the next trees are a trial: what they are worth is to be found out, so nothing is to be spared."""
        self.unchecked = False
        """Whether the next trees are not checked by a pass but held against the text as it goes on without them."""
        self.cache: KVCache | None = None
        """The target's, which holds every token of each row but the last; what a drafter writes behind the committed
        tokens, the next pass overwrites. None before the first pass."""
        self.seen: Tensor | None = self._seen_of(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, max_nodes: int, siblings: SiblingSampling) -> Batch:
        """The batch with the rows it has now, under another budget, children chosen otherwise."""
        view = object.__new__(Batch)
        view.__dict__ = self.__dict__ | {"max_nodes": max_nodes, "siblings": siblings}
        return view

    def as_it_is(self) -> Batch:
        """The batch with the tokens that rows have now, whatever they emit later."""
        snapshot = self.view(self.max_nodes, self.siblings)
        snapshot.rows = [replace(row, tokens=list(row.tokens)) for row in self.rows]
        return snapshot

    def total_nodes(self, max_nodes: int) -> int:
        """Nodes of the next trees of all rows together that are of use, where a row's has ``max_nodes`` at most."""
        return len(self) * min(self.mean_nodes, max_nodes)

    @property
    def params(self) -> SamplingParams:
        """The first row's sampling parameters, which are all rows' where the batch is ``uniform``."""
        return self.rows[0].params

    @property
    def uniform(self) -> bool:
        """Whether tokens of all rows are chosen in the same way."""
        return len({row.params.choice for row in self.rows}) < 2

    @property
    def greedy(self) -> bool:
        """Whether every row takes the most probable token."""
        return all(row.params.greedy for row in self.rows)

    @property
    def ranks_logits(self) -> bool:
        """Whether logits rank candidates as they are: greedy, and without penalties."""
        return self.greedy and self.seen is None

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """``filter_logits``, each row by its own parameters.

        Args:
            logits: ``[B, ..., V]``, of the target or a draft.
            seen: the same shape, bool; tokens of the context. Read where a row has a repetition penalty.
        """
        groups: dict[tuple[float, ...], list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault(row.params.choice, []).append(index)
        if len(groups) == 1:
            return _filter(logits, self.params, seen)
        out = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in groups.values():
            out[rows] = _filter(logits[rows], self.rows[rows[0]].params, None if seen is None else seen[rows])
        return out

    def noise(self, ahead: int) -> Tensor:
        """``[B, V]`` the rows' Gumbel noise for the token ``ahead`` of the next one; zeros for rows that are greedy."""
        nothing = torch.zeros(self.vocab_size, device=self.device)
        return torch.stack(
            [nothing if row.params.greedy else row.noise.gumbel(len(row.tokens) + ahead) for row in self.rows]
        )

    @property
    def pending(self) -> Tensor:
        """``[B]`` int64 pending tokens."""
        return torch.tensor([row.pending for row in self.rows], device=self.device)

    @property
    def max_depth(self) -> list[int]:
        """Of each row, the deepest draft node it can still use."""
        return [row.max_depth for row in self.rows]

    def mark_seen(self, row: int, tokens: Sequence[int]) -> None:
        """Remember emitted tokens for the repetition penalty."""
        if self.seen is not None:
            self.seen[row, list(tokens)] = True

    def add(self, rows: Sequence[Row]) -> None:
        """Rows join at the end."""
        before, self.rows = self.rows, [*self.rows, *rows]
        seen = self._seen_of(rows)
        if seen is not None:
            old = self._seen_of(before) if self.seen is None else self.seen
            self.seen = seen if old is None else torch.cat([old, seen])

    def _seen_of(self, rows: Sequence[Row]) -> Tensor | None:
        """``[rows, V]`` bool, tokens there are; None where no row of the batch asks."""
        if all(row.params.repetition_penalty == 1.0 for row in self.rows):
            return None
        seen = torch.zeros(len(rows), self.vocab_size, dtype=torch.bool, device=self.device)
        for index, row in enumerate(rows):
            seen[index, row.tokens] = True
        return seen

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.rows = [self.rows[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[list(rows)]


def _filter(logits: Tensor, params: SamplingParams, seen: Tensor | None) -> Tensor:
    """``filter_logits`` of ``[B, ..., V]``."""
    flat = None if seen is None else seen.flatten(0, -2)
    return filter_logits(logits.flatten(0, -2), params, flat).view(logits.shape)


def without_gaps(kept: Sequence[int]) -> list[int]:
    """Ascending indices in another order: those below their number at their own places, the others in the gaps."""
    order = dict.fromkeys(range(len(kept)))
    others = [index for index in kept if index not in order]
    gaps = sorted(order.keys() - set(kept))
    return [*({**{index: index for index in order}, **dict(zip(gaps, others, strict=True))}.values())]
