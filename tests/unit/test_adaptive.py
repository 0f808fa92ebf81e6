"""The policy of trees, on simulated machines and drafters: passes, nodes and simulated time count, no clock does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from unit_rows import make_row

from specdec.acceptance import MOST_SAVED, Acceptance, Experience, HeldDraft
from specdec.adaptive import CREDIT, LEAST_CREDIT, SHARE, AdaptiveTrees
from specdec.batch import Row
from specdec.latency import LatencyCurve
from specdec.planner import CAUTIOUS_CPU, RUNGS, PassTimes
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

FLAT = LatencyCurve.simple({1: 10.0, 8: 11.0, 16: 12.0, 32: 14.0, 64: 18.0})  # packed bfloat16: trees are cheap
STEEP = LatencyCurve.simple({1: 10.0, 4: 16.0, 8: 20.0, 16: 22.0, 32: 27.0, 64: 38.0})  # float32
LINEAR = LatencyCurve.simple({1: 10.0, 2: 20.0, 64: 640.0})  # every node is a pass: no tree pays
MACHINES = {"flat": FLAT, "steep": STEEP, "linear": LINEAR}
Accept = Callable[[int], int]  # pass number -> right tokens along the chain drafted


class Machine:
    """Runs a policy against a drafter whose chains are right as far as a function of the pass says.

    Args:
        curve: what passes take.
        accept: accepted nodes of an endless chain, per row of each pass.
        width: nodes the drafter makes.
        draft_ms: time it takes for that.
        known: whether the policy is told the curve; else it sees times only.
        noise: share by which times vary.
        after_draft: factor on the time of a plain pass that comes after a draft.
        foretells: whether drafts may be held against the text.
        experience: what earlier texts were like.
        times: what their passes and drafts took.
    """

    def __init__(
        self, curve: LatencyCurve, accept: Sequence[Accept], width: int = 16, draft_ms: float = 0.0,
        known: bool = True, noise: float = 0.0, virtual: bool = False, after_draft: float = 1.0,
        foretells: bool = False, experience: Experience | None = None, times: PassTimes | None = None,
    ) -> None:  # fmt: skip
        self.curve, self.accept, self.width, self.draft_ms = curve, accept, width, draft_ms
        self.rows: list[Row] = [make_row([1], 10) for _ in accept]
        times = times or (PassTimes(curve, learn=False) if known else PassTimes(CAUTIOUS_CPU))
        self.policy = AdaptiveTrees(times, experience, foretells=foretells)
        self.virtual, self.noise, self.random = virtual, noise, random.Random(0)
        self.after_draft = after_draft
        self.widths: list[int] = []
        self.held: list[int] = []  # passes beside which something was drafted
        self._foretold: list[list[int]] = [[] for _ in accept]  # tokens that a held draft says or not, still to come
        self.tokens = self.ms = 0.0

    def run(self, tokens: int) -> Machine:
        """Decode until each row has about that many tokens."""
        while self.tokens < tokens:
            self.step()
        return self

    def step(self) -> None:
        budget = self.policy.budget(self.rows)
        width = self.width if self.virtual and budget > 1 else min(budget, self.width)
        size, columns = len(self.rows), torch.arange(width)
        if self.policy.beside > 1:
            self.held.append(len(self.widths))
            nodes = min(self.policy.beside, self.width)
            self.policy.hold(self.rows, chains(size, nodes))
            said = [min(accept(len(self.widths)), nodes - 1) for accept in self.accept]
            self._foretold = [[1] * count + [2] for count in said]
        virtual = (columns >= width - 1).expand(size, -1) if self.virtual and width > 1 else None
        tree = chains(size, width, virtual)
        limit = width - 1 - (virtual is not None)
        accepted = [min(accept(len(self.widths)), limit) for accept in self.accept]
        tokens = [[1] * (n + 1) for n in accepted]
        if width == 1:
            tokens = [[next_.pop(0) if next_ else 3] for next_ in self._foretold]
        verdict = Verdict(columns.expand(size, -1), accepted, tokens, [False] * size)
        target = self.curve.at(width, size) * (1 + self.noise * self.random.expovariate(1.0))
        beside = self.policy.beside > 1
        if width == 1 and (beside or (self.widths and self.widths[-1] > 1)):
            target *= self.after_draft
        draft = self.draft_ms if budget > 1 or beside else 0.0
        self.policy.observe(self.rows, tree, verdict, {"draft": draft, "target": target})
        self.widths.append(width)
        self.tokens += 1 + sum(accepted) / size
        self.ms += self.curve.at(width, size) + draft

    @property
    def slowdown(self) -> float:
        """Simulated time over that of plain decoding."""
        return self.ms / (self.tokens * self.curve.at(1, len(self.rows)))

    @property
    def speculating(self) -> list[bool]:
        return [width > 1 for width in self.widths]


def chains(rows: int, nodes: int, virtual: torch.Tensor | None = None) -> TokenTree:
    """A chain of ones per row."""
    embeddings = None if virtual is None else torch.zeros(rows, nodes, 2)
    parents = torch.arange(-1, nodes - 1).expand(rows, -1)
    return TokenTree(torch.ones(rows, nodes, dtype=torch.int64), parents, virtual=virtual, embeddings=embeddings)


def never(_: int) -> int:
    return 0


def always(_: int) -> int:
    return 100


def coin(seed: int, chance: float) -> Accept:
    """Accepts each next node with the same chance."""
    generator = random.Random(seed)

    def accept(_: int) -> int:
        count = 0
        while generator.random() < chance and count < 50:
            count += 1
        return count

    return accept


# Hostile text


@pytest.mark.parametrize(
    ("machine", "known"), [("flat", True), ("flat", False), ("steep", True), ("steep", False), ("linear", True)]
)
@pytest.mark.parametrize("draft_ms", [0.0, 3.0])
@pytest.mark.parametrize("width", [2, 16, 60])
def test_hostile_text_costs_at_most_three_percent(machine: str, width: int, draft_ms: float, known: bool) -> None:
    for tokens in (128, 1000):
        run = Machine(MACHINES[machine], [never], width, draft_ms, known).run(tokens)
        first = draft_ms / 10.0  # which reads the prompt, and is not charged
        assert run.ms / 10.0 <= 1.03 * tokens + first + 1.0
        assert sum(run.speculating) <= 20 + tokens // 50 or width == 2  # which costs next to nothing
        assert run.policy.reason


def test_a_machine_unlike_any_guess_is_found_out_in_one_pass() -> None:
    run = Machine(LINEAR, [coin(0, 0.5)], known=False).run(500)
    assert run.widths[0] == max(run.widths)
    assert run.ms / 10.0 <= run.tokens + run.widths[0] + SHARE * len(run.widths) + CREDIT


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_first_tree_is_what_calibration_says_and_later_ones_what_is_seen(share: float) -> None:
    """Of trees that pay as soon as half a node is accepted."""
    hopes = [share * min(size - 1, 4) for size in RUNGS]
    times = PassTimes(LatencyCurve.simple({1: 10.0, 2: 12.0, 64: 60.0}), learn=False)
    policy = AdaptiveTrees(times, Experience(hopes))
    rows = [make_row([1], 10)]
    first = policy.budget(rows)
    assert first == {0.0: 1, 0.3: 6, 1.0: 6}[share]
    seen = Acceptance(hopes)
    assert seen.by_size() == pytest.approx(hopes)
    for _ in range(50):
        seen.see([1], RUNGS[-1])
    assert seen.by_size()[1:] == pytest.approx([1.0] * (len(RUNGS) - 1), abs=0.05)


def test_trials_grow_rare() -> None:
    run = Machine(FLAT, [never]).run(2000)
    at = [index for index, on in enumerate(run.speculating) if on]
    late = [index for index in at if index > 500]
    assert len(late) <= 1500 // 64 + 1
    assert at[-1] > 1900  # but it never gives up


@pytest.mark.parametrize("machine", ["flat", "steep"])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("known", [True, False])
def test_no_text_takes_longer_than_its_allowance(machine: str, chance: float, known: bool) -> None:
    for seed in range(5):
        run = Machine(MACHINES[machine], [coin(seed, chance)], width=24, known=known).run(400)
        allowed = SHARE * len(run.widths) + CREDIT + (0 if known else 1.5)  # the cautious guess may be off at first
        assert run.ms / 10.0 <= run.tokens + allowed


@pytest.mark.parametrize("foretells", [False, True])
@pytest.mark.parametrize("draft_ms", [0.0, 2.0, 8.0])
def test_drafts_that_pay_in_no_text_soon_cost_next_to_nothing(draft_ms: float, foretells: bool) -> None:
    experience, times, lost = Experience(), PassTimes(FLAT, learn=False), []
    for _ in range(60):
        run = Machine(FLAT, [never], 8, draft_ms, foretells=foretells, experience=experience, times=times).run(128)
        lost.append(run.ms / 10.0 - run.tokens)
    assert sum(lost) <= SHARE * 128 * 60 + MOST_SAVED + LEAST_CREDIT * 60
    assert sum(lost[-30:]) <= (SHARE * 128 + LEAST_CREDIT) * 30
    assert max(lost[-30:]) > 0.0  # but it never gives up


def test_one_text_that_pays_makes_up_for_many_that_do_not() -> None:
    experience = Experience()
    for _ in range(20):
        Machine(FLAT, [never], 8, 5.0, experience=experience).run(128)
    assert experience.saved < CREDIT
    run = Machine(FLAT, [always], 8, 5.0, experience=experience).run(256)
    assert run.slowdown < 0.5
    assert experience.saved == MOST_SAVED


def test_the_plain_pass_that_a_draft_delays_is_charged() -> None:
    """To the account of what may be lost: fewer drafts are tried."""
    drafts = []
    for after_draft in (1.0, 2.0):
        run = Machine(STEEP, [never], width=4, known=False, after_draft=after_draft).run(1000)
        drafts.append(sum(run.speculating))
        assert run.policy._times.delay_ms == pytest.approx(10.0 * (after_draft - 1.0))
    assert drafts[1] < drafts[0]


# Good text


def test_good_text_is_never_decoded_plainly_where_trees_pay() -> None:
    run = Machine(FLAT, [always]).run(1000)
    assert all(run.speculating)
    assert set(run.widths) == {16}
    assert run.policy.reason is None


def test_plain_passes_are_run_to_compare_with() -> None:
    run = Machine(FLAT, [always], known=False).run(1000)
    assert run.speculating.count(False) == 3
    assert run.speculating[:11] == [True] * 8 + [False] * 3


@pytest.mark.parametrize(("two_nodes", "pays"), [(18.0, True), (22.0, False)])
def test_a_plain_pass_that_a_draft_slowed_down_is_not_what_plain_decoding_takes(two_nodes: float, pays: bool) -> None:
    curve = LatencyCurve.simple({1: 10.0, 2: two_nodes, 64: 640.0})  # for two tokens
    run = Machine(curve, [lambda _: 1], width=2, known=False, after_draft=1.25).run(600)
    late = run.speculating[100:]
    assert late.count(pays) > 0.9 * len(late)


def test_no_tree_where_none_pays() -> None:
    run = Machine(LINEAR, [coin(0, 0.5)], known=True).run(500)
    assert sum(run.speculating) < 25


def test_half_right_chains_pay_on_a_flat_machine_and_are_kept() -> None:
    for known in (True, False):
        run = Machine(FLAT, [coin(1, 0.5)], known=known, noise=0.05).run(1000)
        assert sum(run.speculating) > 0.9 * len(run.widths)
        assert run.slowdown < 0.65


@pytest.mark.parametrize("machine", ["flat", "steep"])
@pytest.mark.parametrize("chance", [0.2, 0.4, 0.6, 0.8])
def test_budgets_found_are_near_the_best_fixed_one(machine: str, chance: float) -> None:
    def fixed(nodes: int) -> float:
        return MACHINES[machine].at(nodes) / 10.0 / sum(chance**depth for depth in range(nodes))

    best = min(fixed(nodes) for nodes in range(1, 25))
    runs = [Machine(MACHINES[machine], [coin(s, chance)], 24, known=False, noise=0.1).run(256) for s in range(9)]
    assert sorted(run.slowdown for run in runs)[4] <= 1.25 * best


def test_the_tree_is_as_large_as_pays() -> None:
    chain_of_two = Machine(STEEP, [lambda _: 1], width=64).run(2000)
    late = chain_of_two.widths[len(chain_of_two.widths) // 2 :]
    assert sorted(late)[len(late) // 2] == 2  # one node is always right, and no more
    assert chain_of_two.slowdown < 0.65  # 12 ms for two tokens


# Changing text


def test_speculation_comes_back_when_text_turns_good() -> None:
    run = Machine(FLAT, [lambda step: 0 if step < 300 else 100]).run(300)
    passes = len(run.widths)
    run.run(2000)
    after = run.speculating[passes:]
    assert after.index(True) <= 65
    assert after[after.index(True) + 10 :].count(False) <= len(after) // 50


def test_speculation_stops_when_text_turns_hostile() -> None:
    run = Machine(FLAT, [lambda step: 100 if step < 50 else 0]).run(5000)
    hostile = run.speculating[50:]
    assert sum(hostile) <= 0.1 * len(hostile)
    assert not any(hostile[60:63])


# Drafts that no pass checks

LINES = LatencyCurve.simple({1: 10.0, 2: 12.0, 4: 15.0, 64: 120.0})  # a tree pays where half of it is right


def doubts() -> Experience:
    """Earlier texts of which nothing was foreseen."""
    known = Experience()
    for draft in range(200):
        known.see(draft % 4, 0, 8.0)
    return known


@pytest.mark.parametrize("width", [2, 16])
@pytest.mark.parametrize("draft_ms", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("known", [True, False])
def test_where_drafts_are_not_expected_to_pay_they_are_held_against_the_text(
    width: int, draft_ms: float, known: bool
) -> None:
    for tokens in (128, 1000):
        run = Machine(LINES, [never], width, draft_ms, known, foretells=True, experience=doubts()).run(tokens)
        first = 0 if known else 8  # passes, until it is known what a plain one takes
        assert not any(run.speculating[first:])
        assert run.held
        surprise = draft_ms / 10.0 + (0 if known else 2.0)  # it is not known before what a draft takes
        assert run.ms / 10.0 <= (1.0 + SHARE) * tokens + SHARE * 50 + surprise


def test_a_text_that_turns_good_is_found_out_by_held_drafts() -> None:
    run = Machine(
        LINES, [lambda step: 0 if step < 100 else 100], 16, 1.0, foretells=True, experience=doubts()
    ).run(100)  # fmt: skip
    assert not any(run.speculating)
    run.run(600)
    late = run.speculating[100:]
    assert late.index(True) <= 24
    assert late[late.index(True) :].count(False) == 0


def test_in_a_batch_each_row_is_held_against_its_own_text() -> None:
    run = Machine(LINES, [always, never, never, never], 8, 1.0, foretells=True, experience=doubts())
    for _ in range(60):
        run.step()
    found = [run.policy._known(row.row_id).acceptance.by_size()[3] for row in run.rows]
    assert found[0] > 0.5 > 0.2 > max(found[1:])


def test_a_held_draft_says_what_a_pass_would_have_accepted() -> None:
    """The text goes 0 -> 2 -> 5 -> out; the nodes stand in columns."""
    tokens = torch.tensor([[9, 7, 8, 7, 8, 6, 0]])
    parents = torch.tensor([[-1, 0, 0, 2, 2, 3, -2]])
    row = make_row([1], 10)
    held = HeldDraft([row], TokenTree(tokens, parents), known=7)
    assert held.follow([row], [[8]]) == {}
    assert held.follow([row], [[7]]) == {}
    assert not held.settled
    assert held.follow([row], [[0]]) == {row.row_id: [2, 3]}  # the padding's token is no node
    assert held.settled


def test_a_held_draft_ends_with_its_rows() -> None:
    rows = [make_row([1], 10) for _ in range(2)]
    held = HeldDraft(rows, chains(2, 3), known=3)
    assert held.follow(rows, [[1], [2]]) == {rows[1].row_id: []}
    assert held.follow(rows[1:], [[1]]) == {}
    assert held.settled


def test_after_a_few_right_nodes_no_more_is_waited_for() -> None:
    row = make_row([1], 10)
    held = HeldDraft([row], chains(1, 12), known=12)
    found = [held.follow([row], [[1]]) for _ in range(4)]
    assert found == [{}, {}, {}, {row.row_id: [1, 2, 3, 4]}]


def test_a_passes_own_kind_of_trial_is_made_where_only_the_draft_is_too_dear() -> None:
    """Passes over more nodes cost nothing here, so they are not spared."""
    flat = LatencyCurve.simple({1: 10.0, 64: 10.0})
    run = Machine(flat, [coin(0, 0.2)], 4, draft_ms=4.0, foretells=True, experience=doubts()).run(1000)
    assert any(run.speculating)
    assert not run.held


def test_what_earlier_texts_were_like_decides_the_first_tree() -> None:
    known = Experience()
    first = Machine(STEEP, [never], 16, foretells=True, experience=known)
    first.run(128)
    assert first.speculating[0]
    second = Machine(STEEP, [never], 16, foretells=True, experience=known).run(128)
    assert not any(second.speculating)
    third = Machine(STEEP, [always], 16, foretells=True, experience=known).run(128)
    assert third.speculating.count(True) > 0.5 * len(third.widths)


# Drafters of all kinds


def test_a_drafter_with_nothing_to_say_is_asked_on() -> None:
    run = Machine(FLAT, [never], width=1)
    asked = []
    for _ in range(50):
        run.step()
        asked.append(run.policy.reason is None)
    assert all(asked)


def test_trees_that_come_whole_are_all_or_nothing() -> None:
    run = Machine(FLAT, [always], width=12, virtual=True).run(1000)
    assert set(run.widths) == {12}
    run = Machine(FLAT, [never], width=12, virtual=True).run(1000)
    assert set(run.widths) == {1, 12}
    assert sum(run.speculating) <= 0.05 * len(run.widths)


def test_whole_trees_too_wide_for_what_may_be_lost_surprise_a_decoder_once() -> None:
    steep = LatencyCurve.simple({1: 10.0, 32: 60.0})
    known = Experience()
    first = Machine(steep, [never], 32, known=False, virtual=True, experience=known)
    times = first.policy._times
    assert sum(first.run(128).speculating) == 1
    second = Machine(steep, [never], 32, virtual=True, experience=known)
    second.policy._times = times  # kept from call to call, as the experience is
    assert not any(second.run(128).speculating)
    assert "no more may be lost" in (second.policy.reason or "")
    longer = Machine(steep, [always], 32, virtual=True, experience=known)
    longer.policy._times = times
    assert any(longer.run(600).speculating)  # it may lose more by then, and finds out that they pay


def test_whole_trees_that_are_affordable_are_drafted_from_the_first_pass_on() -> None:
    known = Experience()
    for _ in range(2):
        run = Machine(FLAT, [always], 12, virtual=True, experience=known).run(200)
        assert set(run.widths) == {12}
    assert all(Machine(FLAT, [always], 12, experience=known).run(400).speculating)  # trees of another kind now
    assert known.whole_width == 0.0


def test_a_drafter_dearer_than_its_tokens_is_left_alone() -> None:
    run = Machine(FLAT, [lambda _: 1], draft_ms=15.0).run(1000)
    assert sum(run.speculating) <= 0.03 * len(run.widths)
    if run.policy.reason is None:  # the last pass was another trial
        run.step()
    assert "a draft may cost 1.5" in (run.policy.reason or "")


def test_one_slow_draft_does_not_end_drafting_for_good() -> None:
    run = Machine(FLAT, [always])
    run.policy._times.observe_draft(500.0)  # of an earlier call
    assert all(run.run(400).speculating[8:])


# Batches


def test_a_batch_has_one_width_and_its_mean_decides() -> None:
    mixed = Machine(FLAT, [always, never]).run(500)
    assert all(mixed.speculating)
    hostile = Machine(FLAT, [never] * 4).run(500)
    assert sum(hostile.speculating) < 0.1 * len(hostile.widths)


def test_wide_batches_get_smaller_trees() -> None:
    curve = LatencyCurve.simple({1: 10.0, 32: 11.0, 64: 22.0, 128: 44.0, 512: 176.0})
    accept = [lambda _, count=count: count for count in (1, 2, 3, 4) for _ in range(4)]  # type: ignore[misc]
    small, large = (Machine(curve, accept[::step], width=32).run(600) for step in (8, 1))
    typical = [sorted(run.widths)[len(run.widths) // 2] for run in (small, large)]
    assert typical[1] < typical[0]


def test_rows_that_end_take_their_acceptance_with_them() -> None:
    run = Machine(FLAT, [always, never]).run(200)
    run.rows, run.accept = run.rows[1:], run.accept[1:]
    run.run(800)
    tail = run.speculating[-200:]
    assert sum(tail) < 0.1 * len(tail)


def test_no_larger_tree_is_tried_that_could_not_pay() -> None:
    """Beyond some nodes passes are as long as they are wide: a trial of more would cost what many passes gain."""
    curve = LatencyCurve.simple({1: 10.0, 4: 12.0, 64: 612.0})
    run = Machine(curve, [coin(0, 0.5)]).run(400)
    assert max(run.widths[20:]) <= 6
    assert run.slowdown < 0.8
