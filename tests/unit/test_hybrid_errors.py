"""Hybrids that make no sense are refused, and a part that raises is left out while the others go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration.architectures import generate_alone, tiny_model
from integration.scripted import ScriptedDrafter, chain
from unit_rows import make_batch

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid import HybridConfig, HybridDrafter, PartError
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.registry import create_drafter
from specdec.target import TargetOutput
from specdec.tree import ROOT, TokenTree
from specdec.verifiers.base import Verdict

PROMPTS = [[5, 6, 7, 8] * 4, [9, 10, 11] * 3, [30, 31, 30, 31, 30]]
LENGTHS = 12
ALWAYS = HybridConfig(ask="always")
LEFT_OUT = "part 'failing' raised OSError: it broke; going on with the rest of it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_nodes": 0}, "max_nodes must be at least 1, got 0"),
        ({"min_probability": -0.1}, r"min_probability must be in \[0, 1\], got -0\.1"),
        ({"min_probability": 1.5}, r"min_probability must be in \[0, 1\], got 1\.5"),
        ({"min_probability": float("nan")}, r"min_probability must be in \[0, 1\], got nan"),
        ({"ask": "sometimes"}, "ask must be 'paying' or 'always', got 'sometimes'"),
    ],
)
def test_impossible_options_are_refused_with_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridConfig(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("suffix+", {}, r"'' cannot be part of a hybrid, got 'suffix\+': join names of drafters by '\+'"),
        ("+ngram", {}, "'' cannot be part of a hybrid"),
        ("suffix+auto", {}, r"'auto' cannot be part of a hybrid, got 'suffix\+auto'"),
        ("none+suffix", {}, "'none' cannot be part of a hybrid"),
        ("ngram+suffix+ngram", {}, r"drafter 'ngram' is there twice in 'ngram\+suffix\+ngram'"),
        ("suffix+ngrm", {}, "unknown drafter 'ngrm'; did you mean 'ngram'"),
        (
            "suffix+ngram",
            {"ngrm.depth": "2"},
            r"unknown part of drafter 'suffix\+ngram' in option 'ngrm.depth': 'ngrm'",
        ),
        ("suffix+ngram", {"ngram.dept": "2"}, "unknown option of drafter 'ngram' 'dept'; did you mean 'depth'"),
        ("suffix+ngram", {"ngram.dept": "2"}, r"options of this part are given as ngram\.NAME=VALUE"),
        ("suffix+ngram", {"ngram.depth": "0"}, "depth must be at least 1, got 0"),
        ("suffix+ngram", {"depth": "2"}, r"options of a part carry its name in front: ngram\.depth"),
        ("suffix+ngram", {"max_nodes": "many"}, "max_nodes must be of type int, got 'many'"),
    ],
)
def test_names_and_options_that_make_no_hybrid_are_refused(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_drafter(name, options)


def test_parts_that_make_no_hybrid_are_refused() -> None:
    with pytest.raises(ValueError, match="a hybrid joins at least two drafters, got 'suffix'"):
        HybridDrafter([SuffixDrafter()])
    with pytest.raises(ValueError, match="a hybrid joins at least two drafters, got ''"):
        HybridDrafter([])
    with pytest.raises(ValueError, match="drafter 'suffix' is there twice"):
        HybridDrafter([SuffixDrafter(), SuffixDrafter()])
    with pytest.raises(ValueError, match="drafter 'lookahead' cannot be merged with others: its trees hold virtual"):
        create_drafter("suffix+lookahead")


class Failing(Drafter):
    """Proposes nothing, and raises in one of its methods.

    Args:
        where: the method.
        after: calls of it that go well before.
    """

    name = "failing"

    def __init__(self, where: str, after: int = 0) -> None:
        self.where, self.after = where, after
        self.calls: list[str] = []

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method == self.where and self.calls.count(method) > self.after:
            raise OSError("it broke")

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._called("start")

    def propose(self, batch: Batch) -> TokenTree:
        self._called("propose")
        return TokenTree.from_pending(batch.pending)

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        self._called("observe")

    def keep(self, batch: Batch, rows: Any) -> None:
        self._called("keep")

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        self._called("join")

    def stop(self) -> None:
        self._called("stop")


def expected_of(model: Any) -> list[list[int]]:
    return [generate_alone(model, prompt, LENGTHS, eos_token_id=None) for prompt in PROMPTS]


class Knowing(ScriptedDrafter):
    """Right where it says something: much of the first text, a token at a time of the others.

    Args:
        texts: what follows the prompts.
    """

    def __init__(self, texts: list[list[int]]) -> None:
        wholes = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
        super().__init__(chain(lambda row, tokens: wholes[row][len(tokens) :][: 1 if row else 6]))
        self.asked = 0

    def propose(self, batch: Batch) -> TokenTree:
        self.asked += 1
        return super().propose(batch)


@pytest.mark.parametrize("where", ["start", "propose", "observe", "keep", "join"])
@pytest.mark.parametrize("first", [True, False])
def test_a_part_that_raises_is_left_out_while_the_others_go_on(where: str, first: bool) -> None:
    """Of three rows the first ends before the second one, and the third takes its place."""
    model = tiny_model()
    expected = expected_of(model)
    good, bad = Knowing(expected), Failing(where, after=where in ("propose", "observe"))
    parts: list[Drafter] = [bad, good] if first else [good, bad]
    decoder = SpecDecoder(model, HybridDrafter(parts, ALWAYS), adaptive=False, max_rows=2)
    with pytest.warns(RuntimeWarning, match=LEFT_OUT) as seen:
        results = decoder.generate(PROMPTS, max_new_tokens=LENGTHS, ignore_eos=True)
    assert [result.token_ids for result in results] == expected
    assert len(seen) == 1
    assert bad.calls[-1] == where, "it is called no more in this call"
    assert decoder.stats.speculation_off is None
    asked = good.asked
    assert asked > bad.calls.count("propose")
    assert decoder.stats.accepted > 0

    bad.where = "nowhere"
    again = decoder.generate(PROMPTS, max_new_tokens=LENGTHS, ignore_eos=True)
    assert [result.token_ids for result in again] == expected
    assert bad.calls[-1] == "stop", "the next call asks it again"
    assert {"start", "propose", "observe", "keep", "join"} <= {*bad.calls}
    assert good.asked > asked


def test_where_all_parts_raised_decoding_is_plain() -> None:
    model = tiny_model()
    one, two = Failing("propose", after=1), Failing("propose", after=2)
    two.name = "failing too"
    drafter = HybridDrafter([one, two], ALWAYS)
    decoder = SpecDecoder(model, drafter, adaptive=False)
    with pytest.warns(RuntimeWarning) as seen:
        results = decoder.generate(PROMPTS, max_new_tokens=LENGTHS, ignore_eos=True)
    assert [result.token_ids for result in results] == expected_of(model)
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 2
    assert messages[0].endswith("part 'failing' raised OSError: it broke; going on with the rest of it")
    assert messages[1].endswith("part 'failing too' raised OSError: it broke; going on without it")
    assert decoder.stats.speculation_off is not None
    assert "part 'failing too' raised OSError: it broke" in decoder.stats.speculation_off


def test_errors_are_raised_where_that_was_asked_for_with_their_cause() -> None:
    decoder = SpecDecoder(
        tiny_model(), HybridDrafter([NgramDrafter(), Failing("propose")], ALWAYS), adaptive=False,
        on_drafter_error="raise",
    )  # fmt: skip
    with pytest.raises(PartError, match="part 'failing' raised OSError: it broke") as raised:
        decoder.generate(PROMPTS, max_new_tokens=LENGTHS)
    assert isinstance(raised.value.__cause__, OSError)


def test_survivors_are_those_that_did_not_raise() -> None:
    batch = make_batch([[5, 6, 7]], 50)
    one, two = Failing("propose"), Failing("propose", after=1)
    two.name = "failing too"
    drafter = HybridDrafter([one, two], ALWAYS)
    for survives in (True, False):
        if survives:
            drafter.start(batch, None)
        with pytest.raises(PartError):
            drafter.propose(batch)
        assert drafter.survivor() is (drafter if survives else None)
    drafter.stop()
    assert drafter.survivor() is drafter, "another call begins with all of them"


class Crooked(Drafter):
    """Proposes trees that are none, or that cannot be merged.

    Args:
        fault: what is wrong with them.
    """

    name = "crooked"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def propose(self, batch: Batch) -> TokenTree:
        size = len(batch)
        parents = torch.tensor([[ROOT, 0]]).expand(size, -1)
        tokens = torch.stack([batch.pending, torch.full_like(batch.pending, 7)], dim=1)
        if self.fault == "token":
            return TokenTree(tokens.index_fill(1, torch.tensor([1]), batch.vocab_size), parents)
        if self.fault == "parent":
            return TokenTree(tokens, torch.tensor([[ROOT, 1]]).expand(size, -1))
        q = torch.zeros(size, 2, batch.vocab_size).log_softmax(-1)
        return TokenTree(tokens, parents, draft_log_probs=q, siblings="with_replacement")


@pytest.mark.parametrize("fault", ["token", "parent", "drawn"])
def test_a_part_whose_trees_cannot_be_merged_is_left_out(fault: str) -> None:
    model = tiny_model()
    expected = expected_of(model)
    decoder = SpecDecoder(model, HybridDrafter([Knowing(expected), Crooked(fault)], ALWAYS), adaptive=False)
    with pytest.warns(RuntimeWarning, match="part 'crooked' raised ValueError: .*; going on with the rest") as seen:
        results = decoder.generate(PROMPTS, max_new_tokens=LENGTHS, ignore_eos=True)
    assert len(seen) == 1
    assert [result.token_ids for result in results] == expected
    assert decoder.stats.accepted > 0


def test_an_error_at_the_end_of_a_call_is_a_warning_and_the_text_is_there() -> None:
    model = tiny_model()
    decoder = SpecDecoder(model, HybridDrafter([NgramDrafter(), Failing("stop")], ALWAYS), adaptive=False)
    with pytest.warns(RuntimeWarning, match=LEFT_OUT):
        results = decoder.generate(PROMPTS, max_new_tokens=LENGTHS, ignore_eos=True)
    assert [result.token_ids for result in results] == expected_of(model)
