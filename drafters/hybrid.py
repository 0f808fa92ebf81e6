"""Several drafters in one tree: what copies the text so far and what reads the model's states see different things."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from time import perf_counter
from typing import Any, Literal

import torch

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid_calibration import Calibration, Odds, row_odds
from specdec.drafters.hybrid_cost import Economy, Ratio
from specdec.drafters.hybrid_tree import MergedTree
from specdec.missed import MissedPasses
from specdec.planner import CAUTIOUS_CPU, CAUTIOUS_GPU
from specdec.target import HFTarget, TargetOutput
from specdec.tree import PADDING, TokenTree
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
class _RowState:
    """What is kept of one row."""

    odds: list[Odds]
    gains: list[Ratio]


@dataclass
class _Round:
    """A pass from proposal to verdict.

    Attributes:
        merged: per row.
        max_nodes: of a tree, on average over the rows.
        before: per asked part beyond the first, per row: the nodes chosen without it.
        expected: the same, accepted nodes expected of these.
        chosen: per row the nodes of a tree that no pass checks; what passes without drafts emit says as much. None for
            one that a pass checks.
    """

    start: float
    merged: list[MergedTree]
    max_nodes: int
    asked: list[int] = field(default_factory=list)
    before: dict[int, list[list[int]]] = field(default_factory=dict)
    expected: dict[int, list[float]] = field(default_factory=dict)
    chosen: list[list[int]] | None = None
    end: float = 0.0

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in the order given."""
        self.merged = [self.merged[row] for row in rows]
        self.before = {part: [nodes[row] for row in rows] for part, nodes in self.before.items()}
        self.expected = {part: [values[row] for row in rows] for part, values in self.expected.items()}
        self.chosen = None if self.chosen is None else [self.chosen[row] for row in rows]


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
        self._calibrations: dict[tuple[bool, bool], Calibration] = {}
        self._economy = Economy(len(self.parts), CAUTIOUS_CPU)
        self._begin([])

    def _begin(self, rows: Sequence[int]) -> None:
        count = range(len(self.parts))
        self._rows = {row: _RowState(row_odds(len(self.parts)), [Ratio() for _ in count]) for row in rows}
        self._alive = list(count)
        self._fresh = set(count)  # not asked yet in this call
        self._unstarted: dict[int, tuple[Batch, TargetOutput]] = {}  # parts that have not read the prompt
        self._missed = [MissedPasses(part.reads_logits) for part in self.parts]
        self._round: _Round | None = None

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        for part in self.parts:
            part.bind(target, tokenizer)
        self.features = tuple(dict.fromkeys(name for part in self.parts for name in part.features))
        self._uneven = target.takes_uneven
        self.takes_rows = all(part.takes_rows for part in self.parts if part.features)
        if target.device.type == "cuda":
            self._finish = torch.cuda.synchronize  # what is queued would be counted where its result is first read
            self._economy = Economy(len(self.parts), CAUTIOUS_GPU)

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._begin([row.row_id for row in batch.rows])
        self._economy.begin()
        view = _view(batch, batch.max_nodes)

        def start(part: int) -> None:
            if output is not None and self._waits(part):
                read = _features_of(self.parts[part], output)
                assert read is not None
                prompt = copy.copy(view)
                prompt.rows = [replace(row, tokens=list(row.tokens)) for row in view.rows]
                self._unstarted[part] = prompt, read
            else:
                self.parts[part].start(view, output)

        self._each(start)

    def _waits(self, part: int) -> bool:
        """Whether a part is shown nothing before it is asked, as reading many states takes little more than one."""
        return bool(self.parts[part].features) and not self.parts[part].reads_logits

    def _start(self, part: int) -> None:
        """Have a part read the prompt if it did not yet."""
        if part in self._unstarted:
            self.parts[part].start(*self._unstarted.pop(part))

    def _unread(self, part: int) -> int:
        """States that a part would have to read if it were asked."""
        waiting = self._unstarted.get(part)
        prompt = 0 if waiting is None else sum(len(row.tokens) - 1 for row in waiting[0].rows)
        return prompt + self._missed[part].num_nodes

    def propose(self, batch: Batch) -> TokenTree:
        max_nodes = min(self.config.max_nodes, batch.max_nodes)
        self._round = None
        if max_nodes < 2 or max(row.max_depth for row in batch.rows) < 1:
            return TokenTree.from_pending(batch.pending)
        view = _view(batch, max_nodes)
        way = (batch.greedy, batch.coupled)
        calibration = self._calibrations.setdefault(way, Calibration(len(self.parts)))
        merged = [MergedTree(row.pending, calibration, self._rows[row.row_id].odds) for row in batch.rows]
        usual = min(batch.mean_nodes, max_nodes)  # of a row
        self._round = current = _Round(self._now(), merged, usual)
        chosen = [[0] for _ in batch.rows]
        timed = self.config.ask == "paying" and not _repeatable_by_tree(batch)

        def ask(part: int) -> None:
            nonlocal chosen
            if current.asked:
                expected = [tree.expected(nodes) for tree, nodes in zip(merged, chosen, strict=True)]
                # The first time it reads the prompt, once for all of the call: no single pass would pay for that. For
                # a tree that is not checked it does not have to.
                known = timed and (part not in self._fresh or batch.unchecked or self._economy.doubts(part))
                if known and not self._pays(part, batch, expected, self._size(chosen), usual):
                    return
                current.before[part], current.expected[part] = chosen, expected
            self._catch_up(part, view)
            began = self._now()
            self._ask(part, view, merged)
            chosen = self._choose(batch, merged, max_nodes, timed)
            self._economy.asked(part, 1000.0 * (self._now() - began), self._size(chosen), part in self._fresh)
            self._fresh.discard(part)
            current.asked.append(part)

        self._each(ask, self._order(timed))
        tree = _assemble(batch, merged, chosen)
        current.chosen = chosen if batch.unchecked else None
        current.end = self._now()
        return tree

    def _choose(self, batch: Batch, merged: Sequence[MergedTree], max_nodes: int, timed: bool) -> list[list[int]]:
        """Per row the nodes to check: the best that there may be, and where a clock may decide, of these what pays."""
        chosen = [tree.best(max_nodes, self.config.min_probability) for tree in merged]
        most = batch.total_nodes(max_nodes) - len(chosen)  # beyond the roots
        if not timed and sum(map(len, chosen)) - len(chosen) <= most:
            return chosen
        joint = sorted(
            (
                (tree.nodes[node].joint, -place, -row)
                for row, (tree, nodes) in enumerate(zip(merged, chosen, strict=True))
                for place, node in enumerate(nodes[1:])
            ),
            reverse=True,
        )
        count = most
        if timed:
            count = self._economy.size([chance for chance, *_ in joint[:most]], len(batch), _mean_length(batch))
        sizes = Counter(-row for *_, row in joint[:count])
        return [nodes[: 1 + sizes[row]] for row, nodes in enumerate(chosen)]

    def _size(self, chosen: Sequence[Sequence[int]]) -> float:
        """Nodes of a row that a pass computes."""
        return sum(map(len, chosen)) / len(chosen) if self._uneven else max(map(len, chosen))

    def _order(self, timed: bool) -> list[int]:
        """Parts that read no hidden states, then the others, as named; by what they took where that counts."""
        order = sorted(self._alive, key=lambda part: bool(self.parts[part].features))
        return self._economy.order(order) if timed else order

    def _pays(self, part: int, batch: Batch, expected: Sequence[float], nodes: float, max_nodes: int) -> bool:
        factors = [self._rows[row.row_id].gains[part].factor for row in batch.rows]
        if batch.trying:  # after an unlucky stretch: it may be as good here as in other texts
            factors = [max(factor, 1.0) for factor in factors]
        gains = (self._economy.gain(part, value, max_nodes) for value in expected)
        gain = sum(map(mul, gains, factors))
        return self._economy.pays(part, gain, nodes, max_nodes, len(batch), _mean_length(batch), self._unread(part))

    def _catch_up(self, part: int, view: Batch) -> None:
        """Show a part what it missed since it was asked last, the prompt for one."""
        drafter, began, states = self.parts[part], self._now(), self._unread(part)
        self._start(part)
        self._missed[part].hand_over(lambda *seen: drafter.observe(view, *seen))
        if states:
            self._economy.read(part, 1000.0 * (self._now() - began), states)

    def _ask(self, part: int, view: Batch, merged: Sequence[MergedTree]) -> None:
        """Merge what a part proposes."""
        drafter = self.parts[part]
        tree = drafter.propose(view).to(view.device)
        tree.validate(view.vocab_size)
        if tree.virtual is not None or tree.siblings != "deterministic":
            raise ValueError(f"drafter {drafter.name!r} proposed nodes that cannot be merged: virtual, or drawn")
        if tree.batch_size != len(view) or not torch.equal(tree.tokens[:, 0], view.pending):
            raise ValueError(f"drafter {drafter.name!r} must root one tree per row at the pending tokens")
        for index, (row, into) in enumerate(zip(view.rows, merged, strict=True)):
            into.add(part, tree, index, row.max_depth)

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        current, self._round, began = self._round, None, self._now()
        if current is not None:
            self._learn(current, batch, verdict)
        view = _view(batch, batch.max_nodes)
        checked = current is not None and current.chosen is None
        asked = current.asked if current is not None and checked else ()

        def show(part: int) -> None:
            drafter = self.parts[part]
            if self._waits(part) or (drafter.features and part not in asked):
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
        for index, (row, merged) in enumerate(zip(batch.rows, current.merged, strict=True)):
            state, tokens = self._rows[row.row_id], verdict.tokens[index]
            accepted = verdict.num_accepted[index]
            if current.chosen is not None:
                accepted = merged.accepted(current.chosen[index], tokens)
            for place, (part, before) in enumerate(current.before.items()):
                later = list(current.before.values())[place + 1 :]
                got = merged.accepted(later[0][index], tokens) if later else accepted
                gain, expected = float(got - merged.accepted(before[index], tokens)), current.expected[part][index]
                state.gains[part].see(gain, self._economy.gain(part, expected, current.max_nodes))
                self._economy.added(part, expected, current.max_nodes, gain)
            merged.learn(tokens)

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        view, before = _view(batch, batch.max_nodes), _view(batch, batch.max_nodes)
        before.rows = batch.rows[:-count]
        parts = len(self.parts)
        self._rows |= {
            row.row_id: _RowState(row_odds(parts), [Ratio() for _ in range(parts)]) for row in batch.rows[-count:]
        }

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
        self._rows = {row.row_id: self._rows[row.row_id] for row in (batch.rows[index] for index in rows)}
        for missed in self._missed:
            missed.keep(rows)
        if self._round is not None:
            self._round.keep(rows)

        def keep(part: int) -> None:
            if not rows and part in self._unstarted:
                return  # it was never asked
            self._start(part)
            self.parts[part].keep(view, rows)

        self._each(keep)

    def stop(self) -> None:
        alive = self._alive
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
    view = copy.copy(batch)
    view.siblings, view.max_nodes = "deterministic", max_nodes
    return view


def _repeatable_by_tree(batch: Batch) -> bool:
    """Whether a seed asks for a text again that depends on the trees, which then must not depend on a clock."""
    return not (batch.greedy or batch.coupled or batch.params.seed is None)


def _mean_length(batch: Batch) -> int:
    return sum(len(row.tokens) for row in batch.rows) // len(batch)


def _assemble(batch: Batch, merged: Sequence[MergedTree], chosen: Sequence[Sequence[int]]) -> TokenTree:
    """The chosen nodes of all rows, padded at the end."""
    rows = [tree.columns(nodes) for tree, nodes in zip(merged, chosen, strict=True)]
    width = max(map(len, chosen))
    tokens = [row + [0] * (width - len(row)) for row, _, _ in rows]
    parents = [row + [PADDING] * (width - len(row)) for _, row, _ in rows]
    chances = [row + [0.0] * (width - len(row)) for _, _, row in rows]
    return TokenTree(
        torch.tensor(tokens, device=batch.device),
        torch.tensor(parents, device=batch.device),
        confidence=torch.tensor(chances, device=batch.device),
    )
