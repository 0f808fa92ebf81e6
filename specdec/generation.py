"""One call's loop: draft, check, accept, commit, emit - until every row has ended."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

import torch

from specdec.batch import Batch, Row, without_gaps
from specdec.drafters.base import Drafter
from specdec.drafters.none import NoneDrafter
from specdec.emission import emit
from specdec.filling import LEAST_CHUNK, PASS_TOKENS, FillingRows, joined_features
from specdec.kept_prefix import KeptPrefix
from specdec.kv_cache import KVCache
from specdec.kv_quantized import WINDOW
from specdec.memory_plan import SPARE_SLOTS
from specdec.missed import MissedPasses
from specdec.policy import NO_LIMIT, FixedTrees, TreePolicy
from specdec.prefix import SharedWork, prefill_shared
from specdec.prefix_store import PrefixStore
from specdec.result import StreamPiece
from specdec.stats import DecodeStats, PhaseClock
from specdec.target import PREFILL_CHUNK, Feature, HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.unread import UnreadPrompt
from specdec.verifiers.base import Verdict, Verifier
from specdec.waiting import WaitingRows, shared_work

T = TypeVar("T")

_UNEVEN = 4
"""Times the mean of a batch's rows that a row's tree may have of nodes."""


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
        most_rows: decoded at a time; the others take the places of those that end.
        prefixes: computed by earlier calls, to build on.
        pass_tokens: nodes of a pass in which prompts ride along, those of decoding rows included.
        share: whether to compute and hold once what prompts begin with alike, those of rows that wait included.
        spare: slots of the KV cache behind the longest possible text; trees are cut to what room there is. Where None
            there is room for usual trees, and larger ones make the cache grow.
        by_clock: whether drafts may depend on how long things took.
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
        prefixes: PrefixStore | None = None,
        pass_tokens: int = PASS_TOKENS,
        share: bool = True,
        spare: int | None = None,
        by_clock: bool = True,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.verifier = verifier
        self.stats = DecodeStats()
        self._rows = list(rows)
        self._added = len(self._rows)
        self._index = {row.row_id: index for index, row in enumerate(rows)}
        self._kept = kept
        self._prefixes = prefixes
        self._raise_drafter_errors = raise_drafter_errors
        self._policy = policy or FixedTrees()
        self._missed = MissedPasses(drafter.reads_logits)
        # A GPU's passes are queued: without waiting, the target's time would be counted where its result is first read.
        self._finish_device = torch.cuda.synchronize if target.waits_after_phases else None
        self._most_nodes = most_nodes
        self._most_rows = most_rows
        self._pass_tokens = pass_tokens
        self._by_clock = by_clock
        self._features: Sequence[Feature] = ()
        self._unread = UnreadPrompt()
        self._filling = self._new_filling()
        self._spare = 1 if most_nodes == 1 or isinstance(drafter, NoneDrafter) else spare or SPARE_SLOTS
        self._grows = spare is None
        self._waiting = WaitingRows(rows, share, in_order=len(rows) <= most_rows)
        self._batch = self._next_batch()
        for counted in self._counted(rows):
            self._name(counted)

    def run(self) -> Generator[StreamPiece, None, None]:
        """The loop. All is settled at every ``yield``: closing between pieces loses nothing."""
        with closing(self.passes()) as passes:
            for pieces in passes:
                yield from pieces

    def passes(self) -> Generator[list[StreamPiece], None, None]:
        """The loop, a pass at a time; rows may be added and cancelled between passes."""
        drafter = self.drafter
        try:
            self._guarded(lambda: drafter.prepare(self._by_clock))
            self._features, self._missed = drafter.features, MissedPasses(drafter.reads_logits)
            self._filling = self._new_filling()
            cache = self._prefill()
            while True:
                while self._batch.rows or self._filling or (self._waiting and self._joins):
                    cache = self._join(cache)
                    yield self._step(cache) if self._batch.rows else self._fill()
                    self._retire(cache)  # rows that were cancelled meanwhile
                if not self._waiting:
                    break
                self._guarded(self.drafter.stop)
                self._missed, self._batch = MissedPasses(self.drafter.reads_logits), self._next_batch()
                del cache  # its memory is the next one's
                cache = self._prefill()
            self._keep(cache)
        except GeneratorExit:
            self._keep(cache)
            raise
        finally:
            self._guarded(drafter.stop)

    def add(self, row: Row) -> int:
        """Have another row decoded; what chooses its tokens must be the others' parameters. Returns its index."""
        self._rows = [*(row for row in self._rows if row.finish_reason is None), row]
        self._added += 1
        self._index = {row.row_id: self._index[row.row_id] for row in self._rows[:-1]} | {row.row_id: self._added - 1}
        self._waiting.append(row)
        self._name(row.stats)
        return self._added - 1

    def foresee(self, rows: Sequence[Row]) -> None:
        """Say which rows may be added later, in place of those foreseen before: what their prompts share with others is
        computed once, and held for them.
        """
        self._waiting.foresee(rows)

    def shared_work(self, rows: Sequence[Row]) -> SharedWork:
        """What so many rows would take at a time, some of them perhaps foreseen only; between passes only."""
        return shared_work(rows, self._batch, self._filling, self._waiting)

    def cancel(self, row: Row) -> None:
        """End a row before its time; between passes only."""
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
        self._waiting.drop(row)
        self._filling.drop(row)

    @property
    def _joins(self) -> bool:
        """Whether rows join while others run."""
        return self.drafter.takes_rows or not self._wanted

    def _new_filling(self) -> FillingRows:
        return FillingRows(self.target, self._prefixes, self._wanted)

    @property
    def _wanted(self) -> Sequence[Feature]:
        """Hidden states that the drafter reads in this generation; none once it was given up."""
        return self._features if self.drafter.features else ()

    def _next_batch(self) -> Batch:
        rows, self._begin_with = self._waiting.take(self._most_rows)
        return self._make_batch(rows)

    def _make_batch(self, rows: Sequence[Row]) -> Batch:
        target, verifier = self.target, self.verifier
        return Batch(rows, target.vocab_size, target.device, verifier.coupled, verifier.siblings)

    @torch.inference_mode()
    def _join(self, cache: KVCache) -> KVCache:
        """Have the prompts of waiting rows computed where there is room, and let those go on whose prompts are done.

        Returns:
            The batch's cache, a new one where no row was left.
        """
        if not self._joins:
            return cache
        room = self._most_rows - len(self._batch) - len(self._filling)
        if room > 0 and self._waiting:
            self._filling.add(*self._waiting.take(room))
        filled = self._filling.take()
        if not filled:
            return cache
        rows, clock = [each.row for each in filled], PhaseClock(self._finish_device)
        capacities, first = [row.max_len + self._spare for row in rows], len(self._batch)
        if first:
            self._guarded(lambda: self._missed.hand_over(self._observe))
        with clock.phase("prefill"):
            if first:
                cache.add_rows(len(rows), capacities)
            else:
                cache = self.target.new_cache(len(rows), max(capacities))
                cache.fit(capacities)
            for index, each in enumerate(filled, first):
                cache.share(index, each.cache.shares[0])  # all rows', so that buffers are made for what is behind them
            for index, each in enumerate(filled, first):
                cache.copy_row(index, each.cache, 0, len(each.row.tokens) - 1)
                if self._prefixes is not None:
                    states = {name: value.unsqueeze(0) for name, value in each.features.items()}
                    self._prefixes.notice([tuple(each.row.tokens[:-1])], each.cache, states)
        output = joined_features(filled) if self._wanted else None
        with clock.phase("draft"):
            if first:
                self._batch.add(rows)
                seen = (output,) if self._wanted else ()
                self._guarded(lambda: self._begun().join(self._batch, len(rows), *seen))
            else:
                self._guarded(self.drafter.stop)
                self._missed, self._batch = MissedPasses(self.drafter.reads_logits), self._make_batch(rows)
                self._guarded(lambda: self._unread.start(self.drafter, self._batch, output))
        self._share(clock.stop(), rows)
        return cache

    @torch.inference_mode()
    def _fill(self) -> list[StreamPiece]:
        """A pass over prompts alone."""
        chunks, rows, clock = self._filling.chunks(PREFILL_CHUNK), self._filling.rows, PhaseClock(self._finish_device)
        if chunks:
            with clock.phase("prefill"):
                self.target.extend_all(chunks)
            self._share(clock.stop(), rows)
        return []

    @torch.inference_mode()
    def _prefill(self) -> KVCache:
        """Cache every prompt but its last token, the first pending one; what prompts share is computed once."""
        batch, clock = self._batch, PhaseClock(self._finish_device)
        if not batch.rows:
            return self.target.new_cache(0, 1)
        with clock.phase("prefill"):
            capacities = [row.max_len + self._spare for row in batch.rows]
            prompts = [tuple(row.tokens[:-1]) for row in batch.rows]
            cache = None if self._kept is None or self._wanted else self._kept.take(prompts[0])
            if cache is None:
                prefixes, self._begin_with = self._begin_with, []
                cache, output = prefill_shared(self.target, prompts, capacities, self._wanted, self._prefixes, prefixes)
                if self._prefixes is not None and self._kept is None:
                    self._prefixes.notice(prompts, cache, {} if output is None else output.features)
            else:
                reused = cache.max_length  # a quantized cache may not go back so far
                cache.reserve(max(capacities))
                missing = [prompt[reused:] for prompt in prompts]
                output = self.target.extend(missing, cache, self._wanted) if any(missing) else None
        with clock.phase("draft"):
            self._guarded(lambda: self._unread.start(self.drafter, self._batch, output))
        self._share(clock.stop(), batch.rows)
        return cache

    @torch.inference_mode()
    def _step(self, cache: KVCache) -> list[StreamPiece]:
        """One pass over one tree per row."""
        batch, rows, clock = self._batch, list(self._batch.rows), PhaseClock(self._finish_device)
        batch.cache = cache
        budget = self._policy.budget(rows, self._most_of_a_row(NO_LIMIT))
        drafted = None
        if not isinstance(self.drafter, NoneDrafter):
            # A draft beside prompts would not be charged to anybody.
            if budget > 1 or (self._policy.beside > 1 and not self._filling):
                with clock.phase("draft"):
                    drafted = self._draft(budget)
            if budget == 1:
                self._explain_plain_pass()
        tree = drafted or TokenTree.from_pending(batch.pending)
        with clock.phase("target"):
            cache.make_room(tree.num_nodes)
            chunks = self._filling.chunks(max(LEAST_CHUNK, self._pass_tokens - tree.tokens.numel()))
            output = self.target.forward_beside(tree, cache, chunks, self._wanted)
        with clock.phase("accept"):
            verdict = self.verifier.accept(tree, output.logits, batch)
        with clock.phase("commit"):
            cache.commit(verdict.path, [count + 1 for count in verdict.num_accepted])
        if self.drafter.observes:
            with clock.phase("draft"):
                self._learn(budget, tree, output, verdict)
        pieces = emit(batch, tree, output.logits, verdict, self._index, self.stats)
        self._retire(cache)
        milliseconds = clock.stop()
        self._share(milliseconds, rows)
        self._policy.observe(rows, tree, verdict, None if chunks else milliseconds)
        return pieces

    def _most_of_a_row(self, budget: int) -> int:
        """Nodes that a row may have where rows have ``budget`` on average."""
        cache, size = self._batch.cache, len(self._batch)
        room = NO_LIMIT if self._grows or cache is None else cache.room
        # Prompts ride along with rows of one size.
        uneven = size > 1 and self.target.takes_uneven and not self._filling
        return min(budget * min(size, _UNEVEN) if uneven else budget, self._most_nodes, room)

    def _draft(self, budget: int) -> TokenTree | None:
        """Trees of ``budget`` nodes per row at most, on average; None where that is 1 or the drafter fails.

        With 1, the draft is the policy's to compare with the text.
        """
        if budget > 1:
            return self._guarded(lambda: self._propose(budget))
        held = self._guarded(lambda: self._propose(self._policy.beside, unchecked=True))
        if held is not None:
            self._policy.hold(self._batch.rows, held)
        return None

    def _explain_plain_pass(self) -> None:
        reason = self._policy.reason if self._most_nodes > 1 else "memory leaves no room for drafts"
        for counted in self._counted(self._batch.rows):
            counted.plain_reason = reason

    def _propose(self, budget: int, unchecked: bool = False) -> TokenTree:
        """The drafter's tree, checked and cut to what can still be emitted and is to be checked: ``budget`` nodes per
        row at most, of which some rows may have more where others have less.
        """
        batch = self._batch
        self._missed.hand_over(self._observe)
        batch.max_nodes, batch.mean_nodes = self._most_of_a_row(budget), budget
        batch.trying, batch.unchecked = self._policy.trying, unchecked
        tree = self._begun().propose(batch).to(batch.device)
        tree.validate(batch.vocab_size)
        if tree.tokens[:, 0].tolist() != [row.pending for row in batch.rows]:
            raise ValueError(f"drafter {self.drafter.name!r} must root one tree per row at the pending tokens")
        deepest = batch.max_depth
        if self.target.kv_bits is not None:
            deepest = [min(each, WINDOW) for each in deepest]
        tree = tree.limit_depth(deepest).first(batch.max_nodes).most_promising(budget)
        return tree if tree.num_nodes <= self._most_nodes else TokenTree.from_pending(batch.pending)

    def _begun(self) -> Drafter:
        return self._unread.begun(self.drafter)

    def _learn(self, budget: int, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        """Show the drafter a pass, or keep it for later where it was not asked for a draft."""
        if budget > 1:
            self._guarded(lambda: self._observe(tree, output, verdict))
            return
        self._missed.add(tree, output, verdict)
        if self._missed.full:
            self._guarded(lambda: self._missed.hand_over(self._observe))

    def _observe(self, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        self._begun().observe(self._batch, tree, output, verdict)

    @torch.inference_mode()
    def _retire(self, cache: KVCache) -> None:
        """Drop ended rows; the cache keeps the last one's, for ``_keep``."""
        running = [index for index, row in enumerate(self._batch.rows) if row.finish_reason is None]
        if len(running) < len(self._batch):
            running = without_gaps(running)
            self._guarded(lambda: self._unread.keep(self.drafter, self._batch, running))
            self._missed.keep(running)
            self._batch.keep(running)
            if running:
                cache.keep_rows(running)

    def _keep(self, cache: KVCache) -> None:
        """Leave the cache, cut to the emitted text, for a later generation."""
        if self._kept is not None:
            self._kept.leave(self._rows[0], cache)

    def _guarded(self, call: Callable[[], T]) -> T | None:
        """Run a drafter's method; where it raises, go on with plain decoding, or raise if that was asked for."""
        try:
            return call()
        except Exception as error:
            if self._raise_drafter_errors:
                raise
            reason = f"drafter {self.stats.drafter!r} raised {type(error).__name__}: {error}"
            survivor = self.drafter.survivor()
            rest = "without it" if survivor is None else "with the rest of it"
            warnings.warn(f"{reason}; going on {rest}", RuntimeWarning, stacklevel=2)
            if survivor is None:
                for counted in self._counted(self._rows):
                    counted.speculation_off = counted.speculation_off or reason
            self.drafter = NoneDrafter() if survivor is None else survivor
            return None

    def _name(self, counted: DecodeStats) -> None:
        counted.drafter, counted.verifier = self.drafter.name, self.verifier.name
        counted.lossless = self.verifier.lossless

    def _counted(self, rows: Sequence[Row]) -> list[DecodeStats]:
        return [self.stats, *(row.stats for row in rows)]

    def _share(self, milliseconds: dict[str, float], rows: Sequence[Row]) -> None:
        for counted in self._counted(rows):
            counted.add_times(milliseconds)
