"""Several drafters in one tree: what copies the text so far and what reads the model's states see different things."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from operator import mul
from time import perf_counter
from typing import Any, Literal

import torch

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid_cost import Economy, Ratio
from specdec.drafters.hybrid_merger import MergedTrees, Merger
from specdec.missed import MissedPasses
from specdec.planner import CAUTIOUS_CPU, CAUTIOUS_GPU
from specdec.target import Feature, HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.unread import UnreadPrompt, reads_late
from specdec.verifiers.base import Verdict


@dataclass(frozen=True)
class HybridConfig:
    """Options of the whole; those of a part carry its name in front.

    Attributes:
        max_nodes: most nodes of a merged tree, root included.
        min_probability: nodes with a lower estimated chance of acceptance are left out.
        ask: parts beyond the cheapest are asked in every pass ("always"), or where the tokens they are expected to add
            are worth their time ("paying"). A text that depends on the trees and has a seed is not left to a clock:
            there all are asked.
    """

    max_nodes: int = 24
    min_probability: float = 0.01
    ask: Literal["paying", "always"] = "paying"

    def __post_init__(self) -> None:
        if self.max_nodes < 1:
            raise ValueError(f"max_nodes must be at least 1, got {self.max_nodes}")
        if not 0.0 <= self.min_probability <= 1.0:
            raise ValueError(f"min_probability must be in [0, 1], got {self.min_probability}")
        if self.ask not in ("paying", "always"):
            raise ValueError(f"ask must be 'paying' or 'always', got {self.ask!r}")


class PartError(RuntimeError):
    """A part raised; the others can go on."""


@dataclass
class _Round:
    """A pass from proposal to verdict.

    Attributes:
        merged: chosen from anew after every asked part.
        max_nodes: of a tree, on average over the rows.
        checked: whether a pass checks it; else what passes without drafts emit says as much.
        asked: parts, in this order.
    """

    start: float
    merged: MergedTrees
    max_nodes: int
    checked: bool
    asked: list[int] = field(default_factory=list)
    end: float = 0.0


class HybridDrafter(Drafter):
    """Merges the trees of several drafters under one budget, the nodes most likely to be accepted first.

    Children are always chosen deterministically: a choice among drawn ones would bias a text sampled by rejection.

    Args:
        parts: drafters of different names.
        config: options of the whole.
        clock: seconds, for telling what parts cost.

    Raises:
        ValueError: for fewer than two parts, two of one name, or one whose trees cannot be merged.
    """

    Config = HybridConfig

    def __init__(
        self, parts: Sequence[Drafter], config: HybridConfig | None = None, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.parts = tuple(parts)
        self.config = config or HybridConfig()
        names = [part.name for part in self.parts]
        self.name = "+".join(names)
        check_names(names)
        self.reads_logits = any(part.observes and part.reads_logits for part in self.parts)
        for part in self.parts:
            if part.virtual_nodes:
                raise ValueError(
                    f"drafter {part.name!r} cannot be merged with others: its trees hold virtual nodes that prepare "
                    "its next draft below the very nodes it chose"
                )
        self._clock = clock
        self._finish: Callable[[], None] | None = None
        self._uneven = True  # rows of a batch take only the nodes they have
        self._merger = Merger(len(self.parts))
        self._economy = Economy(len(self.parts), CAUTIOUS_CPU)
        self._resting: Collection[int] = ()  # parts that sit this call out
        self._by_clock = True
        self._begin([])

    def _begin(self, rows: Sequence[int]) -> None:
        count = range(len(self.parts))
        self._gains = {row: [Ratio() for _ in count] for row in rows}  # of each part in each text
        self._merger.keep(())
        self._alive = [part for part in count if part not in self._resting]
        self._fresh = set(count)  # not asked yet in this call
        self._prompts = [UnreadPrompt() for _ in count]  # of each part
        self._missed = [MissedPasses(part.reads_logits) for part in self.parts]
        self._round: _Round | None = None

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        for part in self.parts:
            part.bind(target, tokenizer)
        self.features = self.every_feature
        self._uneven = target.takes_uneven
        self.takes_rows = all(part.takes_rows for part in self.parts if part.features)
        if target.device.type == "cuda":
            self._finish = torch.cuda.synchronize  # what is queued would be counted where its result is first read
            self._economy = Economy(len(self.parts), CAUTIOUS_GPU)

    def prepare(self, by_clock: bool) -> None:
        resting: Collection[int] = ()
        if by_clock and self.config.ask == "paying":
            resting = [part for part, each in enumerate(self.parts) if each.features and self._economy.rests(part)]
        self._resting = resting if len(resting) < len(self.parts) else ()
        self._by_clock = by_clock
        awake = [drafter for part, drafter in enumerate(self.parts) if part not in self._resting]
        self.features = tuple(dict.fromkeys(name for drafter in awake for name in drafter.features))
        for drafter in awake:
            drafter.prepare(by_clock)

    @property
    def every_feature(self) -> Sequence[Feature]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.every_feature))

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._begin([row.row_id for row in batch.rows])
        self._economy.begin()
        view = _view(batch, batch.max_nodes)
        self._each(lambda part: self._prompts[part].start(self.parts[part], view, output))

    def _unread(self, part: int) -> int:
        """States that a part would have to read if it were asked."""
        return self._prompts[part].num_states + self._missed[part].num_states

    def propose(self, batch: Batch) -> TokenTree:
        max_nodes = min(self.config.max_nodes, batch.max_nodes)
        self._round = None
        if max_nodes < 2 or max(row.max_depth for row in batch.rows) < 1:
            return TokenTree.from_pending(batch.pending)
        view = _view(batch, max_nodes)
        merged = self._merger.trees((batch.greedy, batch.coupled), batch.rows)
        usual = min(batch.mean_nodes, max_nodes)  # of a row
        self._round = current = _Round(self._now(), merged, usual, checked=not batch.unchecked)
        timed = self._by_clock and self.config.ask == "paying" and not _repeatable_by_tree(batch)

        def ask(part: int) -> None:
            if current.asked:
                # The first time it reads the prompt, once for all of the call: no single pass would pay for that. For
                # a tree that is not checked it does not have to.
                known = timed and (part not in self._fresh or batch.unchecked)
                if known and not self._pays(part, batch, merged, usual):
                    return
            self._catch_up(part, view)
            began = self._now()
            self._ask(part, view, merged)
            self._choose(batch, merged, max_nodes, timed)
            took, optional = 1000.0 * (self._now() - began), timed and bool(current.asked)
            self._economy.asked(part, took, self._size(merged), part in self._fresh, optional)
            if current.checked:
                self._fresh.discard(part)
            current.asked.append(part)

        self._each(ask, self._order(timed))
        tokens, parents, confidence = merged.columns()
        tree = TokenTree(tokens, parents, confidence=confidence).to(batch.device)
        current.end = self._now()
        return tree

    def _choose(self, batch: Batch, merged: MergedTrees, max_nodes: int, timed: bool) -> None:
        """Choose the nodes to check: the best that there may be, and where a clock may decide, of these what pays."""

        def worth(chances: Sequence[float]) -> int:
            return self._economy.size(chances, len(batch), _mean_length(batch))

        most = batch.total_nodes(max_nodes) - len(batch)  # beyond the roots
        merged.choose(max_nodes, self.config.min_probability, most, worth if timed else None)

    def _size(self, merged: MergedTrees) -> float:
        """Nodes of a row that a pass over the trees chosen last computes."""
        sizes = merged.sizes[-1]
        return sum(sizes) / len(sizes) if self._uneven else max(sizes)

    def _order(self, timed: bool) -> list[int]:
        """Parts that read no hidden states, then the others, as named; by what they took where that counts."""
        order = sorted(self._alive, key=lambda part: bool(self.parts[part].features))
        return self._economy.order(order) if timed else order

    def _pays(self, part: int, batch: Batch, merged: MergedTrees, max_nodes: int) -> bool:
        factors = [self._gains[row.row_id][part].factor for row in batch.rows]
        if batch.trying:  # after an unlucky stretch: it may be as good here as in other texts
            factors = [max(factor, 1.0) for factor in factors]
        gains = (self._economy.gain(part, value, max_nodes) for value in merged.expected[-1])
        gain, nodes = sum(map(mul, gains, factors)), self._size(merged)
        return self._economy.pays(part, gain, nodes, max_nodes, len(batch), _mean_length(batch), self._unread(part))

    def _catch_up(self, part: int, view: Batch) -> None:
        """Show a part what it missed since it was asked last, the prompt for one."""
        drafter, began, states = self.parts[part], self._now(), self._unread(part)
        self._prompts[part].begun(drafter)
        self._missed[part].hand_over(lambda *seen: drafter.observe(view, *seen))
        if states:
            self._economy.read(part, 1000.0 * (self._now() - began), states)

    def _ask(self, part: int, view: Batch, merged: MergedTrees) -> None:
        """Merge what a part proposes."""
        drafter = self.parts[part]
        tree = drafter.propose(view)
        tree.validate(view.vocab_size)
        if tree.virtual is not None or tree.siblings != "deterministic":
            raise ValueError(f"drafter {drafter.name!r} proposed nodes that cannot be merged: virtual, or drawn")
        merged.add(part, tree.tokens, tree.parents, tree.confidence)

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        current, self._round, began = self._round, None, self._now()
        if current is not None:
            self._learn(current, batch, verdict)
        view = _view(batch, batch.max_nodes)
        checked = current is not None and current.checked
        asked = current.asked if current is not None and checked else ()

        def show(part: int) -> None:
            drafter = self.parts[part]
            if reads_late(drafter) or (drafter.features and part not in asked):
                self._missed[part].add(tree, output, verdict, drafter.features)
                if self._missed[part].full:
                    self._catch_up(part, view)
                return
            shown = self._now()
            features = {name: output.features[name] for name in drafter.features}
            drafter.observe(view, tree, TargetOutput(output.logits, features), verdict)
            if part in asked:
                self._economy.read(part, 1000.0 * (self._now() - shown), len(batch))

        self._each(show)
        if current is not None and checked:
            tokens = float(sum(map(len, verdict.tokens)))
            pass_ms, all_ms = 1000.0 * (began - current.end), 1000.0 * (self._now() - current.start)
            nodes = tree.computed_nodes(self._uneven)
            self._economy.passed(nodes, len(batch), _mean_length(batch), pass_ms, all_ms, tokens)

    def _learn(self, current: _Round, batch: Batch, verdict: Verdict) -> None:
        """From a verdict: what each part beyond the first added to the trees chosen before it was asked."""
        accepted, expected = current.merged.learn(verdict.tokens), current.merged.expected
        if current.checked:
            accepted[-1] = verdict.num_accepted
        for choice, part in enumerate(current.asked[1:], start=1):
            for index, row in enumerate(batch.rows):
                if not current.checked and accepted[-1][index] == len(verdict.tokens[index]):
                    continue  # the text may go on as the tree does
                gain, before = float(accepted[choice + 1][index] - accepted[choice][index]), expected[choice][index]
                self._gains[row.row_id][part].see(gain, self._economy.gain(part, before, current.max_nodes))
                self._economy.added(part, before, current.max_nodes, gain)

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        view, before = _view(batch, batch.max_nodes), _view(batch, batch.max_nodes)
        before.rows = batch.rows[:-count]
        self._gains |= {row.row_id: [Ratio() for _ in self.parts] for row in batch.rows[-count:]}

        def join(part: int) -> None:
            drafter = self.parts[part]
            if drafter.features:
                self._catch_up(part, before)  # what it has to be shown yet is of the rows before
                drafter.join(view, count, _features_of(drafter, output))
            else:
                drafter.join(view, count)

        self._each(join)

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        view = _view(batch, batch.max_nodes)
        self._gains = {row_id: self._gains[row_id] for row_id in (batch.rows[index].row_id for index in rows)}
        self._merger.keep(self._gains)
        for missed in self._missed:
            missed.keep(rows)
        if self._round is not None:
            self._round.merged.keep(rows)
        self._each(lambda part: self._prompts[part].keep(self.parts[part], view, rows))

    def stop(self) -> None:
        alive = self._alive
        self._economy.end()
        self._begin([])
        self._each(lambda index: self.parts[index].stop(), alive)

    def _now(self) -> float:
        if self._finish is not None:
            self._finish()
        return self._clock()

    def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
        """What the best part is expected to have accepted: the others only add to it."""
        calibrated = [known for part in self.parts if (known := part.expected_accepted(sizes)) is not None]
        return [max(values) for values in zip(*calibrated, strict=True)] if calibrated else None

    def survivor(self) -> Drafter | None:
        return self if self._alive else None

    def _each(self, call: Callable[[int], None], parts: Sequence[int] | None = None) -> None:
        """Call for every part; those that raise are dropped for the rest of the call, and the first error is raised."""
        failed: Exception | None = None
        for part in list(self._alive if parts is None else parts):
            try:
                call(part)
            except Exception as error:
                self._alive = [index for index in self._alive if index != part]
                failed = failed or self._explain(part, error)
        if failed is not None:
            self._round = None
            raise failed

    def _explain(self, part: int, error: Exception) -> PartError:
        explained = PartError(f"part {self.parts[part].name!r} raised {type(error).__name__}: {error}")
        explained.__cause__ = error
        return explained


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError where parts of these names make no hybrid."""
    whole = "+".join(names)
    if len(names) < 2:
        raise ValueError(f"a hybrid joins at least two drafters, got {whole!r}")
    for name in names:
        if name in ("auto", "none", ""):
            raise ValueError(f"{name!r} cannot be part of a hybrid, got {whole!r}: join names of drafters by '+'")
        if names.count(name) > 1:
            raise ValueError(f"drafter {name!r} is there twice in {whole!r}")


def _features_of(drafter: Drafter, output: TargetOutput | None) -> TargetOutput | None:
    """What a part reads of a prompt's features; None where it reads none."""
    if output is None or not drafter.features:
        return None
    return TargetOutput(output.logits, {name: output.features[name] for name in drafter.features})


def _view(batch: Batch, max_nodes: int) -> Batch:
    """The batch as parts see it: their children are not drawn, and the budget is the hybrid's."""
    return batch.view(max_nodes, "deterministic")


def _repeatable_by_tree(batch: Batch) -> bool:
    """Whether a seed asks for a text again that depends on the trees, which then must not depend on a clock."""
    return not (batch.greedy or batch.coupled or batch.params.seed is None)


def _mean_length(batch: Batch) -> int:
    return sum(len(row.tokens) for row in batch.rows) // len(batch)
