"""A drafter that is shown plain passes late, as one, drafts as if it had been shown each in time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from integration.architectures import tiny_model
from test_eagle import random_weights as random_eagle
from test_ppd import make_weights as random_prompts
from unit_heads import random_weights

from specdec import SpecDecoder, missed
from specdec.batch import Batch, Row
from specdec.drafters.base import Drafter
from specdec.drafters.clover import CloverDrafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.ppd import PPDDrafter
from specdec.missed import MissedPasses
from specdec.policy import NO_LIMIT
from specdec.target import HFTarget, TargetOutput
from specdec.tree import ROOT, TokenTree
from specdec.verifiers.base import Verdict

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
LENGTH = 45


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model().double())  # so that summing in another order moves no choice


def make(name: str, target: HFTarget) -> Drafter:
    kinds: dict[str, Any] = {"medusa": MedusaDrafter, "clover": CloverDrafter, "eagle": EagleDrafter, "ppd": PPDDrafter}
    if name == "eagle":
        weights = random_eagle(target, "ours")
    else:
        weights = random_prompts(target) if name == "ppd" else random_weights(target, name)
    return kinds[name](weights=weights)  # type: ignore[no-any-return]


class Bursts:
    """Two passes with drafts after every nine without."""

    reason = "planted"
    trying = False
    beside = 1

    def __init__(self) -> None:
        self.step = 0

    def budget(self, rows: Sequence[Row], most: int = NO_LIMIT) -> int:
        self.step += 1
        return 16 if self.step % 11 > 8 else 1

    def hold(self, rows: Sequence[Row], tree: TokenTree) -> None:
        pass

    def observe(self, rows: Sequence[Row], tree: TokenTree, verdict: Verdict, ms: dict[str, float] | None) -> None:
        pass


def trees_and_texts(target: HFTarget, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[list[int]]]:
    """What is drafted in the bursts, as nested lists, and what is written."""
    drafter, drafted = make(name, target), []
    propose = drafter.propose

    def recorded(batch: Batch) -> TokenTree:
        tree = propose(batch)
        drafted.append((tree.tokens.tolist(), tree.parents.tolist()))
        return tree

    monkeypatch.setattr(drafter, "propose", recorded)
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise")
    monkeypatch.setattr(decoder, "_pick_policy", lambda *_: Bursts())
    results = decoder.generate(PROMPTS, max_new_tokens=LENGTH, ignore_eos=True)
    return drafted, [result.token_ids for result in results]


@pytest.mark.parametrize("name", ["medusa", "clover", "eagle", "ppd"])
def test_late_and_in_time_make_the_same_drafts(target: HFTarget, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    late = trees_and_texts(target, name, monkeypatch)
    monkeypatch.setattr(missed, "MOST_NODES", 1)
    assert trees_and_texts(target, name, monkeypatch) == late
    assert len(late[0]) >= 6
    assert any(len(tokens[0]) > 1 for tokens, _ in late[0])
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=LENGTH, ignore_eos=True)
    assert late[1] == [result.token_ids for result in plain]


def plain_pass(step: int, rows: Sequence[int]) -> tuple[TokenTree, TargetOutput, Verdict]:
    """A pass over roots whose tokens, logits, features and bonus tokens tell row and step."""
    marks = torch.tensor([[100 * row + step] for row in rows])
    tree = TokenTree(marks, torch.full_like(marks, ROOT))
    output = TargetOutput(marks.unsqueeze(2).float(), {"last": -marks.unsqueeze(2).float()})
    verdict = Verdict(torch.zeros_like(marks), [0] * len(rows), [[100 * row + step + 1] for row in rows],
                      [False] * len(rows))  # fmt: skip
    return tree, output, verdict


def test_passes_become_a_chain_that_was_accepted_whole() -> None:
    kept, shown = MissedPasses(), []
    for step in range(3):
        kept.add(*plain_pass(step, (0, 1, 2)))
    kept.keep([2, 0])
    kept.add(*plain_pass(3, (2, 0)))
    kept.hand_over(lambda *seen: shown.append(seen))
    kept.hand_over(lambda *seen: shown.append(seen))  # nothing is left
    ((tree, output, verdict),) = shown
    tree.validate(vocab_size=1000)
    assert tree.tokens.tolist() == [[200, 201, 202, 203], [0, 1, 2, 3]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2]] * 2
    assert output.logits[..., 0].tolist() == tree.tokens.tolist()
    assert output.features["last"][..., 0].tolist() == (-tree.tokens).tolist()
    assert verdict.path.tolist() == [[0, 1, 2, 3]] * 2
    assert verdict.num_accepted == [3, 3]
    assert verdict.tokens == [[201, 202, 203, 204], [1, 2, 3, 4]]


def test_no_more_is_held_than_a_few_rows_logits() -> None:
    kept = MissedPasses()
    for step in range(missed.MOST_NODES // 8):
        assert not kept.full
        kept.add(*plain_pass(step, range(8)))
    assert kept.full
