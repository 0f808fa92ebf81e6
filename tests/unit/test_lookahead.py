"""Lookahead: what its window sees, what the pool makes of it, and that neither text nor cache knows of the window."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integration.architectures import tiny_model
from torch import nn
from unit_rows import make_batch, make_row

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.lookahead import LookaheadConfig, LookaheadDrafter, NgramPool, Window
from specdec.kv_cache import KVCache
from specdec.latency import LatencyCurve
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

PROMPTS = [[5, 6, 7, 8, 9] * 3, [30, 31], [9, 10, 11, 9, 10, 11, 9]]
VOCAB = 12
# Float64 rounding, 1e-16, of sums of some hundred products, through a few layers, of entries of order 10.
TOLERANCE = 1e-9


# The pool


def test_the_pool_keeps_the_most_recent_ngrams_of_a_token_the_newest_first() -> None:
    pool = NgramPool(tokens=9, kept=2)
    for ngram in ([1, 2, 3], [1, 4, 5], [2, 0, 0], [1, 2, 3], [1, 6, 7]):
        pool.add(ngram)

    assert pool.after(1) == [(6, 7), (2, 3)]  # (2, 3) was seen again after (4, 5)
    assert pool.after(2) == [(0, 0)]
    assert pool.after(3) == []


def test_the_pool_forgets_the_first_token_used_longest_ago() -> None:
    pool = NgramPool(tokens=2, kept=2)
    pool.add([1, 10])
    pool.add([2, 20])
    assert pool.after(1) == [(10,)]  # used
    pool.add([3, 30])
    assert [pool.after(token) for token in (1, 2, 3)] == [[(10,)], [], [(30,)]]
    pool.add([1, 11])  # used
    pool.add([4, 40])
    assert [pool.after(token) for token in (1, 3, 4)] == [[(11,), (10,)], [], [(40,)]]


def test_what_a_pool_forgot_costs_drafts_and_no_text() -> None:
    target = scripted_target(period=9)
    options = {"window": 2, "ngram": 3, "candidates": 1, "pool": 1, "text": True}
    small = count_from(target, "lookahead", [0], 60, drafter_options=options).stats
    large = count_from(target, "lookahead", [0], 60, drafter_options={**options, "pool": 64}).stats
    assert small.accepted < large.accepted


# The window


def test_first_guesses_are_tokens_of_the_prompt_and_depend_on_it_alone() -> None:
    prompt = [*range(20, 40)]
    levels = Window(prompt, width=8, num_levels=3).levels

    assert set(levels[0]) <= set(prompt)
    assert len(set(levels[0])) > 1
    torch.manual_seed(1)
    assert Window(prompt, width=8, num_levels=3).levels == levels
    assert Window([*prompt, 40], width=8, num_levels=3).levels != levels


def test_a_window_grows_a_level_per_pass_then_drops_the_lowest_and_yields_ngrams() -> None:
    window = Window([9], width=3, num_levels=2)
    assert window.levels == [[9, 9, 9, 9]]
    # After the root and the guesses at the next positions the target predicts 1, 2, 3 and 4; 1 is the next root.
    assert window.advance(9, [1, 2, 3, 4]) == []
    assert window.levels == [[9, 9, 9], [2, 3, 4]]
    assert window.advance(1, [4, 5, 6]) == [[1, 2, 4], [9, 3, 5], [9, 4, 6]]
    assert window.levels == [[2, 3, 4], [4, 5, 6]]
    assert window.advance(7, [8, 0]) == [[7, 4, 8], [3, 5, 0]]  # the last column was no part of the pass
    assert window.levels == [[4, 5, 4], [8, 0, 6]]


def test_columns_that_were_no_part_of_a_growing_windows_pass_get_tokens_of_the_prompt() -> None:
    window = Window([9], width=3, num_levels=2)
    window.advance(9, [1, 2])
    assert window.levels == [[9, 9, 9], [2, 9, 9]]


def test_windows_of_bigrams_have_one_level() -> None:
    window = Window([9], width=2, num_levels=1)
    assert window.advance(3, [4, 5]) == [[3, 4], [9, 5]]
    assert window.levels == [[4, 5]]


# The tree


def proposing(*rows: list[int], **options: Any) -> tuple[LookaheadDrafter, Batch]:
    """A drafter at the start of a generation."""
    batch = make_batch(list(rows), VOCAB)
    drafter = LookaheadDrafter(LookaheadConfig(**options))
    bound(drafter)
    drafter.start(batch, None)
    return drafter, batch


def bound(drafter: LookaheadDrafter) -> None:
    table = nn.Embedding(VOCAB, 2)
    target: Any = SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: table))
    drafter.bind(target, None)


def predict(drafter: LookaheadDrafter, batch: Batch, tree: TokenTree, successor: Sequence[int]) -> None:
    """Show the drafter a pass of a target that predicts a function of the token at hand; nothing is emitted."""
    tokens = torch.tensor(successor)[tree.tokens]
    logits = torch.nn.functional.one_hot(tokens, VOCAB).float()
    verdict: Any = None
    drafter.observe(batch, tree, TargetOutput(logits), verdict)


def test_the_window_hangs_below_the_root_as_in_figure_5() -> None:
    drafter, batch = proposing([7, 1], window=3, ngram=4, text=False)
    successor = [*range(1, VOCAB), 0]
    for _ in range(2):
        predict(drafter, batch, drafter.propose(batch), successor)
    tree = drafter.propose(batch)

    # root, g0[1], g0[2], then levels 1 and 2, each guess above its column's
    assert tree.parents.tolist() == [[-1, 0, 1, 0, 1, 2, 3, 4, 5]]
    assert tree.depth.tolist() == [[0, 1, 2, 1, 2, 3, 2, 3, 4]]
    assert tree.virtual is not None
    assert tree.virtual.tolist() == [[False] + [True] * 8]
    assert tree.embeddings is not None
    assert torch.equal(tree.embeddings, drafter._embed(tree.tokens))
    assert tree.num_nodes == 3 * 3


def test_candidates_stand_first_and_share_beginnings() -> None:
    drafter, batch = proposing([3, 4, 5, 9, 3, 4, 6, 9, 3], window=1, ngram=3, candidates=4)
    tree = drafter.propose(batch)

    assert tree.tokens[0, :4].tolist() == [3, 4, 6, 5]  # the most recent first
    assert tree.parents[0, :4].tolist() == [-1, 0, 1, 1]
    assert int(tree.num_drafted[0]) == 3


def test_what_the_target_guessed_is_proposed_when_its_first_token_comes() -> None:
    drafter, batch = proposing([8, 2], window=6, ngram=3, text=False)
    successor = [*range(1, VOCAB), 0]
    for following in (3, 4):
        tree = drafter.propose(batch)
        assert int(tree.num_drafted[0]) == 0
        predict(drafter, batch, tree, successor)
        batch.rows[0].tokens.append(following)
    assert int(drafter.propose(batch).num_drafted[0]) == 0
    batch.rows[0].tokens.append(8)  # one of the first guesses
    tree = drafter.propose(batch)
    assert tree.tokens[0, 1:3].tolist() == [9, 10]
    assert tree.acceptable[0].tolist() == [False, True, True] + [False] * (tree.num_nodes - 3)


def test_passes_without_the_window_leave_it_as_it_is() -> None:
    drafter, batch = proposing([3, 4, 5], window=4, ngram=3)
    before = drafter._rows[batch.rows[0].row_id].window.levels
    predict(drafter, batch, TokenTree.from_pending(batch.pending), range(VOCAB))  # decoded without a draft
    drafter.propose(batch)
    predict(drafter, batch, TokenTree.from_pending(batch.pending), range(VOCAB))  # the tree did not fit
    predict(drafter, batch, drafter.propose(batch).limit_depth([2]), range(VOCAB))  # it was too deep
    widened = drafter.propose(batch)
    chain = torch.arange(-1, widened.num_nodes - 1).unsqueeze(0)
    predict(drafter, batch, TokenTree(widened.tokens, chain), range(VOCAB))  # another one, by chance as wide
    assert drafter._rows[batch.rows[0].row_id].window.levels == before


def test_rows_that_join_and_leave_have_their_own_windows() -> None:
    drafter, batch = proposing([3, 4], [5, 6, 7], window=4, ngram=3)
    successor = [*range(1, VOCAB), 0]
    predict(drafter, batch, drafter.propose(batch), successor)
    kept = batch.rows[1].row_id
    levels = drafter._rows[kept].window.levels
    drafter.keep(batch, [1])
    batch.keep([1])
    batch.add([make_row([9, 9], VOCAB)])
    drafter.join(batch, 1)

    assert drafter._rows[kept].window.levels == levels
    assert len(levels) == 2
    assert drafter._rows[batch.rows[1].row_id].window.levels == [[9] * 5]
    drafter.propose(batch).validate(VOCAB)


def test_a_window_of_the_root_alone_learns_what_follows_it() -> None:
    batch = Batch([make_row([3, 5], VOCAB)], VOCAB)
    drafter = LookaheadDrafter(LookaheadConfig(window=1, ngram=2, text=False))
    bound(drafter)
    drafter.start(batch, None)
    tree = drafter.propose(batch)
    assert tree.num_nodes == 1
    logits = torch.zeros(1, 1, VOCAB)
    logits[0, 0, 7] = 1.0
    verdict: Any = None
    drafter.observe(batch, tree, TargetOutput(logits), verdict)
    assert drafter.propose(batch).tokens.tolist() == [[5, 7]]


@settings(max_examples=60)
@given(st.data())
def test_every_proposal_is_a_valid_tree_within_its_budget(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=3))
    config = LookaheadConfig(
        window=data.draw(st.integers(1, 4)), ngram=data.draw(st.integers(2, 4)),
        candidates=data.draw(st.integers(1, 3)), text=data.draw(st.booleans()),
    )  # fmt: skip
    batch = Batch([make_row(text, VOCAB, max_new_tokens=data.draw(st.integers(1, 9))) for text in texts], VOCAB)
    drafter = LookaheadDrafter(config)
    bound(drafter)
    drafter.start(batch, None)
    for step in range(7):
        tree = drafter.propose(batch)
        tree.validate(VOCAB)
        assert torch.equal(tree.tokens[:, 0], batch.pending)
        assert tree.num_nodes <= config.max_nodes
        assert bool((tree.depth.amax(1) <= torch.tensor(batch.max_depth).clamp(min=0)).all())
        logits = torch.randn(*tree.tokens.shape, VOCAB, generator=torch.Generator().manual_seed(step))
        verdict: Any = None
        drafter.observe(batch, tree, TargetOutput(logits), verdict)
        for row in batch.rows:
            if row.max_depth > 0:
                row.tokens.append(step % 4)


# Within a decoder


class CheckedLookahead(LookaheadDrafter):
    """Compares every node and the cache with transformers' own passes over plain sequences."""

    target: HFTarget

    def __init__(self, config: LookaheadConfig, caches: list[KVCache]) -> None:
        super().__init__(config)
        self.caches = caches
        self.guesses = self.accepted = 0

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        super().bind(target, tokenizer)
        self.target = target

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        cache = self.caches[-1]
        cache.check_integrity()
        virtual = torch.zeros_like(tree.valid) if tree.virtual is None else tree.virtual
        for index, row in enumerate(batch.rows):
            for node in tree.valid[index].nonzero().squeeze(1).tolist():
                path, above = [], node
                while above > 0:
                    path.append(int(tree.tokens[index, above]))
                    above = int(tree.parents[index, above])
                ids = torch.tensor([[*row.tokens, *reversed(path)]])
                expected = self.target.model(ids, use_cache=False).logits[0, -1]
                torch.testing.assert_close(output.logits[index, node], expected, rtol=0, atol=TOLERANCE)
                self.guesses += bool(virtual[index, node])
            count = verdict.num_accepted[index]
            self.accepted += count
            path = verdict.path[index, : count + 1].tolist()
            assert not bool(virtual[index, path].any())
            committed = [*row.tokens, *verdict.tokens[index][:count]]
            assert cache.row_lengths[index] == len(committed)
            fresh = self.target.new_cache(1, len(committed))
            self.target.extend([committed], fresh)
            for layer, held in cache.layers.items():
                keys = held.keys[index, :, : len(committed)]
                torch.testing.assert_close(keys, fresh.layers[layer].keys[0], rtol=0, atol=TOLERANCE)
        super().observe(batch, tree, output, verdict)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_guesses_see_their_own_ancestors_and_are_never_kept(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = HFTarget(tiny_model(architecture).double())
    caches: list[KVCache] = []
    new_cache = target.new_cache

    def recorded(batch_size: int, capacity: int) -> KVCache:
        cache = new_cache(batch_size, capacity)
        if capacity > 64:  # not one of the fresh ones
            caches.append(cache)
        return cache

    monkeypatch.setattr(target, "new_cache", recorded)
    drafter = CheckedLookahead(LookaheadConfig(window=3, ngram=3, candidates=3), caches)
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=16, ignore_eos=True)
    found = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False).generate(
        PROMPTS, max_new_tokens=16, ignore_eos=True
    )
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert drafter.guesses > 100
    assert drafter.accepted > 0


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 9])
def test_the_end_of_a_text_cuts_the_window_short(max_new_tokens: int) -> None:
    target = HFTarget(tiny_model("llama", max_position_embeddings=len(PROMPTS[0]) + max_new_tokens))
    prompts = PROMPTS[:2]
    plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=max_new_tokens, ignore_eos=True)
    decoder = SpecDecoder(target, "lookahead", on_drafter_error="raise", adaptive=False)
    found = decoder.generate(prompts, max_new_tokens=max_new_tokens, ignore_eos=True)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]


