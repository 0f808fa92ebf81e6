"""Training-free drafters: what they propose for known texts, and that every proposal is a well-formed tree."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from unit_rows import make_batch, make_row

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.layer_parallel import LayerParallelConfig
from specdec.drafters.model import ModelConfig
from specdec.drafters.ngram import NgramConfig, NgramDrafter
from specdec.drafters.none import NoneDrafter
from specdec.drafters.recycling import RecyclingConfig, RecyclingDrafter, tree_template
from specdec.drafters.suffix import SuffixConfig, SuffixDrafter
from specdec.kernels.suffix.reference import SuffixAutomaton
from specdec.target import TargetOutput
from specdec.tree import ROOT, TokenTree
from specdec.verifiers.base import Verdict

VOCAB = 12
TARGET: Any = SimpleNamespace(vocab_size=VOCAB, device=torch.device("cpu"))
UNUSED = cast(Verdict, None)


def started(drafter: Drafter, batch: Batch) -> Drafter:
    """The drafter, met with a target of VOCAB tokens and at the start of a generation."""
    drafter.bind(TARGET, None)
    drafter.start(batch, None)
    return drafter


def paths_of(tree: TokenTree, row: int = 0) -> list[tuple[int, ...]]:
    """Token paths of a row's nodes in order of its columns, the root's left out."""
    tree.validate(VOCAB)
    tokens = tree.tokens[row].tolist()
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for column, parent in enumerate(tree.parents[row].tolist()):
        if parent >= 0:
            paths[column] = (*paths[parent], tokens[column])
    return [path for column, path in paths.items() if column > 0]


def leaves_of(tree: TokenTree, row: int = 0) -> list[tuple[int, ...]]:
    """Paths that are not part of a longer one."""
    paths = paths_of(tree, row)
    return [path for path in paths if not any(other[: len(path)] == path for other in paths if len(other) > len(path))]


def ngram(tokens: list[int], max_new_tokens: int = 1000, **options: int) -> TokenTree:
    """The n-gram drafter's tree for one row."""
    batch = Batch([make_row(tokens, VOCAB, max_new_tokens=max_new_tokens)], VOCAB)
    return started(NgramDrafter(NgramConfig(**options)), batch).propose(batch)


def test_ngram_proposes_what_followed_the_longest_match() -> None:
    #               v 4 5 here was followed by 6 7, the nearer 5 alone by 8
    text = [1, 3, 4, 5, 6, 7, 2, 5, 8, 4, 5]

    assert leaves_of(ngram(text, max_matches=1, depth=2)) == [(6, 7)]
    assert leaves_of(ngram(text, max_matches=1, depth=2, max_ngram=1)) == [(8, 4)]


def test_ngram_merges_matches_longest_first_then_most_recent() -> None:
    text = [9, 5, 1, 3, 5, 2, 4, 5, 3, 4, 5]

    assert paths_of(ngram(text, depth=1)) == [(3,), (2,), (1,)]
    assert paths_of(ngram(text, depth=1, max_matches=2)) == [(3,), (2,)]
    assert paths_of(ngram(text, depth=1, min_ngram=2)) == [(3,)]


def test_ngram_merges_common_beginnings_into_one_branch() -> None:
    text = [5, 1, 2, 5, 1, 3, 5]

    assert paths_of(ngram(text, depth=2)) == [(1,), (1, 3), (1, 2)]


def test_ngram_overlap_with_the_end_of_the_text_is_proposed() -> None:
    assert leaves_of(ngram([4, 4, 4, 4])) == [(4, 4, 4)]


def test_ngram_without_a_match_proposes_the_root_alone() -> None:
    tree = ngram([1, 2, 3])

    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([[3]], [[ROOT]])
    assert ngram([7]).num_nodes == 1


@pytest.mark.parametrize(
    ("options", "max_new_tokens", "nodes"),
    [({"max_nodes": 3}, 99, 3), ({"max_nodes": 1}, 99, 1), ({"depth": 4}, 99, 5), ({}, 3, 3), ({}, 1, 1)],
)
def test_ngram_keeps_to_budget_depth_and_what_can_still_be_emitted(
    options: dict[str, int], max_new_tokens: int, nodes: int
) -> None:
    tree = ngram([*range(10), 0, 1], max_new_tokens, **options)

    assert paths_of(tree) == [tuple(range(2, 2 + length)) for length in range(1, nodes)]


