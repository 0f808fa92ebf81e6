"""Drafters in one tree, on a simulated machine: the whole is as fast as the better part, what does not pay rests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import pytest
import torch
from unit_hybrid import COSTS, Clock, Copying, Reading, Run, Text, decode
from unit_rows import make_batch

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid import HybridConfig, HybridDrafter
from specdec.drafters.hybrid_cost import PROBE_SHARE, Economy, Gains
from specdec.latency import LatencyCurve
from specdec.missed import MissedPasses
from specdec.target import TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

CASES = [(0.0, 0.3), (0.0, 1.0), (0.3, 0.3), (0.3, 1.0)]
"""Share of the text that repeats, skill of the dear part: one of them pays, the other, or both."""


@cache
def simulated(kind: str, repeats: float, skill: float) -> tuple[Run, Reading]:
    """Four texts, by one part or by both."""
    clock: Clock = Clock()
    texts: dict[int, Text] = {}
    copying, reading = Copying(clock, texts), Reading(clock, texts, skill=skill)
    drafters: dict[str, Drafter] = {"copying": copying, "reading": reading}
    drafter = drafters.get(kind) or HybridDrafter([copying, reading], clock=clock)
    return decode(drafter, clock, texts, [Text(seed, repeats) for seed in range(4)]), reading


@pytest.mark.parametrize(("repeats", "skill"), CASES)
def test_the_whole_is_not_slower_than_the_better_part(repeats: float, skill: float) -> None:
    alone = [simulated(part, repeats, skill)[0].speedup for part in ("copying", "reading")]

    assert simulated("both", repeats, skill)[0].speedup >= 0.98 * max(alone)


def test_the_whole_is_faster_where_parts_are_right_in_different_places() -> None:
    alone = [simulated(part, 0.3, 1.0)[0].speedup for part in ("copying", "reading")]

    assert simulated("both", 0.3, 1.0)[0].speedup >= 1.05 * max(alone)


def test_a_part_that_does_not_pay_takes_next_to_no_time() -> None:
    """Beyond the first tries: reading states is put off as well, to one call per draft at most."""
    run, reading = simulated("both", 0.6, 0.0)

    first_tries = 3 * 16.0  # milliseconds, of draft and catch-up
    assert reading.spent <= PROBE_SHARE * run.ms + first_tries
    assert reading.asked > 0
    assert reading.reads <= reading.asked


def test_the_dear_part_is_asked_where_it_pays() -> None:
    run, reading = simulated("both", 0.0, 1.0)

    assert reading.asked > 0.05 * run.passes


def test_nodes_stay_while_they_are_worth_their_time_in_the_pass() -> None:
    flat, steep = LatencyCurve.simple({1: 10.0, 64: 10.1}), LatencyCurve.simple({1: 10.0, 2: 20.0, 64: 640.0})
    chances = [0.5, 0.3, 0.1]

    assert Economy(2, flat).size(chances, 1, 0) == 3
    assert Economy(2, steep).size(chances, 1, 0) == 0
    assert Economy(2, COSTS).size([0.9, 0.01, 0.01, 0.01], 1, 0) == 1


def test_states_waiting_to_be_read_count_against_a_part() -> None:
    economy = Economy(2, LatencyCurve.simple({1: 10.0}))
    economy.asked(1, 2.0, 1)
    economy.read(1, 0.5, 1)
    economy.read(1, 100.0, 1000)

    def pays(states: int) -> bool:
        return economy.pays(1, gain=0.3, nodes=1, max_nodes=24, batch=1, length=0, states=states)

    assert pays(0)
    assert pays(16)
    assert not pays(1000)


def test_trials_of_a_part_that_does_not_pay_are_a_bounded_share_of_the_time() -> None:
    economy = Economy(2, LatencyCurve.simple({1: 10.0}))
    economy.asked(1, 5.0, 1)
    asked = 0
    for _ in range(5000):
        if economy.pays(1, gain=0.1, nodes=1, max_nodes=24, batch=1, length=0, states=0):
            asked += 1
        economy.passed(1, 1, 0, 10.0, 10.0, 1.0)

    assert asked > 0
    assert 5.0 * asked <= PROBE_SHARE * 5000 * 10.0


def test_a_part_that_never_paid_sits_calls_out() -> None:
    economy = Economy(2, LatencyCurve.simple({1: 10.0}))
    economy.passed(1, 1, 100, 10.0, 10.0, 1.0)

    def call(asked: bool = True, pays: bool = False) -> None:
        economy.begin()
        if asked:
            economy.asked(1, 50.0, 8)
            assert economy.pays(1, 20.0 if pays else 0.1, 4, 16, 1, 100, 0) == pays
        economy.end()
        economy.end()  # of no call

    for _ in range(2):
        call()
        call(asked=False)  # which says nothing
    assert not economy.rests(1)
    call()
    for rest in (4, 8, 16, 16):
        for _ in range(rest):
            assert economy.rests(1)
            call(asked=False)
        assert not economy.rests(1)
        call()
    for _ in range(16):
        call(asked=False)
    call(pays=True)
    call()
    assert not economy.rests(1)


def test_what_a_part_adds_to_trees_of_one_class_says_a_little_of_the_others() -> None:
    gains = Gains()
    before = gains.at(5)
    for _ in range(20):
        gains.see(0, 0.0)

    assert gains.at(0) < 0.1
    assert gains.at(5) < before / 2


class Recording(Drafter):
    """Reads states; remembers what it was shown, and how wide the logits were."""

    name = "recording"
    features = ("last",)
    reads_logits = False

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self.calls.append(("start", [row.tokens for row in batch.rows]))

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        assert output.logits.shape[-1] == 0
        self.calls.append(("observe", output.features["last"][..., 0].tolist()))

    def keep(self, batch: Batch, rows: list[int]) -> None:  # type: ignore[override]
        self.calls.append(("keep", list(rows)))

    def propose(self, batch: Batch) -> TokenTree:
        self.calls.append(("propose", batch.pending.tolist()))
        return TokenTree.from_pending(batch.pending)


def plain_pass(drafter: Drafter, batch: Batch, tokens: list[int]) -> None:
    """A pass without a draft, after which each row has its token."""
    tree = TokenTree.from_pending(batch.pending)
    output = TargetOutput(torch.zeros(*tree.tokens.shape, 9), {"last": tree.tokens.unsqueeze(-1).float()})
    verdict = Verdict(torch.zeros_like(tree.tokens), [0] * len(batch), [[t] for t in tokens], [False] * len(batch))
    drafter.observe(batch, tree, output, verdict)
    for row, token in zip(batch.rows, tokens, strict=True):
        row.tokens.append(token)


def test_a_part_reads_prompt_and_passes_when_it_is_asked_rows_that_ended_left_out() -> None:
    part, batch = Recording(), make_batch([[1, 2], [3, 4]], 9)
    drafter = HybridDrafter([Copying(Clock(), {row.row_id: Text(0, 0.0) for row in batch.rows}), part])
    drafter.start(batch, TargetOutput(torch.zeros(2, 1, 9), {"last": torch.tensor([[[1.0]], [[3.0]]])}))
    plain_pass(drafter, batch, [5, 6])
    assert part.calls == []

    drafter.keep(batch, [1])
    batch.keep([1])
    plain_pass(drafter, batch, [7])
    drafter.propose(batch)

    assert part.calls == [
        ("start", [[3, 4]]),
        ("observe", [[4.0, 6.0]]),
        ("propose", [7]),
    ]


def test_a_part_never_asked_is_never_shown_anything() -> None:
    part, batch = Recording(), make_batch([[1, 2]], 9)
    drafter = HybridDrafter([Copying(Clock(), {}), part])
    drafter.start(batch, TargetOutput(torch.zeros(1, 1, 9), {"last": torch.tensor([[[1.0]]])}))
    plain_pass(drafter, batch, [5])
    drafter.keep(batch, [])

    assert part.calls == []


def test_what_a_part_takes_is_not_judged_by_the_draft_that_reads_the_prompt() -> None:
    economy = Economy(2, LatencyCurve.simple({1: 10.0}))

    def pays() -> bool:
        return economy.pays(1, gain=0.3, nodes=1, max_nodes=24, batch=1, length=0, states=0)

    economy.asked(1, 100.0, 1, first=True)
    assert pays()
    economy.asked(1, 100.0, 1)
    assert not pays()


def test_what_one_text_made_of_its_time_says_nothing_of_the_next() -> None:
    economy = Economy(2, LatencyCurve.simple({1: 10.0}))
    for _ in range(100):
        economy.passed(4, 1, 100, 10.0, 10.0, 5.0)
    fast = economy.rate(1, 100)
    economy.begin()
    for _ in range(10):
        economy.passed(1, 1, 100, 10.0, 10.0, 1.0)
    slow = economy.rate(1, 100)
    assert fast == pytest.approx(0.5, rel=0.1)
    assert slow == pytest.approx(0.1)


def test_a_hybrid_expects_what_its_best_part_does() -> None:
    class Calibrated(Reading):
        def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
            return [0.5 * size for size in sizes]

    copying = Copying(Clock(), {})
    assert HybridDrafter([copying, Calibrated(Clock(), {})]).expected_accepted((1, 4)) == [0.5, 2.0]
    assert HybridDrafter([copying, Reading(Clock(), {})]).expected_accepted((1, 4)) is None


def test_a_trial_asks_a_part_that_was_good_elsewhere() -> None:
    """Where it is to be found out whether drafts pay after all, this text's bad luck does not count."""
    clock: Clock = Clock()
    texts: dict[int, Text] = {}
    reading = Reading(clock, texts, skill=1.0)
    seen: dict[bool, list[int]] = {True: [], False: []}

    class Watched(HybridDrafter):
        def propose(self, batch: Batch) -> TokenTree:
            before = reading.asked
            tree = super().propose(batch)
            seen[batch.trying].append(reading.asked - before)
            return tree

    drafter = Watched([Copying(clock, texts), reading], clock=clock)
    decode(drafter, clock, texts, [Text(seed, 0.1) for seed in range(3)])
    reading.skill = 0.0
    seen = {True: [], False: []}
    decode(drafter, clock, texts, [Text(3, 0.0)])
    assert sum(seen[True]) >= 0.5 * len(seen[True]) > 0
    assert sum(seen[False]) < 0.5 * len(seen[False])


