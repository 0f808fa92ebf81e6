"""Medusa and Clover: drafting step by step is running their module over the whole text, and text is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor
from unit_heads import WIDTH, random_weights
from unit_rows import make_batch

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters import clover
from specdec.drafters.clover import CloverConfig, CloverDrafter, embed
from specdec.drafters.heads import HeadDrafter, OutputHead
from specdec.drafters.layer import causal_attention
from specdec.drafters.medusa import MedusaConfig, MedusaDrafter
from specdec.sampling import SamplingParams
from specdec.target import Feature, HFTarget
from specdec.tree import TokenTree

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [9], [40, 41, 42, 40, 41] * 3]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalised": {"temperature": 0.0, "repetition_penalty": 1.4},
    "coupled": {"temperature": 1.0, "top_k": 40},
    "coupled, hot and penalised": {"temperature": 4.0, "repetition_penalty": 1.2},
}
DRAFTERS: list[tuple[str, dict[str, int]]] = [
    ("medusa", {"vocab_size": 0, "num_layers": 1}),
    ("medusa", {"vocab_size": 60, "num_layers": 2}),
    ("clover", {"vocab_size": 0, "num_layers": 2}),
    ("clover", {"vocab_size": 60, "num_layers": 1}),
    ("clover", {"vocab_size": 60, "num_layers": 0}),
]
WIDE = {"width": 8, "branching": 12, "max_nodes": 60}


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model(initializer_range=0.15))


@pytest.fixture(scope="module")
def exact() -> HFTarget:
    """In float64, so that another order of sums is all that may differ."""
    return HFTarget(tiny_model(initializer_range=0.15).double())


def make_drafter(target: HFTarget, name: str, sizes: dict[str, int], **options: Any) -> HeadDrafter:
    """A drafter with random weights, not bound yet."""
    weights = random_weights(target, name, **sizes)
    if name == "medusa":
        return MedusaDrafter(MedusaConfig(**options), weights)
    return CloverDrafter(CloverConfig(**options), weights)


def bound(target: HFTarget, name: str, sizes: dict[str, int], **options: Any) -> Any:
    """The same, bound."""
    drafter = make_drafter(target, name, sizes, **options)
    drafter.bind(target, None)
    return drafter


@torch.no_grad()
def states_of(target: HFTarget, rows: Sequence[Sequence[int]]) -> dict[Feature, Tensor]:
    """The target's states ``[B, longest, d]`` of texts."""
    cache = target.new_cache(len(rows), 64)
    return target.extend(rows, cache, ("last", "pre_norm")).features


@torch.no_grad()
def clover_from_scratch(drafter: Any, target: HFTarget, text: Sequence[int], path: Sequence[int]) -> Tensor:
    """``[V']`` logits after a draft ``path`` that follows ``text``, by running the module over all of the text."""
    module = drafter.module
    hidden = states_of(target, [text[:-1]])["pre_norm"]
    table = target.model.get_output_embeddings().weight
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    embedded = embed(table, torch.tensor([text[1:]]))
    state = module.augment(hidden, embedded, positions, lambda _: causal_attention)[0, -1]
    out = module.read_first(state)
    for token in path:
        word = embed(table, torch.tensor(token))
        state = module.step(state, word)
        out = module.read_later(state, word)
    logits: Tensor = OutputHead(target, module.vocabulary)(out)
    return logits


@torch.no_grad()
def absorb_pieces(
    drafter: Any, target: HFTarget, rows: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]]
) -> None:
    """Feed texts, all but their last tokens, some of each row at a time; ``pieces`` are counts per row."""
    features = states_of(target, [row[:-1] for row in rows])
    done = [0] * len(rows)
    for counts in pieces:
        width = max(counts)
        tokens = torch.full((len(rows), width), 3)
        part = {name: torch.full((len(rows), width, WIDTH), 7.0, dtype=v.dtype) for name, v in features.items()}
        for index, (row, start, count) in enumerate(zip(rows, done, counts, strict=True)):
            tokens[index, :count] = torch.tensor(row[start + 1 : start + 1 + count])
            for name, values in features.items():
                part[name][index, :count] = values[index, start : start + count]
        drafter.absorb(part, tokens, counts)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    assert done == [len(row) - 1 for row in rows]


TREE = TokenTree(
    torch.tensor([[0, 11, 12, 13, 14, 15, 16, 17]]).repeat(2, 1),
    torch.tensor([[-1, 0, 0, 2, 1, 2, 5, 3], [-1, 0, 0, 1, 1, 2, 3, 4]]),
)
"""Levels start at columns 0, 1, 3 and 6."""
LEVELS = [(0, 1), (1, 3), (3, 6), (6, 8)]


def check_levels(drafter: Any, target: HFTarget, rows: Sequence[Sequence[int]], which: Sequence[int]) -> None:
    """Logits at every node of ``TREE`` are those of the module run from scratch over the whole text."""
    for level, (first, end) in enumerate(LEVELS, 1):
        tree = TokenTree(TREE.tokens[which][:, :end], TREE.parents[which][:, :end])
        logits = drafter.logits(tree, first, level)
        assert logits.shape[:2] == (len(which), end - first)
        for row in range(len(which)):
            for column in range(first, end):
                node, path = column, []
                while node > 0:
                    path.append(int(tree.tokens[row, node]))
                    node = int(tree.parents[row, node])
                expected = clover_from_scratch(drafter, target, rows[row], path[::-1])
                torch.testing.assert_close(logits[row, column - first], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [512, 4])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_clover_drafts_step_by_step_as_from_scratch(
    exact: HFTarget, monkeypatch: pytest.MonkeyPatch, num_layers: int, chunk: int
) -> None:
    monkeypatch.setattr(clover, "PREFILL_CHUNK", chunk)
    drafter = bound(exact, "clover", {"vocab_size": 30, "num_layers": num_layers})
    rows = [[*range(3, 20)], [50, 40, 30, 20, 10]]
    drafter.begin(2)
    absorb_pieces(drafter, exact, rows, [(11, 2), (0, 1), (3, 0), (2, 1)])
    check_levels(drafter, exact, rows, [0, 1])
    check_levels(drafter, exact, rows, [0, 1])  # drafting left nothing behind

    drafter.keep_rows(torch.tensor([1]))
    check_levels(drafter, exact, rows[1:], [1])


