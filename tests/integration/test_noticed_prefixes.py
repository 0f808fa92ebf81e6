"""What prompts of successive calls begin with alike is kept by itself, and leaves texts as they are."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import KeptPrefix
from specdec.decoder import SpecDecoder
from specdec.drafters.none import NoneDrafter
from specdec.lean_stack import make_lean
from specdec.packing import pack_linears
from specdec.panels import panels_run
from specdec.target import HFTarget

VOCAB = 96
SYSTEM = [(5 * n + n // 7) % VOCAB for n in range(150)]
PROMPTS = [[*SYSTEM, row, row + 1, 3, 4] for row in range(6)]
LENGTH = len(PROMPTS[0]) - 1
"""Tokens of a prompt that are computed before the first pass."""


class Counting(HFTarget):
    """Counts the tokens it computes of prompts."""

    computed = 0

    def extend(self, rows: Any, *args: Any, **fields: Any) -> Any:
        self.computed += sum(map(len, rows))
        return super().extend(rows, *args, **fields)

    def extend_all(self, chunks: Any) -> Any:
        self.computed += sum(len(chunk.tokens) for chunk in chunks)
        return super().extend_all(chunks)


def model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, initializer_range=0.3, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def target() -> Counting:
    return Counting(model().double())


def make(target: HFTarget, drafter: Any = "none", **options: Any) -> SpecDecoder:
    return SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise", **options)


def computed(decoder: SpecDecoder, prompts: list[list[int]]) -> list[int]:
    """Of calls with a prompt each."""
    found = []
    for prompt in prompts:
        assert isinstance(decoder.target, Counting)
        decoder.target.computed = 0
        decoder.generate(prompt, max_new_tokens=2)
        found.append(decoder.target.computed)
    return found


def test_the_third_call_builds_on_what_the_first_two_had_in_common(target: Counting) -> None:
    decoder = make(target, keep_prefixes=True)
    assert computed(decoder, PROMPTS[:4]) == [LENGTH, LENGTH, LENGTH - 150, LENGTH - 150]
    assert len(decoder.prefixes) == 1
    assert SYSTEM in decoder.prefixes
    assert decoder.prefixes.num_bytes == 150 * 2 * 2 * 32 * 8  # keys and values, layers, width, bytes of a number
    assert computed(decoder, [[*SYSTEM[:70], 1, 2]]) == [1]  # the part of it that another prompt begins with


def test_little_in_common_or_little_more_than_is_kept_is_not_worth_keeping(target: Counting) -> None:
    decoder = make(target, keep_prefixes=True)
    computed(decoder, [[*SYSTEM[:15], row, 5] for row in range(3)])
    assert len(decoder.prefixes) == 0
    computed(decoder, [*PROMPTS[:2], *([*PROMPTS[0], 1, 2, row] for row in range(3))])
    assert len(decoder.prefixes) == 1
    computed(decoder, [[*PROMPTS[0], *range(30), row] for row in range(3)])
    assert len(decoder.prefixes) == 2  # the longer one refers to the shorter
    assert decoder.prefixes.num_bytes < 1.3 * 150 * 2 * 2 * 32 * 8


def test_it_is_kept_where_rows_are_independent_unless_somebody_says_otherwise(target: Counting) -> None:
    for keep, kept in ((None, 0), (False, 0), (True, 1)):
        decoder = make(target, keep_prefixes=keep)
        computed(decoder, PROMPTS[:2])
        assert len(decoder.prefixes) == kept
    if not panels_run():
        pytest.skip("no C compiler: no rows are independent")
    compiled = model().bfloat16()
    pack_linears(compiled)
    make_lean(compiled)
    assert HFTarget(compiled).invariant
    decoder = make(Counting(compiled))
    plain = [make(HFTarget(compiled), keep_prefixes=False).generate(each, max_new_tokens=24) for each in PROMPTS]
    found = [decoder.generate(each, max_new_tokens=24) for each in PROMPTS]
    assert len(decoder.prefixes) == 1
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]


@pytest.mark.parametrize("name", ["suffix", "recycling"])
def test_texts_are_those_without(target: Counting, name: str) -> None:
    plain = [make(target).generate(each, max_new_tokens=24).token_ids for each in PROMPTS]
    decoder = make(target, name, keep_prefixes=True)
    assert [decoder.generate(each, max_new_tokens=24).token_ids for each in PROMPTS] == plain
    assert [each.token_ids for each in decoder.generate(PROMPTS, max_new_tokens=24)] == plain


class Reading(NoneDrafter):
    """Follows hidden states."""

    features = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []

    def start(self, batch: Any, output: Any) -> None:
        self.read.append(output.features["last"][0].clone())


def test_a_drafter_gets_the_hidden_states_of_what_was_kept(target: Counting) -> None:
    follower, fresh = Reading(), Reading()
    decoder = make(target, follower, keep_prefixes=True)
    assert computed(decoder, PROMPTS[:3])[-1] == LENGTH - 150
    make(target, fresh).generate(PROMPTS[2], max_new_tokens=2)
    torch.testing.assert_close(follower.read[-1], fresh.read[-1], rtol=0, atol=1e-9)  # float64, sums of some hundred


def test_requests_of_a_server_build_on_earlier_ones(target: Counting) -> None:
    decoder = make(target, "suffix", keep_prefixes=True)
    plain = [make(target).generate(each, max_new_tokens=6).token_ids for each in PROMPTS]

    async def answers() -> list[list[int]]:
        found = []
        async with decoder.serve() as server:
            for prompt in PROMPTS:
                target.computed = 0
                found.append((await (await server.submit(prompt, max_new_tokens=6)).wait()).token_ids)
        return found

    assert asyncio.run(asyncio.wait_for(answers(), 60)) == plain
    assert SYSTEM in decoder.prefixes


def test_what_is_kept_makes_room_for_a_call(target: Counting) -> None:
    loose = make(target)
    loose.generate(PROMPTS[0], max_new_tokens=400)
    assert loose.memory_plan is not None
    decoder = make(target, keep_prefixes=True, memory_budget=loose.memory_plan.total)
    computed(decoder, PROMPTS[:2])
    assert len(decoder.prefixes) == 1
    with pytest.raises(ValueError, match="are needed and"):
        decoder.generate(PROMPTS[2], max_new_tokens=1800)
    assert len(decoder.prefixes) == 1  # what cannot be had in any case costs nothing that is kept
    decoder.generate(PROMPTS[2], max_new_tokens=400, ignore_eos=True)  # has no room beside it
    assert decoder.memory_plan == loose.memory_plan
    assert len(decoder.prefixes) == 0  # nor was there any for what this prompt and the last begin with


def test_there_is_a_limit_to_what_is_kept_unasked(target: Counting) -> None:
    decoder = make(target, keep_prefixes=True, prefix_memory=3 * 150 * 2 * 2 * 32 * 8)
    computed(decoder, PROMPTS[:3])
    assert len(decoder.prefixes) == 0


def test_a_conversation_keeps_its_own(target: Counting) -> None:
    decoder, kept = make(target, keep_prefixes=True), KeptPrefix()
    for prompt in (PROMPTS[0], [*PROMPTS[0], 1, 2], [*PROMPTS[0], 1, 2, 3, 4]):
        with decoder.stream(prompt, kept=kept, max_new_tokens=1) as stream:
            list(stream)
    assert len(decoder.prefixes) == 0