def test_ngram_index_grows_with_the_text() -> None:
    batch = make_batch([[1, 2, 3]], VOCAB)
    drafter = started(NgramDrafter(NgramConfig(depth=2)), batch)
    assert paths_of(drafter.propose(batch)) == []
    batch.rows[0].tokens += [1]
    assert leaves_of(drafter.propose(batch)) == [(2, 3)]
    batch.rows[0].tokens += [2, 8, 2]
    assert leaves_of(drafter.propose(batch)) == [(8, 2), (3, 1)]


@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_rows_of_a_batch_are_drafted_for_alone(name: str) -> None:
    texts = [[1, 2, 3, 1, 2], [4, 5], [6, 7, 8, 9, 6, 7, 8, 9, 6], [3]]

    def trees_of(rows: list[list[int]]) -> list[list[tuple[int, ...]]]:
        batch = make_batch(rows, VOCAB)
        drafter: Drafter = NgramDrafter() if name == "ngram" else SuffixDrafter()
        tree = started(drafter, batch).propose(batch)
        assert tree.tokens[:, 0].tolist() == [text[-1] for text in rows]
        return [paths_of(tree, row) for row in range(len(rows))]

    together = trees_of(texts)

    assert together == [trees_of([text])[0] for text in texts]
    assert together[0][0] == (3,)
    assert together[1] == together[3] == []


tokens_of_three = st.lists(st.integers(0, 2), max_size=14)


def occurrences(texts: list[list[int]]) -> Counter[tuple[int, ...]]:
    """How often each substring occurs, by trying all."""
    return Counter(
        tuple(text[start:end])
        for text in texts
        for start in range(len(text))
        for end in range(start + 1, len(text) + 1)
    )


def counts_of(automaton: SuffixAutomaton) -> dict[tuple[int, ...], int]:
    """Every string the automaton knows, with its count."""
    found: dict[tuple[int, ...], int] = {}
    paths: list[tuple[tuple[int, ...], int]] = [((), 0)]
    while paths:
        string, state = paths.pop()
        for token, child in automaton.next[state].items():
            found[(*string, token)] = automaton.count[child]
            paths.append(((*string, token), child))
    return found


