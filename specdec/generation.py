"""One call's loop: draft, check, accept, commit, emit - until every row has ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from specdec.adaptive import NO_LIMIT, FixedTrees, TreePolicy
from specdec.batch import Batch, Row
from specdec.drafters.base import Drafter
from specdec.drafters.none import NoneDrafter
from specdec.kv_cache import KVCache
from specdec.memory_plan import SPARE_SLOTS
from specdec.missed import MissedPasses
from specdec.result import StreamPiece
from specdec.stats import DecodeStats, PhaseClock
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict, Verifier

T = TypeVar("T")


@dataclass
class KeptPrefix:
    """Tokens of an earlier generation and the one-row cache that holds them, for a later one to build on."""

    tokens: list[int] = field(default_factory=list)
    cache: KVCache | None = None


class Generation:
    """The rows of one call and what they run on.

    Args:
        target: the model that decides.
        drafter: proposes; replaced by plain decoding for the rest of the call where it raises.
        verifier: the acceptance policy.
        rows: all rows of the call.
        kept: cache of an earlier call to build on and bring up to date; one row only.
        raise_drafter_errors: raise what a drafter raises instead.
        policy: says how large trees may be; as the drafter makes them where None.
        most_nodes: of a tree, whatever the policy says; 1 is plain decoding.
        most_rows: decoded at a time; the others wait until all of these have ended.
    """

    def __init__(
        self,
        target: HFTarget,
        drafter: Drafter,
        verifier: Verifier,
        rows: Sequence[Row],
        kept: KeptPrefix | None = None,
        raise_drafter_errors: bool = False,
        policy: TreePolicy | None = None,
        most_nodes: int = NO_LIMIT,
        most_rows: int = NO_LIMIT,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.verifier = verifier
        self.stats = DecodeStats()
        self._rows = list(rows)
        self._index = {row.row_id: index for index, row in enumerate(rows)}
        self._kept = kept
        self._raise_drafter_errors = raise_drafter_errors
        self._policy = policy or FixedTrees()
        self._missed = MissedPasses()
        # A GPU's passes are queued: without waiting, the target's time would be counted where its result is first read.
        self._finish_device = torch.cuda.synchronize if target.device.type == "cuda" else None
        self._most_nodes = most_nodes
        step = min(most_rows, len(rows))
        self._waiting = [list(rows[start : start + step]) for start in range(0, len(rows), step)]
        self._batch = self._next_batch()
        for counted in self._counted(rows):
            counted.drafter, counted.verifier, counted.lossless = drafter.name, verifier.name, verifier.lossless

    def run(self) -> Generator[StreamPiece, None, None]:
        """The loop. All is settled at every ``yield``: closing between pieces loses nothing."""
        drafter = self.drafter
        try:
            cache = self._prefill()
            while True:
                while self._batch.rows:
                    yield from self._step(cache)
                if not self._waiting:
                    break
                self._guarded(self.drafter.stop)
                self._missed, self._batch = MissedPasses(), self._next_batch()
                del cache  # its memory is the next one's
                cache = self._prefill()
            self._keep(cache)
        except GeneratorExit:
            self._keep(cache)
            raise
        finally:
            self._guarded(drafter.stop)

    def _next_batch(self) -> Batch:
        rows, target, verifier = self._waiting.pop(0), self.target, self.verifier
        return Batch(rows, target.vocab_size, target.device, verifier.coupled, verifier.siblings)

    @torch.inference_mode()
    def _prefill(self) -> KVCache:
        """Cache every prompt but its last token, which is the first pending one; equal prompts are computed once."""
        batch, clock, reused = self._batch, PhaseClock(self._finish_device), 0
        with clock.phase("prefill"):
            capacity = max(row.max_len for row in batch.rows) + SPARE_SLOTS
            prompts = list(dict.fromkeys(tuple(row.tokens) for row in batch.rows))
            if self._kept is None or self._kept.cache is None or self.drafter.features:
                cache = self.target.new_cache(len(prompts), capacity)
            else:
                cache, reused = self._kept.cache, common_prefix(self._kept.tokens, prompts[0][:-1])
                self._kept.tokens, self._kept.cache = [], None  # ours until _keep: a failure must not leave it stale
                cache.truncate([reused])
                cache.reserve(capacity)
            missing = [prompt[reused:-1] for prompt in prompts]
            output = self.target.extend(missing, cache, self.drafter.features) if any(missing) else None
            if len(prompts) < len(batch):
                source = [prompts.index(tuple(row.tokens)) for row in batch.rows]
                cache.keep_rows(source)
                if output is not None:
                    output = replace(output, features={k: v[source] for k, v in output.features.items()})
        with clock.phase("draft"):
            self._guarded(lambda: self.drafter.start(batch, output))
        self._share(clock.stop(), batch.rows)
        return cache

    @torch.inference_mode()
    def _step(self, cache: KVCache) -> list[StreamPiece]:
        """One pass over one tree per row."""
        batch, rows, clock = self._batch, list(self._batch.rows), PhaseClock(self._finish_device)
        budget = min(self._policy.budget(rows), self._most_nodes)
        with clock.phase("draft"):
            tree = self._draft(budget)
        with clock.phase("target"):
            cache.reserve(cache.max_length + tree.num_nodes)
            output = self.target.forward(tree, cache, self.drafter.features)
        with clock.phase("accept"):
            verdict = self.verifier.accept(tree, output.logits, batch)
        with clock.phase("commit"):
            cache.commit(verdict.path, [count + 1 for count in verdict.num_accepted])
        with clock.phase("draft"):
            self._learn(budget, tree, output, verdict)
        pieces = self._emit(tree, output.logits, verdict)
        self._retire(cache)
        milliseconds = clock.stop()
        self._share(milliseconds, rows)
        self._policy.observe(rows, tree, verdict, milliseconds)
        return pieces

    def _draft(self, budget: int) -> TokenTree:
        """Trees of at most ``budget`` columns; plain decoding's where that is 1 or the drafter fails."""
        root = TokenTree.from_pending(self._batch.pending)
        if budget > 1:
            self._batch.max_nodes = budget
            return self._guarded(self._propose) or root
        reason = self._policy.reason if self._most_nodes > 1 else "memory leaves no room for drafts"
        for counted in self._counted(self._batch.rows):
            counted.plain_reason = reason
        return root

    def _propose(self) -> TokenTree:
        """The drafter's tree, checked and cut to what can still be emitted and is to be checked."""
        batch = self._batch
        self._missed.hand_over(self._observe)
        tree = self.drafter.propose(batch).to(batch.device)
        tree.validate(batch.vocab_size)
        if tree.batch_size != len(batch) or not torch.equal(tree.tokens[:, 0], batch.pending):
            raise ValueError(f"drafter {self.drafter.name!r} must root one tree per row at the pending tokens")
        tree = tree.limit_depth(batch.max_depth).first(batch.max_nodes)
        return tree if tree.num_nodes <= self._most_nodes else TokenTree.from_pending(batch.pending)

    def _learn(self, budget: int, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        """Show the drafter a pass, or keep it for later where it was not asked for a draft."""
        if budget > 1:
            self._guarded(lambda: self._observe(tree, output, verdict))
            return
        self._missed.add(tree, output, verdict)
        if self._missed.full:
            self._guarded(lambda: self._missed.hand_over(self._observe))

    def _observe(self, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        self.drafter.observe(self._batch, tree, output, verdict)

    def _emit(self, tree: TokenTree, logits: Tensor, verdict: Verdict) -> list[StreamPiece]:
        """Append what was accepted to the rows, up to where each ends."""
        pieces = []
        depths, drafted = tree.draft_depth.tolist(), tree.num_drafted.tolist()
        for index, row in enumerate(self._batch.rows):
            accepted = verdict.num_accepted[index]
            for counted in self._counted([row]):
                counted.count_pass(depths[index], drafted[index], accepted, plain=tree.num_nodes == 1)
            start = len(row.tokens)
            for offset, token in enumerate(verdict.tokens[index]):
                text = row.push(token)
                pieces.append(StreamPiece(text, token, offset < accepted, self._index[row.row_id]))
                if row.finish_reason is not None:
                    break
            if verdict.failed[index] and row.finish_reason is None:
                step = row.stats.passes
                held = row.fail(f"the target returned NaN logits at step {step}; the text up to it is kept")
                if held:
                    pieces.append(StreamPiece(held, None, False, self._index[row.row_id]))
            new = row.tokens[start:]
            self.stats.emitted += len(new)
            self._batch.mark_seen(index, new)
            row.noise.forget_before(len(row.tokens))
            if row.params.logprobs and new:
                nodes = logits[index, verdict.path[index, : len(new)]].float().log_softmax(-1)
                chosen = torch.tensor(new, device=logits.device).unsqueeze(1)
                row.logprobs += nodes.gather(1, chosen).squeeze(1).tolist()
        return pieces

    def _retire(self, cache: KVCache) -> None:
        """Drop ended rows; the cache keeps the last one's, for ``_keep``."""
        running = [index for index, row in enumerate(self._batch.rows) if row.finish_reason is None]
        if len(running) < len(self._batch):
            self._guarded(lambda: self.drafter.keep(self._batch, running))
            self._missed.keep(running)
            self._batch.keep(running)
            if running:
                cache.keep_rows(running)

    def _keep(self, cache: KVCache) -> None:
        """Leave the cache, cut to the emitted text, for a later generation."""
        row = self._rows[0]
        if self._kept is not None and row.error is None:
            cache.truncate([min(cache.max_length, len(row.tokens))])
            self._kept.tokens, self._kept.cache = row.tokens[: cache.max_length], cache

    def _guarded(self, call: Callable[[], T]) -> T | None:
        """Run a drafter's method; where it raises, go on with plain decoding, or raise if that was asked for."""
        try:
            return call()
        except Exception as error:
            if self._raise_drafter_errors:
                raise
            reason = f"drafter {self.stats.drafter!r} raised {type(error).__name__}: {error}"
            survivor = self.drafter.survivor()
            if survivor is not None:
                warnings.warn(f"{reason}; going on with the rest of it", RuntimeWarning, stacklevel=2)
                self.drafter = survivor
                return None
            warnings.warn(f"{reason}; going on without it", RuntimeWarning, stacklevel=2)
            for counted in self._counted(self._rows):
                counted.speculation_off = counted.speculation_off or reason
            self.drafter = NoneDrafter()
            return None

    def _counted(self, rows: Sequence[Row]) -> list[DecodeStats]:
        return [self.stats, *(row.stats for row in rows)]

    def _share(self, milliseconds: dict[str, float], rows: Sequence[Row]) -> None:
        for counted in self._counted(rows):
            counted.add_times(milliseconds)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
