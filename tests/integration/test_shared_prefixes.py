"""Batches that share prefixes: each row's text is what it is alone, whichever drafter and however they nest."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from integration.counting import VOCAB, Counting, counting_target
from specdec.benchmarks.prefix import caches_of, held_bytes
from specdec.decoder import SpecDecoder
from specdec.drafters.none import NoneDrafter
from specdec.latency import LatencyCurve
from specdec.lean_stack import make_lean
from specdec.packing import can_pack, pack_linears
from specdec.target import HFTarget

SYSTEM = [(5 * n) % VOCAB for n in range(40)]
SHOTS = [(11 * n + 3) % VOCAB for n in range(24)]
PROMPTS = [
    [*SYSTEM, *SHOTS, 4, 9, 4, 9],
    [*SYSTEM, *SHOTS, 17],
    [*SYSTEM, 50, 60, 70, 50, 60],
    SYSTEM,
    [*SYSTEM[:-1], 3],
    [8, 8, 9],
]


@pytest.fixture(scope="module")
def target() -> Counting:
    return counting_target()


def make(target: HFTarget, drafter: Any = "none", **options: Any) -> SpecDecoder:
    return SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise", **options)


@pytest.fixture(scope="module")
def alone(target: Counting) -> list[list[int]]:
    decoder = make(target)
    return [decoder.generate(prompt, max_new_tokens=20).token_ids for prompt in PROMPTS]


@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix", "recycling", "lookahead", "skip"])
def test_every_row_writes_what_it_writes_alone(target: Counting, alone: list[list[int]], drafter: str) -> None:
    results = make(target, drafter).generate(PROMPTS, max_new_tokens=20)
    assert [result.token_ids for result in results] == alone


def test_prefixes_are_attended_to_where_they_lie(
    target: Counting, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gathered(*_: Any) -> None:
        raise AssertionError("keys and values were copied together")

    monkeypatch.setattr("specdec.kv_cache.KVCache._whole", gathered)
    assert [each.token_ids for each in make(target, "ngram").generate(PROMPTS, max_new_tokens=20)] == alone


def test_a_window_leaves_a_prefix_row_by_row() -> None:
    torch.manual_seed(1)
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, initializer_range=0.3, max_position_embeddings=256, sliding_window=50,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    windowed = HFTarget(MistralForCausalLM(config))
    separate = [make(windowed).generate(prompt, max_new_tokens=20).token_ids for prompt in PROMPTS]
    assert [each.token_ids for each in make(windowed, "ngram").generate(PROMPTS, max_new_tokens=20)] == separate


def test_sampling_is_that_of_the_row_alone(target: Counting) -> None:
    fields = {"max_new_tokens": 16, "temperature": 0.8, "seed": 3}
    decoder = make(target, "ngram")
    separate = [decoder.generate(prompt, **fields).token_ids for prompt in PROMPTS]
    assert [result.token_ids for result in decoder.generate(PROMPTS, **fields)] == separate


def test_completions_of_one_prompt_share_it(target: Counting) -> None:
    target.computed = 0
    make(target).generate(PROMPTS[0], max_new_tokens=1, n=4, temperature=1.0, seed=0)
    assert target.computed == len(PROMPTS[0]) - 1 + 4


def test_a_drafter_that_reads_hidden_states_sees_all_of_them(target: Counting, alone: list[list[int]]) -> None:
    seen: list[torch.Tensor] = []

    class Reading(NoneDrafter):
        features = ("last",)

        def start(self, batch: Any, output: Any) -> None:
            seen.append(output.features["last"])

    decoder = make(target, Reading())
    results = decoder.generate(PROMPTS, max_new_tokens=20)
    assert [result.token_ids for result in results] == alone
    for row, prompt in enumerate(PROMPTS):
        decoder.generate(prompt, max_new_tokens=1)
        torch.testing.assert_close(seen[0][row, : len(prompt) - 1], seen[-1][0])


def test_a_prefix_is_computed_once_for_all_calls_of_its_block(target: Counting, alone: list[list[int]]) -> None:
    decoder = make(target, "ngram")
    with decoder.prefix([*SYSTEM, *SHOTS]) as kept:
        target.computed = 0
        decoder.generate(PROMPTS[0], max_new_tokens=1)
        assert target.computed == len(PROMPTS[0]) - len(kept.tokens)
        for prompt, text in zip(PROMPTS, alone, strict=True):
            assert decoder.generate(prompt, max_new_tokens=20).token_ids == text
        assert [result.token_ids for result in decoder.generate(PROMPTS, max_new_tokens=20)] == alone
    assert [*SYSTEM, *SHOTS] in decoder.prefixes  # while there is room
    decoder.prefixes.clear()
    assert decoder.generate(PROMPTS[0], max_new_tokens=20).token_ids == alone[0]


def test_a_prefix_that_is_evicted_while_rows_read_it_stays_theirs(target: Counting, alone: list[list[int]]) -> None:
    decoder = make(target)
    with decoder.prefix([*SYSTEM, *SHOTS]) as kept:
        stream = decoder.stream(PROMPTS, max_new_tokens=20)
        pieces = [next(stream)]
        with pytest.raises(ValueError, match="is in use: leave its with-block first"):
            decoder.prefixes.evict(kept.tokens)
    decoder.prefixes.evict(kept.tokens)
    del kept
    assert len(decoder.prefixes) == 0
    gc.collect()
    overwritten = [torch.full((1 << 16,), torch.nan) for _ in range(64)]  # memory that was free would be theirs
    pieces += stream
    assert [result.token_ids for result in stream.results] == alone
    assert len(pieces) == 20 * len(PROMPTS)
    del overwritten


def test_a_prefix_larger_than_the_limit_is_refused(target: Counting) -> None:
    decoder = make(target, prefix_memory="1KiB")
    with pytest.raises(ValueError, match="raise prefix_memory or shorten it"), decoder.prefix(SYSTEM):
        pass
    with pytest.raises(ValueError, match="a size is a number"):
        make(target, prefix_memory="much")


def test_a_prefix_that_no_prompt_could_begin_with_is_refused(target: Counting) -> None:
    decoder, limit = make(target, prefix_memory="1GiB"), target.max_context
    assert limit == 2048
    target.computed = 0
    for length in (limit, limit + 500):
        refused = pytest.raises(ValueError, match=f"the prefix has {length} tokens, the model's context only {limit}")
        with refused, decoder.prefix([3] * length):
            pass
    assert (target.computed, len(decoder.prefixes)) == (0, 0)
    with decoder.prefix([3] * (limit - 1)):
        assert len(decoder.generate([3] * (limit - 1), max_new_tokens=4).token_ids) == 1


def test_rows_wait_for_memory_and_still_share(target: Counting, alone: list[list[int]]) -> None:
    decoder, prompts = make(target), 6 * PROMPTS
    decoder.generate(prompts, max_new_tokens=20)
    assert decoder.memory_plan is not None
    budget = decoder.memory_plan.weights + decoder.memory_plan.working * 2 // 3
    tight = make(target, memory_budget=budget)
    assert [result.token_ids for result in tight.generate(prompts, max_new_tokens=20)] == 6 * alone
    assert tight.memory_plan is not None
    assert 1 < tight.memory_plan.rows < len(prompts)


def peak_of(
    decoder: SpecDecoder, target: HFTarget, prompts: list[list[int]], fields: dict[str, Any]
) -> tuple[list[Any], int]:
    """Results, and the most bytes of keys and values that were allocated at a time."""
    peak = 0
    with caches_of(target) as caches, decoder.stream(prompts, **fields) as stream:
        for _ in stream:
            peak = max(peak, held_bytes(caches))
        return stream.results, peak


@pytest.mark.parametrize("drafter", ["none", "ngram", "recycling"])
def test_memory_is_one_prefix_and_the_suffixes(target: Counting, drafter: str) -> None:
    """Sixteen rows behind 1,024 tokens, 64 new ones each; trees stand where the texts' last tokens will."""
    prefix = [(5 * n + n // 7) % VOCAB for n in range(1024)]
    prompts = [[*prefix, row, row + 1] for row in range(16)]
    fields: dict[str, Any] = {"max_new_tokens": 64, "ignore_eos": True}
    flat = LatencyCurve.simple({1: 1e6, 64: 1.1e6})
    decoder = SpecDecoder(target, drafter, latency=flat, on_drafter_error="raise")
    results, peak = peak_of(decoder, target, prompts, fields)
    token = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes of a float
    least = token * (len(prefix) + 16 * (len(prompts[0]) - len(prefix) + 64))
    assert least <= peak <= 1.05 * least
    assert decoder.memory_plan is not None
    assert decoder.memory_plan.kv == peak
    assert (sum(result.stats.accepted for result in results) > 0) == (drafter != "none")
    for row in (0, 15):
        assert results[row].token_ids == make(target).generate(prompts[row], **fields).token_ids


@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_rows_that_share_less_make_no_longer_buffers_for_the_others(target: Counting, drafter: str) -> None:
    """Most rows begin with system prompt and examples, one with the system prompt alone, one with nothing known."""
    system, shots = [(5 * n + n // 7) % VOCAB for n in range(300)], [(11 * n + n // 3) % VOCAB for n in range(400)]
    prompts = [[*system, *shots, row, row + 1, 3] for row in range(6)] + [[*system, 7, 9], [8, 8, 9]]
    fields: dict[str, Any] = {"max_new_tokens": 32, "ignore_eos": True}
    decoder = SpecDecoder(target, drafter, latency=LatencyCurve.simple({1: 1e6, 64: 1.1e6}), on_drafter_error="raise")
    results, peak = peak_of(decoder, target, prompts, fields)
    token = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes of a float
    own = [3, 3, 3, 3, 3, 3, 2, 3]
    least = token * (700 + sum(count + 32 for count in own))
    assert least <= peak <= 1.05 * least
    assert decoder.memory_plan is not None
    assert decoder.memory_plan.kv >= peak
    for row in (0, 6, 7):
        assert results[row].token_ids == make(target).generate(prompts[row], **fields).token_ids


def test_a_row_that_leaves_takes_its_long_buffers_with_it(target: Counting) -> None:
    """Its text of its own is long, it ends first, and the others have room for theirs from then on."""
    long = [(7 * n + n // 5) % VOCAB for n in range(400)]
    cache = target.new_cache(3, 500)
    cache.fit([500, 30, 40])
    target.extend([long, [1, 2, 3], [4]], cache)
    assert cache.slots == 500
    cache.keep_rows([1, 2])
    assert (cache.slots, cache.room) == (40, 37)
    cache.make_room(38)
    assert cache.slots == 41
    cache.check_integrity()


@pytest.mark.parametrize("drafter", ["none", "ngram", "recycling"])
def test_compiled_layers_write_the_same_text_to_the_token(drafter: str) -> None:
    """In bfloat16, where ties are frequent: there rows equal those of a batch of one to the bit."""
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=VOCAB, initializer_range=0.2, max_position_embeddings=256, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    if not can_pack(model):
        pytest.skip("this CPU does not compute in bfloat16")
    pack_linears(model)
    assert make_lean(model) == 3
    short = HFTarget(model)
    plain = make(short)
    separate = [plain.generate(prompt, max_new_tokens=24).token_ids for prompt in PROMPTS]
    assert [each.token_ids for each in make(short, drafter).generate(PROMPTS, max_new_tokens=24)] == separate
    texts = [each.token_ids for each in make(short, drafter).generate(PROMPTS[:3], max_new_tokens=24, n=2)]
    assert texts == [separate[index] for index in (0, 0, 1, 1, 2, 2)]
    two = make(short, drafter, max_rows=2)
    assert [each.token_ids for each in two.generate(PROMPTS, max_new_tokens=24)] == separate
    decoder = make(short, drafter)
    with decoder.prefix([*SYSTEM, *SHOTS]):
        assert [each.token_ids for each in decoder.generate(PROMPTS, max_new_tokens=24)] == separate
