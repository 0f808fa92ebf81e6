"""Compiled suffix automata against those in Python: the same trees to the bit, whatever texts do."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from unit_rows import make_batch, make_row

from specdec.batch import Batch
from specdec.drafters.suffix import SuffixConfig, SuffixDrafter
from specdec.kernels.suffix import cpu, make_corpus
from specdec.kernels.suffix.reference import ReferenceCorpus
from specdec.tree import TokenTree

pytestmark = pytest.mark.skipif(cpu.compiled() is None, reason="no C compiler")

VOCAB = 12
HUGE = 1 << 70
LIMITS = (16, 4.0, 0.05, 1000)


def both(config: SuffixConfig) -> list[SuffixDrafter]:
    """A drafter with the compiled automata, where there is a compiler, and one without."""
    drafters = [SuffixDrafter(config)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "compiled", lambda: None)
        drafters.append(SuffixDrafter(config))
    assert isinstance(drafters[1]._corpus, ReferenceCorpus)
    return drafters


def begin_and_end(drafters: Sequence[SuffixDrafter], batch: Batch) -> None:
    """Texts begin, and the first of them end."""
    for drafter in drafters:
        drafter.start(batch, None)
        drafter.propose(batch)
        drafter.keep(batch, list(range(1, len(batch))))


def check_same(trees: Sequence[TokenTree]) -> None:
    found, expected = trees
    for tree in trees:
        tree.validate(VOCAB)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.parents, expected.parents)
    assert found.confidence is not None
    assert expected.confidence is not None
    assert found.confidence.dtype == expected.confidence.dtype == torch.float32
    assert torch.equal(found.confidence.view(torch.int32), expected.confidence.view(torch.int32))


def write(drafters: Sequence[SuffixDrafter], prompts: list[list[int]], data: st.DataObject, tokens: Any) -> None:
    """A generation in which rows get pieces of text, and end one after the other or are abandoned."""
    batch = Batch(
        [make_row(prompt, VOCAB, max_new_tokens=data.draw(st.sampled_from([6, 99]))) for prompt in prompts], 1
    )
    for drafter in drafters:
        drafter.start(batch, None)
    while len(batch):
        check_same([drafter.propose(batch) for drafter in drafters])
        for row in batch.rows:
            row.tokens += data.draw(tokens)
        running = data.draw(st.lists(st.sampled_from(range(len(batch))), unique=True))
        for drafter in drafters:
            drafter.keep(batch, running)
        batch.keep(running)
        if data.draw(st.integers(0, 9)) == 9:
            break
    for drafter in drafters:
        drafter.stop()


texts_of_few = st.integers(1, 4).flatmap(
    lambda alphabet: st.lists(
        st.tuples(st.integers(0, alphabet - 1), st.sampled_from([1, 1, 1, 2, 5, 90])), min_size=1, max_size=20
    ).map(lambda runs: [token for token, times in runs for _ in range(times)])
)
configs = st.builds(
    SuffixConfig,
    max_nodes=st.sampled_from([1, 2, 3, 16, 100, HUGE]),
    depth=st.sampled_from([1, 2, 12]),
    nodes_per_match=st.sampled_from([0.1, 0.7, 4.0, 1e9]),
    min_probability=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    corpus_tokens=st.sampled_from([0, 5, 40, 1000, HUGE]),
)


@settings(max_examples=150)
@given(configs, st.lists(st.lists(texts_of_few, min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_compiled_trees_are_those_of_python(
    config: SuffixConfig, calls: list[list[list[int]]], data: st.DataObject
) -> None:
    drafters = both(config)
    for prompts in calls:
        write(drafters, prompts, data, texts_of_few)


def test_a_long_text_is_continued_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    drafters = both(SuffixConfig(max_nodes=64, min_probability=0.01, corpus_tokens=2500))
    for call in range(5):
        texts = torch.randint(2 + 2 * call, (3, 600), generator=generator).tolist()
        batch = make_batch([text[:100] for text in texts], VOCAB)
        for drafter in drafters:
            drafter.start(batch, None)
        for length in range(110, 601, 10):
            check_same([drafter.propose(batch) for drafter in drafters])
            for row, text in zip(batch.rows, texts, strict=True):
                row.tokens[:] = text[:length]
        for drafter in drafters:
            drafter.keep(batch, [])


def test_tokens_may_be_any_number_of_64_bits() -> None:
    large = [(1 << 63) - 1, 1 << 40, 0]
    batch = make_batch([[*large, *large[:2]]], VOCAB)
    found = []
    for drafter in both(SuffixConfig()):
        drafter.start(batch, None)
        tree = drafter.propose(batch)
        found.append((tree.tokens.tolist(), tree.parents.tolist()))

    assert found[0] == found[1]
    assert found[0][0][0][:2] == [1 << 40, 0]


@settings(max_examples=60)
@example(known=[1, 1, 0], text=[0, 0], added=[1, 0, 0])  # splits the state the text stands in
@given(known=texts_of_few, text=texts_of_few, added=texts_of_few)
def test_a_text_stands_alike_in_a_corpus_that_grows_under_it(
    known: list[int], text: list[int], added: list[int]
) -> None:
    drafters = both(SuffixConfig(max_nodes=8, min_probability=0.0))
    half = (len(text) + 1) // 2
    for prompts in ([known], [added, text[:half]]):
        batch = make_batch(prompts, VOCAB)
        begin_and_end(drafters, batch)
    batch.keep([1])
    for token in text[half:]:
        batch.rows[0].tokens.append(token)
        check_same([drafter.propose(batch) for drafter in drafters])


def test_a_text_stands_alike_in_a_corpus_that_starts_anew() -> None:
    drafters = both(SuffixConfig(corpus_tokens=4))
    for prompts in ([[7, 3, 4, 6]], [[8, 9, 10, 11]], [[0, 1, 1, 2], [5, 7]]):  # as the third ends, the corpus is full
        batch = make_batch(prompts, VOCAB)
        begin_and_end(drafters, batch)
    batch.keep([1])
    batch.rows[0].tokens.append(1)
    trees = [drafter.propose(batch) for drafter in drafters]

    check_same(trees)
    assert trees[0].tokens.tolist() == [[1, 1, 2, 2]]


def test_copies_of_a_drafter_have_texts_of_their_own_and_one_corpus() -> None:
    found = []
    for drafter in both(SuffixConfig(corpus_tokens=6)):
        copies = [copy.copy(drafter) for _ in range(3)]
        batches = [make_batch([text], VOCAB) for text in ([7, 3, 4], [2, 5], [8, 9, 10, 9, 11, 6])]
        trees = []
        for each, batch in zip(copies, batches, strict=True):
            each.start(batch, None)
            trees.append(each.propose(batch))
        for ended in (0, 2):
            copies[ended].keep(batches[ended], [])
            copies[ended].stop()
        for token in (3, 9, 10):
            batches[1].rows[0].tokens.append(token)
            trees.append(copies[1].propose(batches[1]))
        found.append(trees)
    for pair in zip(*found, strict=True):
        check_same(pair)
    assert found[0][3].tokens.tolist() == [[3, 4]]
    assert found[0][5].tokens.tolist() == [[10, 9, 11, 6]]


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler is installed")
def test_what_is_compiled_is_used_and_freed() -> None:
    library, freed = cpu.compiled(), []
    assert library is not None
    assert isinstance(make_corpus(*LIMITS), cpu.CompiledCorpus)

    def free(name: str, address: int) -> None:
        freed.append(name)
        getattr(library, name)(address)

    names = ("suffix_new", "suffix_begin", "suffix_draft", "suffix_read")
    spy: Any = SimpleNamespace(**{name: getattr(library, name) for name in names})
    spy.suffix_free, spy.suffix_end = (partial(free, name) for name in ("suffix_free", "suffix_end"))
    corpus = cpu.CompiledCorpus(spy, *LIMITS)
    texts = [corpus.begin(), corpus.begin()]
    corpus.draft([(text, [1, 2, 1], 3) for text in texts])
    assert not freed
    texts.pop()
    assert freed == ["suffix_end"]
    del corpus, texts

    assert sorted(freed) == ["suffix_end", "suffix_end", "suffix_free"]


def test_memory_that_is_not_there_is_an_error() -> None:
    def none(*_: Any) -> None:
        return None

    broken: Any = SimpleNamespace(
        suffix_new=lambda *_: 1, suffix_begin=none, suffix_draft=lambda *_: -1, suffix_remember=lambda *_: 0,
        suffix_free=none,
    )  # fmt: skip
    corpus = cpu.CompiledCorpus(broken, *LIMITS)
    for ask in (corpus.begin, lambda: corpus.draft([]), lambda: corpus.remember([1])):
        with pytest.raises(MemoryError, match="suffix automata"):
            ask()
    broken.suffix_new = none
    with pytest.raises(MemoryError, match="suffix automata"):
        cpu.CompiledCorpus(broken, *LIMITS)
