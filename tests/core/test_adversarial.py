"""No drafter, however bad, changes the text or breaks the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import VOCAB, random_model

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.target import HFTarget
from specdec.tree import ROOT, TokenTree, TreeBuilder

PROMPT = [5, 6, 7, 8, 5, 6]
LENGTH = 24


@dataclass(frozen=True)
class NoOptions:
    """None."""


class ScriptedDrafter(Drafter):
    """Proposes what a function of the batch returns; raises in one method if told to."""

    name = "scripted"
    Config = NoOptions

    def __init__(self, propose: Callable[[Batch], TokenTree], raise_in: str = "") -> None:
        self._function = propose
        self._raise_in = raise_in

    def _maybe_raise(self, where: str) -> None:
        if where == self._raise_in:
            raise RuntimeError(f"planted in {where}")

    def start(self, *_: Any) -> None:
        self._maybe_raise("start")

    def propose(self, batch: Batch) -> TokenTree:
        self._maybe_raise("propose")
        return self._function(batch)

    def observe(self, *_: Any) -> None:
        self._maybe_raise("observe")

    def keep(self, *_: Any) -> None:
        self._maybe_raise("keep")


def paths(path: Callable[[list[int]], list[int]], max_nodes: int = 200) -> Callable[[Batch], TokenTree]:
    """Trees of one path each, a function of the row's tokens."""

    def propose(batch: Batch) -> TokenTree:
        builders = []
        for row in batch.rows:
            builder = TreeBuilder(row.pending, max_nodes)
            builder.add_path(path(row.tokens))
            builders.append(builder)
        return TokenTree.from_rows(builders)

    return propose


def star(batch: Batch) -> TokenTree:
    """Every token of the vocabulary under the root."""
    tokens = torch.cat([batch.pending.unsqueeze(1), torch.arange(VOCAB).expand(len(batch), -1)], dim=1)
    parents = torch.zeros_like(tokens)
    parents[:, 0] = ROOT
    return TokenTree(tokens, parents)


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(random_model())


@pytest.fixture(scope="module")
def reference(target: HFTarget) -> list[int]:
    tokens: list[int] = SpecDecoder(target, "none").generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids
    return tokens


def oracle(reference: list[int]) -> Callable[[Batch], TokenTree]:
    """Always right."""
    return paths(lambda tokens: reference[len(tokens) - len(PROMPT) :][:6])


def wrong(reference: list[int]) -> Callable[[Batch], TokenTree]:
    """Never right."""
    return paths(lambda tokens: [(t + 1) % VOCAB for t in reference[len(tokens) - len(PROMPT) :][:6]])


def run(target: HFTarget, propose: Callable[[Batch], TokenTree], **fields: Any) -> Any:
    decoder = SpecDecoder(target, ScriptedDrafter(propose), on_drafter_error="raise")
    return decoder.generate(PROMPT, **{"max_new_tokens": LENGTH, "ignore_eos": True, **fields})


def test_a_drafter_that_is_always_right_is_always_accepted(target: HFTarget, reference: list[int]) -> None:
    result = run(target, oracle(reference))
    assert result.token_ids == reference
    assert result.stats.passes == -(-LENGTH // 7)
    assert result.stats.accepted == result.stats.drafted == LENGTH - result.stats.passes


def test_a_drafter_that_is_always_wrong_costs_passes_and_nothing_else(target: HFTarget, reference: list[int]) -> None:
    result = run(target, wrong(reference))
    assert result.token_ids == reference
    assert (result.stats.accepted, result.stats.passes) == (0, LENGTH)


def test_empty_trees_are_plain_decoding(target: HFTarget, reference: list[int]) -> None:
    result = run(target, lambda batch: TokenTree.from_pending(batch.pending))
    assert result.token_ids == reference


def test_the_whole_vocabulary_under_one_node_accepts_one_token_a_pass(target: HFTarget, reference: list[int]) -> None:
    result = run(target, star)
    assert result.token_ids == reference
    assert result.stats.passes == LENGTH // 2


def test_a_chain_longer_than_what_is_left_is_cut(target: HFTarget, reference: list[int]) -> None:
    result = run(target, paths(lambda tokens: (reference * 9)[len(tokens) - len(PROMPT) :][:150]))
    assert result.token_ids == reference
    assert result.stats.passes == 1


@pytest.mark.parametrize("method", ["start", "propose", "observe", "keep"])
def test_a_raising_drafter_is_switched_off_with_a_warning(target: HFTarget, reference: list[int], method: str) -> None:
    decoder = SpecDecoder(target, ScriptedDrafter(oracle(reference), raise_in=method))
    with pytest.warns(RuntimeWarning, match=f"planted in {method}"):
        results = decoder.generate([PROMPT, PROMPT[:2]], max_new_tokens=LENGTH, ignore_eos=True)
    assert results[0].token_ids == reference
    assert f"planted in {method}" in (results[0].stats.speculation_off or "")
    strict = SpecDecoder(target, ScriptedDrafter(oracle(reference), raise_in=method), on_drafter_error="raise")
    with pytest.raises(RuntimeError, match=f"planted in {method}"):
        strict.generate(PROMPT, max_new_tokens=LENGTH)


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (paths(lambda _: [VOCAB]), f"token {VOCAB}, outside the vocabulary of {VOCAB}"),
        (paths(lambda _: [-3]), "token -3, outside"),
        (lambda batch: TokenTree.from_pending(batch.pending + 1), "pending tokens"),
        (lambda batch: TokenTree.from_pending(batch.pending.repeat(2)), "one tree per row"),
        (
            lambda b: TokenTree(b.pending.view(1, 1).repeat(1, 2), torch.tensor([[ROOT, 1]])),
            "node 1 has parent 1",
        ),
    ],
)
def test_malformed_trees_switch_the_drafter_off(
    target: HFTarget, reference: list[int], propose: Callable[[Batch], TokenTree], message: str
) -> None:
    decoder = SpecDecoder(target, ScriptedDrafter(propose))
    with pytest.warns(RuntimeWarning, match=message):
        assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference


