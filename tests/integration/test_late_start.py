"""A drafter that reads hidden states reads a prompt once it is asked for a draft, and none where it never is."""

from __future__ import annotations

from typing import Any

import torch

from integration.architectures import tiny_model
from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.latency import LatencyCurve
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
COSTLY = LatencyCurve.simple({1: 1.0, 2: 100.0, 64: 3000.0})


class Following(Drafter):
    """Knows every token whose hidden state it was shown, and proposes wrong ones."""

    name = "following"

    features = ("last",)
    reads_logits = False

    def __init__(self) -> None:
        self.known: dict[int, list[int]] = {}  # by row_id: the token that follows each state
        self.starts = self.asked = 0

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self.starts += 1
        for index, row in enumerate(batch.rows):
            self.known[row.row_id] = row.tokens[1:]
            assert output is not None
            assert bool(output.features["last"][index, : len(row.tokens) - 1].any(-1).all())

    def propose(self, batch: Batch) -> TokenTree:
        self.asked += 1
        for row in batch.rows:
            assert self.known[row.row_id] == row.tokens[1:]
        root = TokenTree.from_pending(batch.pending)
        if max(row.max_depth for row in batch.rows) < 1:
            return root
        wrong = (batch.pending + 1) % batch.vocab_size
        return TokenTree(torch.stack([batch.pending, wrong], 1), torch.tensor([[-1, 0]] * len(batch)))

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        for row, tokens in zip(batch.rows, verdict.tokens, strict=True):
            self.known[row.row_id] = self.known[row.row_id] + tokens

    def keep(self, batch: Batch, rows: Any) -> None:
        assert self.starts


def test_it_never_begins_where_no_draft_pays() -> None:
    target, drafter = HFTarget(tiny_model()), Following()
    # Whose texts depend on trees, so that no draft is held against what plain decoding writes.
    decoder = SpecDecoder(target, drafter, verifier="rejection", latency=COSTLY, on_drafter_error="raise")
    for _ in range(2):
        decoder.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True, temperature=1.0)
    assert decoder.stats.plain_passes == decoder.stats.passes == 12
    assert (drafter.starts, drafter.asked) == (0, 0)


def test_it_begins_with_the_prompt_and_catches_up_when_it_is_asked() -> None:
    target, drafter = HFTarget(tiny_model()), Following()
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
    found = decoder.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
    assert drafter.starts == 1
    assert drafter.asked > 0
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=8, ignore_eos=True)
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]


def test_it_begins_late_in_a_text_where_drafts_come_to_pay(monkeypatch: Any) -> None:
    """Prompt and plain passes are shown in that order, once."""
    target, drafter = HFTarget(tiny_model()), Following()
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise")
    asked = iter([1, 1, 1, 4, 4, 1, 4, *[1] * 20])
    monkeypatch.setattr("specdec.adaptive.AdaptiveTrees.budget", lambda self, rows, most=0: _ask(self, next(asked)))
    decoder.generate(PROMPTS[0], max_new_tokens=16, ignore_eos=True)
    assert (drafter.starts, drafter.asked) == (1, 3)


def _ask(policy: Any, nodes: int) -> int:
    policy._begun, policy._asked, policy._size, policy._length = True, nodes, 1, 10
    return nodes