class Saying(Drafter):
    """A chain of the same tokens below every root."""

    def __init__(self, name: str, tokens: list[int]) -> None:
        self.name, self._tokens = name, tokens

    def propose(self, batch: Batch) -> TokenTree:
        size, count = len(batch), len(self._tokens)
        tokens = torch.tensor([[row.pending, *self._tokens] for row in batch.rows])
        chances = 0.5 ** torch.arange(count + 1.0).expand(size, -1)
        return TokenTree(tokens, torch.arange(-1, count).expand(size, -1), confidence=chances)


def test_of_trees_that_no_pass_checks_as_much_is_learnt_as_of_others() -> None:
    """The text goes on with 5, 6, 7; one part says 5, the other 5, 6, 8."""
    learnt = []
    for unchecked in (False, True):
        batch = make_batch([[9], [1, 2]], 10)
        drafter = HybridDrafter([Saying("a", [5]), Saying("b", [5, 6, 8])], HybridConfig(ask="always"))
        drafter.start(batch, None)
        batch.unchecked = unchecked
        tree = drafter.propose(batch)
        if unchecked:
            missed = MissedPasses()
            for token in (5, 6, 7):
                roots, size = TokenTree.from_pending(batch.pending), len(batch)
                verdict = Verdict(torch.zeros_like(roots.tokens), [0] * size, [[token]] * size, [False] * size)
                missed.add(roots, TargetOutput(torch.zeros(size, 1, 10), {}), verdict)
            missed.hand_over(partial(drafter.observe, batch))
        else:
            path = [tree.tokens[0].tolist().index(token) for token in (5, 6)]
            output = TargetOutput(torch.zeros(2, tree.num_nodes, 10), {})
            verdict = Verdict(torch.tensor([[0, *path]] * 2), [2, 2], [[5, 6, 7]] * 2, [False] * 2)
            drafter.observe(batch, tree, output, verdict)
        learnt.append([drafter._gains[row.row_id][1].factor for row in batch.rows])
    assert learnt[0] == learnt[1]
    assert 1.0 not in learnt[0]