def test_virtual_nodes_are_attended_to_but_never_accepted(target: HFTarget, reference: list[int]) -> None:
    def propose(batch: Batch) -> TokenTree:
        plain = oracle(reference)(batch)
        width = target.model.config.hidden_size
        tokens = torch.cat([plain.tokens, plain.tokens[:, -1:]], dim=1)
        parents = torch.cat([plain.parents, torch.full((1, 1), plain.num_nodes - 1)], dim=1)
        virtual = torch.zeros_like(tokens, dtype=torch.bool)
        virtual[:, -1] = True
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(1, tokens.shape[1], width, generator=generator)
        return TokenTree(tokens, parents, virtual=virtual, embeddings=embeddings)

    result = run(target, propose)
    assert result.token_ids == reference
    assert result.stats.passes == -(-LENGTH // 7)


def test_end_of_sequence_inside_an_accepted_path_ends_the_text_there(
    target: HFTarget, reference: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = next(i for i in range(3, LENGTH) if reference[i] not in reference[:i])
    monkeypatch.setattr(HFTarget, "eos_token_ids", frozenset({reference[end]}))
    result = run(target, oracle(reference), ignore_eos=False)
    assert (result.token_ids, result.finish_reason) == (reference[: end + 1], "eos")
    result = run(target, oracle(reference), ignore_eos=True, stop_token_ids=[reference[end]])
    assert (result.token_ids, result.finish_reason) == (reference[: end + 1], "stop")


@pytest.mark.parametrize("max_new_tokens", [1, 2, 6, 7, 8, 20])
def test_the_budget_is_met_exactly_in_the_middle_of_a_path(
    target: HFTarget, reference: list[int], max_new_tokens: int
) -> None:
    result = run(target, oracle(reference), max_new_tokens=max_new_tokens)
    assert (result.token_ids, result.finish_reason) == (reference[:max_new_tokens], "length")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_text_ends_where_the_context_does(architecture: str) -> None:
    sizes = {"max_position_embeddings": 16, "n_positions": 16 if architecture == "gpt2" else None}
    decoder = SpecDecoder(random_model(architecture, **sizes), "recycling", on_drafter_error="raise")
    results = decoder.generate([[3, 4, 5] * 4, [7]], max_new_tokens=50, ignore_eos=True)
    assert [(len(r.token_ids), r.finish_reason) for r in results] == [(4, "context"), (15, "context")]


def test_rows_that_end_at_different_steps_leave_the_others_alone(target: HFTarget) -> None:
    decoder = SpecDecoder(target, "recycling", on_drafter_error="raise")
    prompts = [PROMPT, [9], [30, 31, 32]]
    alone = [decoder.generate(p, max_new_tokens=30).token_ids for p in prompts]
    stop = alone[1][2]
    expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in alone]
    assert len({len(tokens) for tokens in expected}) > 1
    batched = decoder.generate(prompts, max_new_tokens=30, stop_token_ids=[stop])
    assert [result.token_ids for result in batched] == expected


def test_a_closed_stream_leaves_the_decoder_usable(target: HFTarget, reference: list[int]) -> None:
    decoder = SpecDecoder(target, "suffix", on_drafter_error="raise")
    with decoder.stream(PROMPT, max_new_tokens=LENGTH, ignore_eos=True) as stream:
        first = next(stream)
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids[0] == first.token_id == reference[0]
    def fail_on_the_first_piece() -> None:
        with decoder.stream(PROMPT, max_new_tokens=LENGTH) as stream:
            raise KeyError(f"the consumer's own, at {next(stream)}")

    with pytest.raises(KeyError):
        fail_on_the_first_piece()
    dropped = decoder.stream(PROMPT, max_new_tokens=LENGTH)
    next(dropped)
    del dropped
    assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference


def test_nan_logits_end_their_row_with_the_step_and_spare_the_others(reference: list[int]) -> None:
    model = random_model()
    forward, calls = model.forward, 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        out = forward(*args, **kwargs)
        if "logits_to_keep" not in kwargs:  # a tree pass, not prefill
            calls += 1
            if calls == 4:
                out.logits[1] = float("nan")
        return out

    target = HFTarget(model)
    model.forward = poisoned
    results = SpecDecoder(target, "none").generate([PROMPT, [9, 10]], max_new_tokens=LENGTH, ignore_eos=True)
    assert results[0].token_ids == reference
    assert results[1].finish_reason == "error"
    assert "step 4" in (results[1].error or "")
    assert len(results[1].token_ids) == 3


def test_a_new_generation_ends_one_still_open(target: HFTarget, reference: list[int]) -> None:
    decoder = SpecDecoder(target, "ngram", on_drafter_error="raise")
    older = decoder.stream(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    next(older)
    assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference
    assert list(older) == []
    assert older.result.finish_reason == "cancelled"