def scripted_target(period: int) -> HFTarget:
    """A model that counts: after token t comes ``(t + 1) % period``, whatever stood before it."""
    model = tiny_model("llama", tie_word_embeddings=False, vocab_size=64, hidden_size=64, eos_token_id=None)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        for token in range(64):
            model.lm_head.weight[(token + 1) % period, token] = 1.0
    return HFTarget(model)


def count_from(target: HFTarget, drafter: str, prompt: list[int], length: int, **options: Any) -> SpecDecoder:
    """A decoder that has written ``length`` tokens after the prompt, rightly."""
    options = {"adaptive": False, **options}
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", **options)
    result = decoder.generate(prompt, max_new_tokens=length)
    plain = SpecDecoder(target, "none").generate(prompt, max_new_tokens=length)
    assert result.token_ids == plain.token_ids
    return decoder


def test_on_repetitive_text_the_right_ngram_is_found_and_every_pass_emits_all_of_it() -> None:
    target = scripted_target(period=5)
    options = {"window": 3, "ngram": 4, "candidates": 2, "text": False}
    short = count_from(target, "lookahead", [0], 20, drafter_options=options).stats
    long = count_from(target, "lookahead", [0], 60, drafter_options=options).stats

    # Once the period was seen, 40 tokens take 10 passes of N = 4 tokens.
    assert long.passes - short.passes == 10
    assert long.accepted - short.accepted == 30
    assert long.tau > short.tau > 1.0


