"""Drafters that follow hidden states take rows in while others run, and draft for each what they would for it alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from integration.architectures import VOCAB, tiny_model
from test_missed import make

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.heads import HeadDrafter
from specdec.drafters.hybrid import HybridConfig, HybridDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.generation import Generation
from specdec.model_shape import ModelShape
from specdec.prefix_store import PrefixStore
from specdec.registry import create_verifier
from specdec.sampling import SamplingParams
from specdec.target import HFTarget
from specdec.tree import PADDING, TokenTree

LONG = [(7 * n + n // 5) % VOCAB for n in range(70)]
PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 10], [*LONG, 3, 4], [11], [*LONG, 5], [12, 13, 12, 13], LONG[:30]]
LENGTHS = [5, 26, 9, 14, 20, 7, 11]
NAMES = ["medusa", "clover", "eagle"]


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model().double())  # so that summing in another order moves no choice


class Trees:
    """What a drafter proposed, by the row's prompt and how many tokens it had."""

    def __init__(self, drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[tuple[int, int], Any] = {}
        self.most_rows = 0
        propose = drafter.propose

        def recorded(batch: Batch) -> TokenTree:
            tree = propose(batch)
            self.most_rows = max(self.most_rows, len(batch))
            for index, row in enumerate(batch.rows):
                real = tree.parents[index] != PADDING
                if row.max_depth >= 5:  # near their end, rows of a batch are drafted for as deep as the others
                    drawn = tree.tokens[index][real].tolist(), tree.parents[index][real].tolist()
                    self.found[row.prompt_index, len(row.tokens)] = drawn
            return tree

        monkeypatch.setattr(drafter, "propose", recorded)


def run(
    target: HFTarget, drafter: Drafter, which: list[int], start: int, most_rows: int, prefixes: PrefixStore | None
) -> list[list[int]]:
    """Texts of rows of which the first ``start`` begin and the others join them."""
    decoder, verifier = SpecDecoder(target, drafter, adaptive=False), create_verifier("greedy")
    rows = []
    for index in which:
        fields = SamplingParams(max_new_tokens=LENGTHS[index], ignore_eos=True)
        row = decoder._make_rows([PROMPTS[index]], fields, verifier)[0]
        row.prompt_index = index
        rows.append(row)
    generation = Generation(
        target, drafter, verifier, rows[:start], raise_drafter_errors=True, most_rows=most_rows, pass_tokens=20,
        prefixes=prefixes,
    )  # fmt: skip
    for row in rows[start:]:
        generation.add(row)
    for _ in generation.passes():
        pass
    return [row.emitted for row in rows]


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("kept", [False, True], ids=["", "kept prefix"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_joins_gets_the_drafts_it_gets_alone(
    target: HFTarget, name: str, start: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = make(name, target)
    alone = Trees(drafter, monkeypatch)
    expected = [run(target, drafter, [index], 1, 1, None)[0] for index in range(len(PROMPTS))]
    plain = SpecDecoder(target, "none")
    assert [plain.generate(prompt, max_new_tokens=length, ignore_eos=True).token_ids
            for prompt, length in zip(PROMPTS, LENGTHS, strict=True)] == expected  # fmt: skip
    other = make(name, target)
    together = Trees(other, monkeypatch)
    store = PrefixStore(target, 2**24, ModelShape.of(target).kv_bytes_per_token) if kept else None
    SpecDecoder(target, other)  # binds it: the features it reads are known from here on
    if store is not None:
        with store.hold(LONG[:50], other.features):
            texts = run(target, other, [*range(len(PROMPTS))], start, 3, store)
    else:
        texts = run(target, other, [*range(len(PROMPTS))], start, 3, store)
    assert texts == expected
    assert together.most_rows == 3
    assert len(together.found) > 20
    assert together.found.items() <= alone.found.items()


@pytest.mark.parametrize("name", NAMES)
def test_served_requests_do_not_wait_for_each_other(target: HFTarget, name: str) -> None:
    decoder = SpecDecoder(target, make(name, target), adaptive=False, on_drafter_error="raise")
    expected = SpecDecoder(target, "none").generate(PROMPTS[2], max_new_tokens=8, ignore_eos=True).token_ids

    async def work() -> None:
        async with decoder.serve(max_rows=2, pass_tokens=20) as server:
            long = await server.submit(PROMPTS[0], max_new_tokens=100, ignore_eos=True)
            await anext(long)
            late = await server.submit(PROMPTS[2], max_new_tokens=8, ignore_eos=True)
            assert (await late.wait()).token_ids == expected
            assert len(long.result.token_ids) < 100
            assert len((await long.wait()).token_ids) == 100

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("ask", ["paying", "always"])
def test_a_hybrids_parts_take_rows_in(target: HFTarget, ask: Any) -> None:
    parts = [NgramDrafter(), make("eagle", target)]
    expected = [run(target, make("eagle", target), [index], 1, 1, None)[0] for index in range(len(PROMPTS))]
    for start in (0, 1, 3):
        drafter = HybridDrafter(parts, HybridConfig(ask=ask))
        assert run(target, drafter, [*range(len(PROMPTS))], start, 3, None) == expected
        assert drafter.takes_rows


def test_heads_that_say_nothing_of_it_get_all_rows_at_once(target: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, rows = make("medusa", target), []
    monkeypatch.setattr(type(drafter), "takes_rows", False)
    start = drafter.start

    def recorded(batch: Batch, output: Any) -> None:
        rows.append(len(batch))
        start(batch, output)

    monkeypatch.setattr(drafter, "start", recorded)
    monkeypatch.setattr(drafter, "join", lambda *_: pytest.fail("it is not to be asked"))
    run(target, drafter, [*range(5)], 5, 3, None)
    assert rows == [3, 2]
    with pytest.raises(NotImplementedError, match="takes no rows while others run"):
        HeadDrafter.add_rows(drafter, drafter)
