"""One request of vLLM as one generation of a drafter.

vLLM's batch changes every step: requests come in chunks, are put off, thrown out and started over, moved to other rows
and cancelled. A drafter's generation is a fixed set of rows. So each request gets a generation of its own, on a
shallow copy of the drafter: weights and tables are shared, what belongs to the text is not. It is told what happened in
the terms it knows: everything certain so far is a row whose last token is pending.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.batch import Batch, Row
from specdec.drafters.base import Drafter
from specdec.integrations.vllm.chains import best_chain
from specdec.integrations.vllm.step import RequestPass
from specdec.sampling import PositionNoise, SamplingParams
from specdec.target import Feature, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

Tokens = NDArray[np.integer[Any]]
"""``[L]`` token ids of a request, a view of vLLM's own buffer."""

_COMPARED = 64
"""Last tokens that are compared to see whether a request goes on where it was: enough to tell texts apart."""


class ServedRequest:
    """A request's row and drafter.

    Invariant: the row holds the request's tokens from position ``offset`` on, and the drafter has seen the hidden
    states of all of them but the last, where it wants any. ``offset`` is not 0 where vLLM had them in its prefix cache,
    and so did not compute them, or did not show them.

    Args:
        drafter: bound to the target; copied, not changed.
        vocab_size: V.
        device: the target's.
        max_len: length no text exceeds.
    """

    def __init__(self, drafter: Drafter, vocab_size: int, device: torch.device, max_len: int) -> None:
        self._prototype = drafter
        self._vocab_size = vocab_size
        self._device = device
        self._max_len = max_len
        self._observes = type(drafter).observe is not Drafter.observe
        self._drafter: Drafter | None = None
        self._batch: Batch | None = None
        self._offset = 0

    @property
    def num_seen(self) -> int:
        """Tokens the drafter knows, the pending one included."""
        return 0 if self._batch is None else self._offset + len(self._batch.rows[0].tokens)

    def agrees(self, tokens: Tokens) -> bool:
        """Whether ``tokens`` go on where this request was."""
        if self._batch is None:
            return True
        mine, seen = self._batch.rows[0].tokens[-_COMPARED:], self.num_seen
        return len(tokens) >= seen and tokens[seen - len(mine) : seen].tolist() == mine

    def follow(self, tokens: Tokens, seen: RequestPass | None, num_sampled: int) -> None:
        """Learn what a step brought.

        Args:
            tokens: all tokens of the request, those just sampled included.
            seen: what the step computed; None where it is not known, as for drafters that read tokens only.
            num_sampled: how many of the tokens it sampled; 0 while a prompt is not through.
        """
        self._max_len = self._max_len if seen is None else seen.max_len
        if self._prototype.features:
            if seen is None:
                raise ValueError("a drafter that reads hidden states was shown none")
            self._follow_states(tokens, seen, num_sampled)
        elif num_sampled:
            self._follow_tokens(tokens, seen)

    def draft(self, most: int) -> list[int]:
        """The best chain of at most ``most`` tokens to follow the pending one."""
        if self._drafter is None or self._batch is None:
            return []
        row = self._batch.rows[0]
        row.max_len = self._max_len - self._offset
        most = min(most, row.max_depth)
        if most < 1:
            return []
        tree = self._drafter.propose(self._batch)
        if tree.batch_size != 1 or int(tree.tokens[0, 0]) != row.pending:
            raise ValueError(f"drafter {self._drafter.name!r} must root one tree per row at the pending tokens")
        return best_chain(tree, 0, most, self._vocab_size)

    def finish(self) -> None:
        """The request is over: what the drafter learnt for later texts goes back to where it was copied from."""
        if self._drafter is None or self._batch is None:
            return
        self._drafter.keep(self._batch, [])
        self._drafter.stop()
        vars(self._prototype).update(vars(self._drafter))
        self._drafter = self._batch = None

    def _start(self, tokens: Tokens, offset: int, output: TargetOutput | None) -> None:
        if self._drafter is not None:
            self._drafter.stop()
        noise = PositionNoise(0, torch.empty(0, dtype=torch.int64, device=self._device))  # never drawn: not coupled
        row = Row(tokens[offset:].tolist(), 0, self._max_len - offset, SamplingParams(), noise)
        self._offset, self._batch = offset, Batch([row], self._vocab_size, self._device)
        self._drafter = copy.copy(self._prototype)
        self._drafter.start(self._batch, output)

    def _follow_tokens(self, tokens: Tokens, seen: RequestPass | None) -> None:
        """For drafters without hidden states: tokens, and the logits of those that were checked."""
        if self._batch is None or self._drafter is None:
            self._start(tokens, 0, None)
            return
        row = self._batch.rows[0]
        if self._observes and seen is not None and seen.logits is not None:
            root = seen.first + seen.num_tokens - len(seen.drafts) - 1  # the first position with logits
            if self.num_seen <= root + 1:  # not where a request that was thrown out is computed anew
                row.tokens.extend(tokens[self.num_seen : root + 1].tolist())
                self._observe([row.pending, *seen.drafts], tokens[root + 1 :].tolist(), {}, seen.logits)
        row.tokens.extend(tokens[self.num_seen :].tolist())

    def _follow_states(self, tokens: Tokens, seen: RequestPass, num_sampled: int) -> None:
        """For drafters with hidden states: a start at the first pass, then chains of which some prefix is certain."""
        certain = seen.num_tokens - len(seen.drafts) + max(num_sampled - 1, 0)  # states that are here to stay
        end = seen.first + certain  # position of the pending token
        known = self.num_seen - 1
        if self._batch is None or seen.first > known:
            features = {name: state[:certain].unsqueeze(0) for name, state in seen.features.items()}
            self._start(tokens[: end + 1], seen.first, TargetOutput(self._no_logits(certain), features))
            return
        skip = known - seen.first
        if end <= known:
            return  # computed anew after it had been thrown out; the drafter has not forgotten
        nodes = [*tokens[known : seen.first + seen.num_tokens - len(seen.drafts)].tolist(), *seen.drafts]
        features = {name: state[skip:] for name, state in seen.features.items()}
        emitted = tokens[known + 1 : end + 1].tolist()
        self._observe(nodes, emitted, features, seen.logits)
        self._batch.rows[0].tokens.extend(emitted)

    def _observe(
        self,
        nodes: Sequence[int],
        emitted: Sequence[int],
        features: Mapping[Feature, Tensor],
        logits: Tensor | None,
    ) -> None:
        """Show the drafter a pass over a chain of which the last of ``emitted`` is the bonus token.

        Logits are of the last nodes; those of nodes before them are NaN.
        """
        assert self._drafter is not None
        assert self._batch is not None
        columns = torch.arange(len(nodes), device=self._device).unsqueeze(0)
        tree = TokenTree(torch.tensor([list(nodes)], device=self._device), columns - 1)
        known = 0 if logits is None else len(logits)
        shown = self._no_logits(len(nodes) - known)
        if logits is not None:
            shown = logits.unsqueeze(0) if known == len(nodes) else torch.cat([shown.to(logits), logits[None]], dim=1)
        verdict = Verdict(columns, [len(emitted) - 1], [list(emitted)], [False])
        output = TargetOutput(shown, {name: state.unsqueeze(0) for name, state in features.items()})
        self._drafter.observe(self._batch, tree, output, verdict)

    def _no_logits(self, count: int) -> Tensor:
        return torch.full((1, 1, 1), torch.nan, device=self._device).expand(1, count, self._vocab_size)
