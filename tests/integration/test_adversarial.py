"""No drafter, consumer or NaN changes the text of others or leaves the decoder unusable."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from integration.architectures import VOCAB, generate_alone, tiny_model
from integration.scripted import Propose, ScriptedDrafter, bush, chain, empty, oracle, per_row, star
from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.registry import create_drafter
from specdec.target import HFTarget
from specdec.tree import ROOT, TokenTree
from specdec.verifiers.rejection import RejectionVerifier

PROMPT = [5, 6, 7, 8, 5, 6]
OTHER = [9, 10]
LENGTH = 24


class WordTokenizer:
    """Token k is the text ``<k>``, so that stop strings may span tokens."""

    chat_template = None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"<{token}>" for token in ids)


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model())


@pytest.fixture(scope="module")
def reference(target: HFTarget) -> list[int]:
    tokens: list[int] = SpecDecoder(target, "none").generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids
    assert tokens == generate_alone(target.model, PROMPT, LENGTH, eos_token_id=None)
    return tokens


@pytest.fixture(scope="module")
def other(target: HFTarget) -> list[int]:
    tokens: list[int] = SpecDecoder(target, "none").generate(OTHER, max_new_tokens=LENGTH, ignore_eos=True).token_ids
    return tokens


@pytest.fixture(scope="module")
def wholes(reference: list[int], other: list[int]) -> list[list[int]]:
    return [PROMPT + reference, OTHER + other]


def decoder_for(target: HFTarget, propose: Propose, **options: Any) -> SpecDecoder:
    fixed: dict[str, Any] = {"on_drafter_error": "raise", "adaptive": False}  # every tree counts here
    return SpecDecoder(target, ScriptedDrafter(propose), **fixed, **options)


def run(target: HFTarget, propose: Propose, **fields: Any) -> Any:
    return decoder_for(target, propose).generate(PROMPT, **{"max_new_tokens": LENGTH, "ignore_eos": True, **fields})


# What is drafted


def test_always_right_is_always_accepted(target: HFTarget, wholes: list[list[int]], reference: list[int]) -> None:
    result = run(target, oracle(wholes, depth=6))
    assert result.token_ids == reference
    assert result.stats.passes == -(-LENGTH // 7)
    assert result.stats.accepted == result.stats.drafted == LENGTH - result.stats.passes


def test_always_wrong_costs_passes_and_nothing_else(
    target: HFTarget, wholes: list[list[int]], reference: list[int]
) -> None:
    wrong = chain(lambda index, tokens: [(t + 1) % VOCAB for t in wholes[index][len(tokens) :][:6]])
    result = run(target, wrong)
    assert result.token_ids == reference
    assert (result.stats.accepted, result.stats.passes) == (0, LENGTH)
    assert result.stats.drafted > LENGTH


def test_empty_trees_are_plain_decoding(target: HFTarget, reference: list[int]) -> None:
    result = run(target, empty)
    assert (result.token_ids, result.stats.drafted, result.stats.passes) == (reference, 0, LENGTH)


def test_the_whole_vocabulary_under_one_node_accepts_one_token_a_pass(target: HFTarget, reference: list[int]) -> None:
    result = run(target, star)
    assert (result.token_ids, result.stats.passes) == (reference, LENGTH // 2)


def test_a_chain_longer_than_what_is_left_is_cut(
    target: HFTarget, wholes: list[list[int]], reference: list[int]
) -> None:
    result = run(target, chain(lambda index, tokens: (wholes[index][len(tokens) :] * 30)[:400]))
    assert (result.token_ids, result.stats.passes) == (reference, 1)
    assert result.stats.drafted == LENGTH - 1


def test_the_right_path_among_decoys_is_found(
    target: HFTarget, wholes: list[list[int]], reference: list[int], other: list[int]
) -> None:
    results = decoder_for(target, bush(wholes, VOCAB)).generate([PROMPT, OTHER], max_new_tokens=LENGTH, ignore_eos=True)
    assert [r.token_ids for r in results] == [reference, other]
    assert all(r.stats.accepted > LENGTH // 3 for r in results)


def test_the_same_child_twice_is_accepted_once(target: HFTarget, wholes: list[list[int]], reference: list[int]) -> None:
    def twins(batch: Batch) -> TokenTree:
        row = batch.rows[0]
        token = wholes[0][len(row.tokens) : len(row.tokens) + 1] or [0]
        return TokenTree(torch.tensor([[row.pending, *token, *token]]), torch.tensor([[ROOT, 0, 0]]))

    result = run(target, twins)
    assert (result.token_ids, result.stats.passes) == (reference, LENGTH // 2)


def virtual_tree(plain: TokenTree, hung_on: Sequence[int], width: int, seed: int) -> TokenTree:
    """The tree with virtual nodes of random embeddings appended, and a right-looking token below the last of them."""
    size, count = plain.batch_size, len(hung_on)
    tokens = torch.cat([plain.tokens, torch.full((size, count), -5)], dim=1)
    parents = torch.cat([plain.parents, torch.tensor([list(hung_on)] * size)], dim=1)
    virtual = torch.arange(tokens.shape[1]).expand(size, -1) >= plain.num_nodes
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3.0 * torch.randn(size, tokens.shape[1], width, generator=generator)
    return TokenTree(tokens, parents, virtual=virtual, embeddings=embeddings)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 4}], ids=["greedy", "sampled"])
def test_virtual_nodes_change_nothing(target: HFTarget, wholes: list[list[int]], settings: dict[str, Any]) -> None:
    """Hung on the root, on a node in the middle, on the last node and on each other."""
    expected = run(target, empty, **settings).token_ids
    known = [PROMPT + expected]
    width = target.model.config.hidden_size

    def propose(batch: Batch) -> TokenTree:
        plain = oracle(known, depth=5)(batch)
        last = plain.num_nodes - 1
        return virtual_tree(plain, [0, last // 2, last, last + 1, last + 3], width, seed=len(batch.rows[0].tokens))

    result = run(target, propose, **settings)
    assert result.token_ids == expected
    assert result.stats.passes == -(-LENGTH // 6)
    assert result.stats.drafted == result.stats.accepted  # virtual nodes are not counted as drafts


def test_tokens_below_a_virtual_node_are_never_accepted(
    target: HFTarget, wholes: list[list[int]], reference: list[int]
) -> None:
    width = target.model.config.hidden_size

    def propose(batch: Batch) -> TokenTree:
        row = batch.rows[0]
        token = (wholes[0][len(row.tokens) :] or [0])[0]
        virtual, embeddings = torch.tensor([[False, True, False]]), torch.zeros(1, 3, width)
        tokens, parents = torch.tensor([[row.pending, 0, token]]), torch.tensor([[ROOT, 0, 1]])
        return TokenTree(tokens, parents, virtual=virtual, embeddings=embeddings)

    result = run(target, propose)
    assert (result.token_ids, result.stats.accepted) == (reference, 0)


# Drafters that fail


@pytest.mark.parametrize("from_call", [1, 2])
@pytest.mark.parametrize("method", ["start", "propose", "observe", "keep", "stop"])
def test_a_raising_drafter_is_switched_off_with_a_warning(
    target: HFTarget, wholes: list[list[int]], reference: list[int], other: list[int], method: str, from_call: int
) -> None:
    prompts = [PROMPT, OTHER, [30]]
    known = [*wholes, [30]]  # rows end at different steps, so keep is called more than once

    def raising() -> ScriptedDrafter:
        return ScriptedDrafter(oracle(known), raise_in=method, from_call=from_call)

    warned = SpecDecoder(target, raising())
    strict = SpecDecoder(target, raising(), on_drafter_error="raise")
    if from_call == 2 and method in ("start", "stop"):  # once a call
        warned.generate(prompts, max_new_tokens=2)
        strict.generate(prompts, max_new_tokens=2)
    with pytest.warns(RuntimeWarning, match=f"drafter 'scripted' raised RuntimeError: planted in {method}"):
        results = warned.generate(prompts, max_new_tokens=LENGTH, ignore_eos=True)
    assert [r.token_ids for r in results[:2]] == [reference, other]
    for counted in (warned.stats, results[0].stats):
        assert f"planted in {method}" in (counted.speculation_off or "")
    with pytest.raises(RuntimeError, match=f"^planted in {method}$"):
        strict.generate(prompts, max_new_tokens=LENGTH, ignore_eos=True)


def test_the_first_failure_is_the_one_reported(target: HFTarget, wholes: list[list[int]], reference: list[int]) -> None:
    class Twice(ScriptedDrafter):
        def stop(self) -> None:
            raise RuntimeError("planted in stop")

    with pytest.warns(RuntimeWarning, match="planted in"):
        result = SpecDecoder(target, Twice(oracle(wholes), raise_in="observe")).generate(
            PROMPT, max_new_tokens=LENGTH, ignore_eos=True
        )
    assert result.token_ids == reference
    assert "planted in observe" in (result.stats.speculation_off or "")


def test_speculation_is_on_again_in_the_next_call(
    target: HFTarget, wholes: list[list[int]], reference: list[int]
) -> None:
    class Once(ScriptedDrafter):
        def observe(self, *_: Any) -> None:
            self._left -= 1
            if self._left == 0:
                raise RuntimeError("planted once")

    decoder = SpecDecoder(target, Once(oracle(wholes), from_call=2))
    with pytest.warns(RuntimeWarning, match="planted once"):
        decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    result = decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    assert (result.token_ids, result.stats.speculation_off) == (reference, None)
    assert result.stats.passes == -(-LENGTH // 7)


def _tree(batch: Batch, tokens: list[int], parents: list[int], **fields: Any) -> TokenTree:
    first = batch.pending.unsqueeze(1)
    return TokenTree(
        torch.cat([first, torch.tensor([tokens] * len(batch), dtype=first.dtype).view(len(batch), -1)], dim=1),
        torch.tensor([[ROOT, *parents]] * len(batch)),
        **fields,
    )


def _virtual(batch: Batch, mask: list[bool], shape: tuple[int, ...]) -> TokenTree:
    return _tree(batch, [1], [0], virtual=torch.tensor([mask]), embeddings=torch.zeros(1, *shape))


MALFORMED: dict[str, tuple[Propose, str]] = {
    "beyond the vocabulary": (chain(lambda *_: [VOCAB]), f"token {VOCAB}, outside the vocabulary of {VOCAB}"),
    "negative": (chain(lambda *_: [-3]), "token -3, outside"),
    "wrong root": (lambda b: TokenTree.from_pending((b.pending + 1) % VOCAB), "pending tokens"),
    "two rows for one": (lambda b: TokenTree.from_pending(b.pending.repeat(2)), "one tree per row"),
    "own parent": (lambda b: _tree(b, [1], [1]), "node 1 has parent 1"),
    "child before its parent": (lambda b: _tree(b, [1, 2], [2, 0]), "node 1 has parent 2"),
    "two roots": (lambda b: _tree(b, [1], [ROOT]), "node 1 has parent -1"),
    "child of padding": (lambda b: _tree(b, [1, 2], [-2, 1]), "hangs on padding"),
    "no such parent": (lambda b: _tree(b, [1], [-7]), "node 1 has parent -7"),
    "virtual root": (lambda b: _virtual(b, [True, False], (2, 64)), "cannot be virtual"),
    "too few embeddings": (lambda b: _virtual(b, [False, True], (1, 64)), "virtual and embeddings"),
    "floating tokens": (
        lambda b: TokenTree(b.pending.unsqueeze(1).float(), b.pending.new_full((1, 1), ROOT)),
        "must be int64",
    ),
    "not a tree": (lambda _: [1, 2, 3], "AttributeError"),  # type: ignore[dict-item, return-value]
    "nothing": (lambda _: None, "AttributeError"),  # type: ignore[dict-item, return-value]
    "draft probabilities of another vocabulary": (
        lambda b: _tree(b, [1], [0], draft_log_probs=torch.zeros(1, 2, 5), siblings="with_replacement"),
        "draft_log_probs must be",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_tree_switches_the_drafter_off(target: HFTarget, reference: list[int], name: str) -> None:
    propose, message = MALFORMED[name]
    with pytest.warns(RuntimeWarning, match=message):
        result = SpecDecoder(target, ScriptedDrafter(propose)).generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    assert result.token_ids == reference
    assert "drafter 'scripted' raised" in (result.stats.speculation_off or "")


def test_malformed_draft_probabilities_do_not_reach_the_rejection_policy(target: HFTarget) -> None:
    propose, message = MALFORMED["draft probabilities of another vocabulary"]
    decoder = SpecDecoder(target, ScriptedDrafter(propose), verifier=RejectionVerifier())
    with pytest.warns(RuntimeWarning, match=message):
        result = decoder.generate(PROMPT, max_new_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
    assert len(result.token_ids) == 5


# Where a text ends


def test_end_of_sequence_inside_an_accepted_path_ends_the_text_there(
    target: HFTarget, wholes: list[list[int]], reference: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = next(i for i in range(3, LENGTH) if i % 7 not in (0, 6) and reference[i] not in reference[:i])
    monkeypatch.setattr(HFTarget, "eos_token_ids", frozenset({reference[end], VOCAB + 1}))
    result = run(target, oracle(wholes), ignore_eos=False)
    assert (result.token_ids, result.finish_reason) == (reference[: end + 1], "eos")
    assert result.stats.emitted == end + 1


def test_a_stop_token_inside_an_accepted_path_ends_the_text_there(
    target: HFTarget, wholes: list[list[int]], reference: list[int]
) -> None:
    end = next(i for i in range(3, LENGTH) if i % 7 not in (0, 6) and reference[i] not in reference[:i])
    result = run(target, oracle(wholes), stop_token_ids=[VOCAB - 1, reference[end]])
    assert (result.token_ids, result.finish_reason) == (reference[: end + 1], "stop")


@pytest.mark.parametrize("propose_depth", [0, 2, 6, 20])
def test_a_stop_string_across_an_accepted_path_cuts_the_text(
    target: HFTarget, wholes: list[list[int]], reference: list[int], propose_depth: int
) -> None:
    texts = [f"<{token}>" for token in reference]
    end = next(i for i in range(4, LENGTH) if "".join(texts[:i]).find(texts[i - 1][1:] + texts[i][:2]) < 0)
    stop = texts[end - 1][1:] + texts[end][:2]  # begins within one token and ends within the next
    decoder = decoder_for(target, oracle(wholes, propose_depth), tokenizer=WordTokenizer())
    options: dict[str, Any] = {"max_new_tokens": LENGTH, "ignore_eos": True, "stop": ["never", stop]}
    result = decoder.generate(PROMPT, **options)
    assert (result.token_ids, result.finish_reason) == (reference[: end + 1], "stop")
    assert result.text == "".join(texts)[: "".join(texts).index(stop)]
    with decoder.stream(PROMPT, **options) as stream:
        assert "".join(str(piece) for piece in stream) == result.text


@pytest.mark.parametrize("max_new_tokens", [1, 2, 6, 7, 8, 20])
def test_the_budget_is_met_exactly_in_the_middle_of_a_path(
    target: HFTarget, wholes: list[list[int]], reference: list[int], max_new_tokens: int
) -> None:
    for propose in (oracle(wholes), bush(wholes, VOCAB), star):
        result = run(target, propose, max_new_tokens=max_new_tokens)
        assert (result.token_ids, result.finish_reason) == (reference[:max_new_tokens], "length")
        assert result.stats.emitted == max_new_tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_a_text_ends_where_the_context_does_in_the_middle_of_a_path(architecture: str) -> None:
    sizes = {"max_position_embeddings": 16}
    if architecture == "gpt2":
        sizes["n_positions"] = 16
    target = HFTarget(tiny_model(architecture, **sizes))
    prompts = [[3, 4, 5] * 4, [7], [8] * 15]
    plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=50, ignore_eos=True)
    known = [prompt + result.token_ids for prompt, result in zip(prompts, plain, strict=True)]
    for propose in (
        chain(lambda index, tokens: (known[index][len(tokens) :] + [1] * 40)[:30]),
        bush(known, VOCAB),
        star,
    ):
        results = decoder_for(target, propose).generate(prompts, max_new_tokens=50, ignore_eos=True)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert [(len(r.token_ids), r.finish_reason) for r in results] == [
            (4, "context"),
            (15, "context"),
            (1, "context"),
        ]


def test_rows_that_end_at_different_steps_leave_the_others_alone(target: HFTarget) -> None:
    prompts = [PROMPT, [9], [30, 31, 32], PROMPT[:3]]
    alone = [SpecDecoder(target, "none").generate(p, max_new_tokens=30).token_ids for p in prompts]
    stop = alone[1][2]
    expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in alone]
    assert len({len(tokens) for tokens in expected}) > 1
    known = [prompt + tokens for prompt, tokens in zip(prompts, alone, strict=True)]
    uneven = per_row(lambda builder, index, tokens: builder.add_path(known[index][len(tokens) :][: 2 * index]))
    drafters = [create_drafter("ngram"), create_drafter("suffix"), create_drafter("recycling")]
    for drafter in [*drafters, ScriptedDrafter(uneven), ScriptedDrafter(bush(known, VOCAB))]:
        decoder = SpecDecoder(target, drafter, on_drafter_error="raise")
        batched = decoder.generate(prompts, max_new_tokens=30, stop_token_ids=[stop])
        assert [result.token_ids for result in batched] == expected, drafter.name


# Consumers that stop listening


@pytest.mark.parametrize("name", ["none", "ngram", "suffix", "recycling"])
def test_a_closed_stream_leaves_the_decoder_usable(target: HFTarget, reference: list[int], name: str) -> None:
    decoder = SpecDecoder(target, name, on_drafter_error="raise")
    for taken in (0, 1, 2, 5):
        with decoder.stream([PROMPT, OTHER], max_new_tokens=LENGTH, ignore_eos=True) as stream:
            pieces = [next(stream) for _ in range(taken)]
        result = stream.results[0]
        assert result.finish_reason == "cancelled"
        assert result.token_ids == reference[: len(result.token_ids)]
        streamed = [piece.token_id for piece in pieces if piece.index == 0]
        assert streamed == result.token_ids[: len(streamed)]
        assert list(stream) == []
        assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference


def test_an_exception_in_the_consumer_leaves_the_decoder_usable(target: HFTarget, reference: list[int]) -> None:
    decoder = SpecDecoder(target, "suffix", on_drafter_error="raise")

    def consume(within: bool) -> None:
        stream = decoder.stream(PROMPT, max_new_tokens=LENGTH)
        if within:
            with stream:
                raise KeyError(f"the consumer's own, at {next(stream)}")
        for piece in stream:
            raise KeyError(f"the consumer's own, at {piece}")

    for within in (True, False):
        with pytest.raises(KeyError):
            consume(within)
        assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference


def test_a_dropped_stream_leaves_the_decoder_usable(target: HFTarget, reference: list[int]) -> None:
    decoder = SpecDecoder(target, "suffix", on_drafter_error="raise")
    dropped = decoder.stream(PROMPT, max_new_tokens=LENGTH)
    next(dropped)
    del dropped
    gc.collect()
    assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference


def test_a_stream_never_started_leaves_the_decoder_usable(target: HFTarget, reference: list[int]) -> None:
    decoder = SpecDecoder(target, "recycling", on_drafter_error="raise")
    decoder.stream(PROMPT, max_new_tokens=LENGTH).close()
    assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference


@pytest.mark.parametrize("name", ["none", "ngram", "suffix", "recycling"])
def test_a_second_stream_ends_the_first_and_neither_text_is_wrong(
    target: HFTarget, reference: list[int], other: list[int], name: str
) -> None:
    """A drafter keeps the state of one generation, so a decoder runs one at a time."""
    decoder = SpecDecoder(target, name, on_drafter_error="raise")
    first = decoder.stream(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    taken = [next(first).token_id for _ in range(3)]
    second = decoder.stream(OTHER, max_new_tokens=LENGTH, ignore_eos=True)
    assert [piece.token_id for piece in second] == second.result.token_ids == other
    assert (list(first), first.result.finish_reason) == ([], "cancelled")
    assert first.result.token_ids[:3] == taken
    assert first.result.token_ids == reference[: len(first.result.token_ids)]


# NaN


class Poisoned:
    """Replaces a model's forward; puts NaN where a test says.

    Args:
        at: pass over trees, counted from 1.
        row: row of the batch.
        node: column of the tree, None for all.
    """

    def __init__(self, model: Any, at: int, row: int, node: int | None = None) -> None:
        self._forward, self._at, self._row, self._node = model.forward, at, row, node
        self.passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(*args, **kwargs)
        if "logits_to_keep" not in kwargs:  # a tree pass, not prefill
            self.passes += 1
            if self.passes == self._at:
                out.logits[self._row, slice(None) if self._node is None else self._node] = float("nan")
        return out


def poisoned_target(at: int, row: int, node: int | None = None) -> HFTarget:
    model = tiny_model()
    target = HFTarget(model)
    model.forward = Poisoned(model, at, row, node)
    return target


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 2, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("verifier", ["auto", "rejection", "typical"])
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_nan_logits_end_their_row_with_the_step_and_spare_the_others(
    target: HFTarget, settings: dict[str, Any], verifier: str, drafter: str
) -> None:
    fields: dict[str, Any] = {"max_new_tokens": LENGTH, "ignore_eos": True, **settings}
    prompts = [PROMPT, OTHER, [30]]
    expected, broken = (
        SpecDecoder(each, drafter, verifier=verifier, adaptive=False).generate(prompts, **fields)
        for each in (target, poisoned_target(at=4, row=1))
    )
    for index in (0, 2):
        assert (broken[index].token_ids, broken[index].error) == (expected[index].token_ids, None)
    assert broken[1].finish_reason == "error"
    assert "NaN logits at step 4" in broken[1].error
    assert 3 <= len(broken[1].token_ids) < LENGTH
    assert broken[1].token_ids == expected[1].token_ids[: len(broken[1].token_ids)]


def test_nan_at_a_node_nobody_reaches_is_ignored(
    target: HFTarget, wholes: list[list[int]], reference: list[int]
) -> None:
    def decoy_first(builder: Any, index: int, tokens: list[int]) -> None:
        right = wholes[index][len(tokens) :][:3]
        builder.add(0, (right[0] + 1) % VOCAB if right else 0)
        builder.add_path(right)

    result = run(poisoned_target(at=2, row=0, node=1), per_row(decoy_first))
    assert (result.token_ids, result.finish_reason) == (reference, "length")


def test_nan_in_the_middle_of_a_path_keeps_the_text_of_the_steps_before(
    wholes: list[list[int]], reference: list[int]
) -> None:
    result = run(poisoned_target(at=2, row=0, node=3), oracle(wholes, depth=6))
    assert result.finish_reason == "error"
    assert "step 2" in result.error
    assert len(result.token_ids) >= 7
    assert result.token_ids == reference[: len(result.token_ids)]


def test_an_exception_in_the_target_leaves_the_decoder_usable(
    target: HFTarget, reference: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SpecDecoder(target, "suffix", on_drafter_error="raise")
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise MemoryError("planted")

        patch.setattr(target, "forward", fail)
        with pytest.raises(MemoryError, match="planted"):
            decoder.generate(PROMPT, max_new_tokens=LENGTH)
    assert decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).token_ids == reference
    assert target.model.config._attn_implementation == "sdpa"