@given(st.lists(tokens_of_three, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_automaton_counts_every_substring_of_interleaved_sequences(texts: list[list[int]], random: Any) -> None:
    automaton = SuffixAutomaton()
    ends, done = [0] * len(texts), [0] * len(texts)
    while any(done[i] < len(text) for i, text in enumerate(texts)):
        which = random.choice([i for i, text in enumerate(texts) if done[i] < len(text)])
        ends[which] = automaton.extend(ends[which], texts[which][done[which]])
        done[which] += 1

    assert counts_of(automaton) == dict(occurrences(texts))
    assert automaton.num_states <= max(2, 2 * sum(map(len, texts)))
    for state, text in zip(ends, texts, strict=True):
        assert automaton.length[state] == len(text)


@given(tokens_of_three)
def test_automaton_links_lead_to_the_longest_suffix_seen_elsewhere(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    last = 0
    for token in text:
        last = automaton.extend(last, token)
    counts = occurrences([text])
    repeated = [length for length in range(1, len(text)) if counts[tuple(text[-length:])] > 1]

    assert automaton.length[automaton.link[last]] == max(repeated, default=0) or not text


@given(tokens_of_three, tokens_of_three)
def test_following_a_foreign_text_finds_its_longest_known_suffix(known: list[int], text: list[int]) -> None:
    automaton = SuffixAutomaton()
    last = 0
    for token in known:
        last = automaton.extend(last, token)
    counts, state, matched = occurrences([known]), 0, 0
    for length, token in enumerate(text, 1):
        state, matched = automaton.step(state, matched, token)
        read = text[:length]
        assert matched == max((n for n in range(1, length + 1) if counts[tuple(read[-n:])]), default=0)


@example(known=[1, 1, 0], text=[0, 0], added=[1, 0, 0], when=1)  # splits the state the text stands in
@settings(max_examples=200)
@given(tokens_of_three, tokens_of_three, tokens_of_three, st.integers(0, 14))
def test_following_a_text_while_another_is_added_never_overstates_the_match(
    known: list[int], text: list[int], added: list[int], when: int
) -> None:
    automaton = SuffixAutomaton()
    last = 0
    for token in known:
        last = automaton.extend(last, token)
    state, matched, texts = 0, 0, [known]
    for length, token in enumerate(text, 1):
        state, matched = automaton.step(state, matched, token)
        if length == when:
            last = 0
            for new in added:
                last = automaton.extend(last, new)
            texts.append(added)
        counts = occurrences(texts)
        assert matched <= max((n for n in range(1, length + 1) if counts[tuple(text[:length][-n:])]), default=0)


def test_suffix_proposes_continuations_by_how_often_they_followed() -> None:
    batch = make_batch([[5, 1, 9, 5, 2, 9, 5, 1, 8, 5]], VOCAB)
    drafter = started(SuffixDrafter(SuffixConfig(depth=1)), batch)

    assert paths_of(drafter.propose(batch)) == [(1,), (2,)]  # 1 followed 5 twice, 2 once


def test_suffix_leaves_out_what_is_too_unlikely() -> None:
    batch = make_batch([[5, 1, 9, 5, 2, 9, 5, 1, 8, 5]], VOCAB)
    drafter = started(SuffixDrafter(SuffixConfig(depth=1, min_probability=0.5)), batch)

    assert paths_of(drafter.propose(batch)) == [(1,)]


@pytest.mark.parametrize(
    ("options", "max_new_tokens", "nodes"),
    [({"max_nodes": 3}, 99, 3), ({"max_nodes": 1}, 99, 1), ({"depth": 4}, 99, 5), ({}, 3, 3), ({}, 1, 1),
     ({"nodes_per_match": 1.5}, 99, 4)],
)  # fmt: skip
def test_suffix_keeps_to_budget_depth_and_what_can_still_be_emitted(
    options: dict[str, Any], max_new_tokens: int, nodes: int
) -> None:
    batch = Batch([make_row([*range(10), 0, 1], VOCAB, max_new_tokens=max_new_tokens)], VOCAB)
    tree = started(SuffixDrafter(SuffixConfig(**options)), batch).propose(batch)

    assert paths_of(tree) == [tuple(range(2, 2 + length)) for length in range(1, nodes)]


def remembered(drafter: SuffixDrafter, text: list[int]) -> None:
    """A generation whose one row ended as ``text``."""
    batch = make_batch([text[:1]], VOCAB)
    drafter.start(batch, None)
    drafter.propose(batch)
    batch.rows[0].tokens += text[1:]
    drafter.keep(batch, [])
    drafter.stop()


def test_suffix_remembers_finished_rows_in_later_calls() -> None:
    drafter = SuffixDrafter()
    remembered(drafter, [7, 3, 4, 5])
    batch = make_batch([[1, 3]], VOCAB)
    drafter.start(batch, None)

    assert leaves_of(drafter.propose(batch)) == [(4, 5)]


def test_suffix_remembers_a_row_for_those_still_running() -> None:
    drafter = SuffixDrafter()
    batch = make_batch([[7, 3, 4, 5], [1, 2]], VOCAB)
    drafter.start(batch, None)
    assert paths_of(drafter.propose(batch), 1) == []
    drafter.keep(batch, [1])
    batch.keep([1])
    batch.rows[0].tokens += [3]

    assert leaves_of(drafter.propose(batch)) == [(4, 5)]


def test_suffix_told_to_remember_nothing_remembers_nothing() -> None:
    drafter = SuffixDrafter(SuffixConfig(corpus_tokens=0))
    remembered(drafter, [7, 3, 4, 5])
    batch = make_batch([[1, 3]], VOCAB)
    drafter.start(batch, None)

    assert paths_of(drafter.propose(batch)) == []


def test_suffix_starts_its_memory_anew_when_it_is_full() -> None:
    drafter = SuffixDrafter(SuffixConfig(corpus_tokens=5))
    for text in ([7, 3, 4, 5, 6], [8, 9, 10, 11, 0], [1, 4, 8]):
        remembered(drafter, text)
    batch = make_batch([[2, 3], [2, 4]], VOCAB)
    drafter.start(batch, None)
    tree = drafter.propose(batch)

    assert (paths_of(tree, 0), paths_of(tree, 1)) == ([], [(8,)])


def test_suffix_rows_still_running_do_not_point_into_the_memory_that_was_dropped() -> None:
    drafter = SuffixDrafter(SuffixConfig(corpus_tokens=3))
    for text in ([7, 3, 4], [8, 9, 10]):
        remembered(drafter, text)
    batch = make_batch([[0, 1, 2], [5, 9]], VOCAB)
    drafter.start(batch, None)
    assert paths_of(drafter.propose(batch), 1) == [(10,)]
    drafter.keep(batch, [1])
    batch.keep([1])
    batch.rows[0].tokens += [1]

    assert paths_of(drafter.propose(batch)) == [(2,)]


@settings(max_examples=40)
@given(st.data())
def test_every_proposal_is_a_valid_tree_within_its_budget(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=3))
    nodes, depth = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    room = data.draw(st.integers(1, 6))
    drafters: list[Drafter] = [
        NgramDrafter(NgramConfig(max_nodes=nodes, depth=depth)),
        SuffixDrafter(SuffixConfig(max_nodes=nodes, depth=depth)),
        RecyclingDrafter(RecyclingConfig(max_nodes=nodes, depth=depth)),
        NoneDrafter(),
    ]
    for drafter in drafters:
        batch = Batch([make_row(text, VOCAB, max_new_tokens=room) for text in texts], VOCAB)
        started(drafter, batch)
        for _ in range(2):
            tree = drafter.propose(batch)
            tree.validate(VOCAB)
            assert torch.equal(tree.tokens[:, 0], batch.pending)
            assert tree.num_nodes <= nodes
            assert int(tree.draft_depth.max()) <= min(depth, room - 1)
            logits = torch.randn(*tree.tokens.shape, VOCAB, generator=torch.Generator().manual_seed(nodes))
            drafter.observe(batch, tree, TargetOutput(logits), UNUSED)
        running = list(range(len(batch) - 1))
        drafter.keep(batch, running)
        batch.keep(running)
        if running:
            drafter.propose(batch).validate(VOCAB)
        drafter.stop()


@pytest.mark.parametrize("max_nodes", [1, 2, 5, 32, 80])
@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("candidates", [1, 2, 8])
def test_recycling_template_is_closed_under_ancestors_and_better_siblings(
    max_nodes: int, depth: int, candidates: int
) -> None:
    template = tree_template(max_nodes, depth, candidates)

    complete = sum(candidates**level for level in range(depth + 1))
    assert len(template) == min(max_nodes, complete)
    assert template[0] == (ROOT, 0, 0)
    places = {(parent, rank) for parent, rank, _ in template}
    for node, (parent, rank, level) in enumerate(template[1:], 1):
        assert 0 <= parent < node
        assert level == template[parent][2] + 1 <= depth
        assert 0 <= rank < candidates
        assert all((parent, better) in places for better in range(rank))
    assert len(places) == len(template)
    assert [level for _, _, level in template] == sorted(level for _, _, level in template)


def recycling(text: list[int], **options: Any) -> tuple[RecyclingDrafter, Batch]:
    """A drafter at the start of a generation of one row."""
    batch = make_batch([text], VOCAB)
    drafter = RecyclingDrafter(RecyclingConfig(**options))
    started(drafter, batch)
    return drafter, batch


def test_recycling_follows_the_prompts_bigrams_until_one_is_unknown() -> None:
    drafter, batch = recycling([4, 5, 6, 4], max_nodes=40, depth=4)
    tree = drafter.propose(batch)

    assert leaves_of(tree) == [(5, 6, 4, 5)]
    assert tree.num_nodes == 5  # unknown entries take no column

    drafter, batch = recycling([0, 5, 6], max_nodes=40)  # 0, what an unknown entry is read as, is known
    assert paths_of(drafter.propose(batch)) == []


def test_recycling_learns_the_best_tokens_after_every_node_accepted_or_not() -> None:
    drafter, batch = recycling([0], candidates=2, max_nodes=7, depth=2)
    tree = TokenTree(torch.tensor([[0, 1, 2]]), torch.tensor([[ROOT, 0, 0]]))
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, 0, [1, 2]] = torch.tensor([9.0, 8.0])
    logits[0, 1, [3, 4]] = torch.tensor([9.0, 8.0])
    logits[0, 2, [5, 6]] = torch.tensor([8.0, 9.0])
    drafter.observe(batch, tree, TargetOutput(logits), UNUSED)

    assert paths_of(drafter.propose(batch)) == [(1,), (1, 3), (2,), (1, 4), (2, 6), (2, 5)]  # best first


def test_recycling_does_not_learn_from_padding_or_virtual_nodes() -> None:
    drafter, batch = recycling([0], candidates=1)
    tree = TokenTree(
        torch.tensor([[0, 1, 2]]),
        torch.tensor([[ROOT, -2, 0]]),
        virtual=torch.tensor([[False, False, True]]),
        embeddings=torch.zeros(1, 3, 2),
    )
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 3, 3]]), VOCAB).float()
    drafter.observe(batch, tree, TargetOutput(logits), UNUSED)
    assert paths_of(drafter.propose(batch)) == [(1,)]

    batch.rows[0].tokens.append(2)
    assert paths_of(drafter.propose(batch)) == []