def test_clover_rows_of_a_batch_are_drafted_for_alone(exact: HFTarget) -> None:
    rows = [[*range(3, 20)], [50, 40, 30, 20, 10]]
    for index, row in enumerate(rows):
        drafter = bound(exact, "clover", {"vocab_size": 0, "num_layers": 2})
        drafter.begin(1)
        absorb_pieces(drafter, exact, [row], [(len(row) - 1,)])
        check_levels(drafter, exact, [row], [index])


def test_clover_cache_grows_with_the_text(exact: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clover, "PREFILL_CHUNK", 3)
    drafter = bound(exact, "clover", {"num_layers": 1})
    drafter.begin(1)
    text = [index % 60 for index in range(40)]
    absorb_pieces(drafter, exact, [text], [(1,)] * 39)
    check_levels(drafter, exact, [text], [0])


@pytest.mark.parametrize("num_layers", [1, 3])
def test_medusa_heads_are_what_the_paper_says_one_by_one(exact: HFTarget, num_layers: int) -> None:
    drafter = bound(exact, "medusa", {"vocab_size": 30, "num_layers": num_layers})
    rows = [[*range(3, 20)], [50, 40, 30, 20, 10]]
    drafter.begin(2)
    absorb_pieces(drafter, exact, rows, [(11, 2), (0, 2), (5, 0)])
    features = states_of(exact, [row[:-1] for row in rows])["last"]
    module = drafter.module
    for head in range(4):
        logits = drafter.logits(TREE, 0, head + 1)
        for row, text in enumerate(rows):
            state = features[row, len(text) - 2]
            for layer in range(num_layers):
                mixed = module.weight[layer, head] @ state + module.bias[layer, head]
                state = state + mixed * mixed.sigmoid()
            expected = exact.model.get_output_embeddings().weight[module.vocabulary] @ state
            torch.testing.assert_close(logits[row, 0], expected, rtol=1e-9, atol=1e-9)
    drafter.keep_rows(torch.tensor([1]))
    torch.testing.assert_close(drafter.logits(TREE, 0, 4)[0, 0], expected, rtol=1e-9, atol=1e-9)


def test_medusa_heads_take_any_leading_shape(exact: HFTarget) -> None:
    module = bound(exact, "medusa", {"num_layers": 2}).module
    hidden = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    together = module(hidden)
    assert together.shape == (3, 5, 4, WIDTH)
    torch.testing.assert_close(together[1, 2], module(hidden[1, 2]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "sizes"), DRAFTERS, ids=str)
@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_text_is_that_of_plain_decoding(
    target: HFTarget, name: str, sizes: dict[str, int], fields: dict[str, Any]
) -> None:
    fields = {"max_new_tokens": 14, "seed": 7, **fields}
    expected = [r.token_ids for r in SpecDecoder(target, "none").generate(PROMPTS, **fields)]
    for options in ({}, WIDE, {"depth": 1, "width": 1}):
        decoder = SpecDecoder(
            target, make_drafter(target, name, sizes, **options), on_drafter_error="raise", adaptive=False
        )
        assert [r.token_ids for r in decoder.generate(PROMPTS, **fields)] == expected
        assert decoder.stats.drafted > 0
    assert [decoder.generate(prompt, **fields).token_ids for prompt in PROMPTS] == expected


class CheckedClover(CloverDrafter):
    """Compares the state every draft starts from with one computed from scratch."""

    target: HFTarget
    checked: int

    def propose(self, batch: Batch) -> TokenTree:
        for index, row in enumerate(batch.rows):
            if len(row.tokens) > 1:
                got = self.logits(TokenTree.from_pending(batch.pending), 0, 1)[index, 0]
                expected = clover_from_scratch(self, self.target, row.tokens, ())
                torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
                self.checked += 1
        return super().propose(batch)


def test_clover_keeps_up_with_accepted_paths_and_ending_rows(exact: HFTarget) -> None:
    """Hot coupled text is mostly noise, which the drafter knows: long paths are accepted."""
    drafter = CheckedClover(CloverConfig(**WIDE), random_weights(exact, "clover"))
    drafter.target, drafter.checked = exact, 0
    decoder = SpecDecoder(exact, drafter, on_drafter_error="raise", adaptive=False)
    lengths = set()
    for seed in (3, 5):
        results = decoder.generate(PROMPTS, max_new_tokens=40, temperature=8.0, seed=seed)
        assert decoder.stats.accepted > 25
        lengths |= {len(result.token_ids) for result in results}

    assert drafter.checked > 20
    assert len(lengths) > 2  # rows ended at different times


@pytest.mark.parametrize(("name", "sizes"), DRAFTERS, ids=str)
def test_prompts_of_one_token_have_no_state_to_draft_from(target: HFTarget, name: str, sizes: dict[str, int]) -> None:
    drafter = bound(target, name, sizes)
    batch = make_batch([[4], [9]], VOCAB, SamplingParams())
    drafter.start(batch, None)
    tree = drafter.propose(batch)
    tree.validate(VOCAB)
    drafter.stop()

    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    expected = SpecDecoder(target, "none").generate([4], max_new_tokens=8).token_ids
    assert decoder.generate([4], max_new_tokens=8).token_ids == expected