def test_a_part_that_sits_a_call_out_is_shown_nothing_and_its_states_are_not_wanted() -> None:
    part, batch = Recording(), make_batch([[1, 2]], 9)
    drafter = HybridDrafter([Copying(Clock(), {batch.rows[0].row_id: Text(0, 0.0)}), part])
    drafter._economy.rests = lambda index: True  # type: ignore[method-assign]
    drafter.prepare(by_clock=True)
    assert drafter.features == ()
    assert drafter.every_feature == ("last",)
    drafter.start(batch, None)
    drafter.propose(batch)
    plain_pass(drafter, batch, [5])
    drafter.stop()
    assert part.calls == []
    drafter.prepare(by_clock=False)
    assert drafter.features == ("last",), "trees that have to be met again do not depend on what parts took"


@pytest.mark.parametrize("ask", ["always", "paying"])
def test_only_a_part_that_might_have_been_left_out_is_judged_by_what_it_added(ask: str) -> None:
    """Here the second one never adds a node."""
    drafter = HybridDrafter([Saying("a", [5]), Saying("b", [5])], HybridConfig(ask=ask))  # type: ignore[arg-type]
    for _ in range(4):
        batch = make_batch([[9]], 10)
        drafter.prepare(by_clock=True)
        drafter.start(batch, None)
        tree = drafter.propose(batch)
        verdict = Verdict(torch.zeros(1, 1, dtype=torch.int64), [0], [[4]], [False])
        drafter.observe(batch, tree, TargetOutput(torch.zeros(1, tree.num_nodes, 10), {}), verdict)
        drafter.stop()
    assert not drafter._economy.rests(0)
    assert drafter._economy.rests(1) == (ask == "paying")


def test_a_part_that_goes_on_right_beyond_what_is_known_is_not_taken_to_have_ended() -> None:
    batch = make_batch([[9]], 10)
    drafter = HybridDrafter([Saying("a", [5]), Saying("b", [5, 6, 7, 8])], HybridConfig(ask="always"))
    drafter.start(batch, None)
    batch.unchecked = True
    drafter.propose(batch)
    roots = TokenTree.from_pending(batch.pending)
    missed = MissedPasses()
    for token in (5, 6):
        verdict = Verdict(torch.zeros(1, 1, dtype=torch.int64), [0], [[token]], [False])
        missed.add(roots, TargetOutput(torch.zeros(1, 1, 10), {}), verdict)
    missed.hand_over(partial(drafter.observe, batch))
    assert drafter._gains[batch.rows[0].row_id][1].factor == 1.0