@pytest.mark.parametrize("keeps", [True, False])
def test_recycling_keeps_its_table_between_calls_only_if_told_to(keeps: bool) -> None:
    drafter, _ = recycling([4, 5, 6], keep_between_calls=keeps)
    drafter.stop()
    batch = make_batch([[4]], VOCAB)
    drafter.start(batch, None)

    assert paths_of(drafter.propose(batch)) == ([(5,), (5, 6)] if keeps else [])


def test_recycling_serves_a_vocabulary_smaller_than_its_candidates() -> None:
    target: Any = SimpleNamespace(vocab_size=3, device=torch.device("cpu"))
    batch = make_batch([[0]], 3)
    drafter = RecyclingDrafter(RecyclingConfig(candidates=8, depth=1))
    drafter.bind(target, None)
    drafter.start(batch, None)
    drafter.observe(batch, TokenTree.from_pending(batch.pending), TargetOutput(torch.arange(3.0).view(1, 1, 3)), UNUSED)

    assert paths_of(drafter.propose(batch)) == [(2,), (1,), (0,)]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (NgramConfig, {"min_ngram": 0}, "1 <= min_ngram <= max_ngram, got 0 and 4"),
        (NgramConfig, {"max_ngram": 2, "min_ngram": 3}, "got 3 and 2"),
        (NgramConfig, {"depth": 0}, "depth must be at least 1, got 0"),
        (SuffixConfig, {"max_nodes": 0}, "max_nodes must be at least 1, got 0"),
        (SuffixConfig, {"min_probability": 1.5}, r"min_probability must be in \[0, 1\], got 1\.5"),
        (SuffixConfig, {"nodes_per_match": float("nan")}, "nodes_per_match must be at least"),
        (RecyclingConfig, {"candidates": 9}, r"candidates must be in \[1, 8\], got 9"),
        (RecyclingConfig, {"depth": 0}, "depth must be at least 1, got 0"),
        (ModelConfig, {"depth": -1}, "depth must be at least 0, got -1"),
        (ModelConfig, {"beams": 0}, "beams must be at least 1, got 0"),
        (ModelConfig, {"max_nodes": 0}, "max_nodes must be at least 1, got 0"),
        (LayerParallelConfig, {"group": 0}, "group must be at least 1, got 0"),
        (LayerParallelConfig, {"beams": 0}, "beams must be at least 1, got 0"),
        (LayerParallelConfig, {"attention": "bogus"}, "one of auto, fused, separate, ranks, got 'bogus'"),
        (LayerParallelConfig, {"attention": "bogus", "group": 1}, "got 'bogus'"),
        (LayerParallelConfig, {"depth": 0}, "depth must be at least 1 for drafter 'layer_parallel', got 0: no profile"),
    ],
)
def test_impossible_options_are_refused_with_their_value(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)