def test_ngrams_of_text_that_was_never_written_are_found() -> None:
    """What lookup cannot do: no token comes twice, the guesses ran ahead of the text."""
    target = scripted_target(period=64)
    prompt = [60, 50, 40, 30, 20, 10, 0]
    options = {"window": 16, "ngram": 4, "candidates": 1, "text": False}

    assert count_from(target, "lookahead", prompt, 30, drafter_options=options).stats.accepted >= 10
    assert count_from(target, "ngram", prompt, 30).stats.accepted == 0


def test_the_planner_charges_the_window() -> None:
    """A pass over a candidate alone would pay; with the window, which has most of the nodes, it does not."""
    target = scripted_target(period=5)
    dear = LatencyCurve.simple({1: 1e6, 6: 1.05e6, 16: 1.1e6, 18: 8e6, 64: 8e6})  # ms: a real draft's are nothing
    flat = LatencyCurve.simple({1: 1e6, 64: 1.1e6})
    options = {"window": 6, "ngram": 4, "candidates": 2, "text": False}
    plain = {}
    for name, curve in (("dear", dear), ("flat", flat)):
        stats = count_from(target, "lookahead", [0], 100, drafter_options=options, latency=curve, adaptive=True).stats
        plain[name] = stats.plain_passes / stats.passes

    assert plain["flat"] < 0.1
    assert plain["dear"] > 0.9


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.3}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}])
def test_sampled_and_penalised_text_is_that_of_plain_decoding(fields: dict[str, Any]) -> None:
    target = HFTarget(tiny_model("llama").double())
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=30, seed=1, **fields)
    decoder = SpecDecoder(target, "lookahead", on_drafter_error="raise", adaptive=False)
    found = decoder.generate(PROMPTS, max_new_tokens=30, seed=1, **fields)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert decoder.stats.drafted > 0


def test_what_makes_no_sense_is_refused_with_its_value() -> None:
    for name, value, least in (("window", 0, 1), ("ngram", 1, 2), ("candidates", 0, 1), ("pool", 0, 1)):
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
            LookaheadConfig(**{name: value})
    with pytest.raises(ValueError, match="drafter 'lookahead' cannot be merged with others"):
        SpecDecoder(tiny_model("llama"), "suffix+lookahead")
