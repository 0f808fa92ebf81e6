"""Decoding with a KV cache in 8, 4 or 2 bits: drafts, batches and prefixes leave the text what it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from specdec.cli import main
from specdec.decoder import SpecDecoder
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.kept_prefix import KeptPrefix
from specdec.kv_quantized import WINDOW, QuantizedKVCache
from specdec.latency import LatencyKey
from specdec.lean_stack import make_lean
from specdec.model_shape import ModelShape
from specdec.packing import pack_linears
from specdec.panels import panels_run
from specdec.target import HFTarget

VOCAB = 80
NEW_TOKENS = 48
SETTINGS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCAB, "initializer_range": 0.25, "max_position_embeddings": 1024,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
NAMES = ["int8", "int4", "int2"]


@pytest.fixture(scope="module", params=["float64", "bfloat16, compiled"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return made(request.param, LlamaForCausalLM, LlamaConfig(**SETTINGS))


def made(precision: str, kind: Any, config: Any) -> Any:
    torch.manual_seed(5)
    model = kind(config).eval()
    if precision == "float64":
        return model.double()
    if not panels_run():
        pytest.skip("no C compiler: nothing is compiled")
    pack_linears(model.bfloat16())
    assert make_lean(model) == config.num_hidden_layers
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    """A text that repeats itself with changes, so that drafts are partly accepted."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, VOCAB, (23,), generator=generator).tolist()
    text = (base * (length // 23 + 1))[:length]
    for place in torch.randint(0, length, (length // 10,), generator=generator).tolist():
        text[place] = (text[place] + 1) % VOCAB
    return text


PROMPTS = [prompt(WINDOW + 90), prompt(12, 1), prompt(WINDOW + 20, 2)]


def decoder(model: Any, drafter: Any = "none", **options: Any) -> SpecDecoder:
    return SpecDecoder(model, drafter, adaptive=False, on_drafter_error="raise", **options)


def plain(model: Any, name: str | None, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    alone = decoder(model, kv=name)
    return [alone.generate(each, max_new_tokens=NEW_TOKENS).token_ids for each in prompts]


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM) -> dict[str, list[list[int]]]:
    found = {name: plain(model, name) for name in NAMES}
    dense = plain(model, None)
    assert found["int2"][0] != dense[0]  # else the tests below would show nothing
    assert found["int2"][1] == dense[1]  # shorter than the window: nothing is quantized
    return found


@pytest.mark.parametrize("drafter", ["ngram", "suffix", "recycling"])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_and_batches_leave_the_text_as_it_is(
    model: LlamaForCausalLM, expected: dict[str, list[list[int]]], name: str, drafter: str
) -> None:
    fast = decoder(model, drafter, kv=name)
    assert [each.token_ids for each in fast.generate(PROMPTS, max_new_tokens=NEW_TOKENS)] == expected[name]
    assert [fast.generate(each, max_new_tokens=NEW_TOKENS).token_ids for each in PROMPTS] == expected[name]
    assert fast.stats.accepted > 0


@pytest.mark.parametrize("precision", ["float64", "bfloat16, compiled"])
@pytest.mark.parametrize("window", [40, 200])
def test_sliding_windows_see_what_they_should(window: int, precision: str) -> None:
    sliding = made(precision, MistralForCausalLM, MistralConfig(**SETTINGS, sliding_window=window))
    alone = plain(sliding, "int4")
    if window < WINDOW:  # all it sees is in full
        assert alone == plain(sliding, None)
    fast = decoder(sliding, "ngram", kv="int4")
    assert [each.token_ids for each in fast.generate(PROMPTS, max_new_tokens=NEW_TOKENS)] == alone


def draft_model() -> Any:
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**(SETTINGS | {"num_hidden_layers": 1}))).double().eval()


@pytest.mark.parametrize("kv", [None, "int4"])
def test_a_draft_model_has_a_precision_of_its_own(
    model: LlamaForCausalLM, expected: dict[str, list[list[int]]], kv: str | None
) -> None:
    drafter = ModelDrafter(ModelConfig(depth=3), model=draft_model())
    fast = decoder(model, drafter, kv=kv, draft_kv="int2")
    assert (fast.target.kv_bits, drafter.draft_model.kv_bits) == (None if kv is None else 4, 2)
    wanted = plain(model, None) if kv is None else expected["int4"]
    assert [each.token_ids for each in fast.generate(PROMPTS, max_new_tokens=NEW_TOKENS)] == wanted


def test_prefixes_are_shared_kept_and_cut(model: LlamaForCausalLM) -> None:
    start = prompt(WINDOW + 100, 7)
    prompts = [[*start, 5], [*start, 6, 7, 8], [*start, 6, 7, 9], start[:50], [*start[:-90], 3]]
    alone = plain(model, "int4", prompts)
    fast = decoder(model, "ngram", kv="int4")
    assert [each.token_ids for each in fast.generate(prompts, max_new_tokens=NEW_TOKENS)] == alone
    with fast.prefix(start):
        for index, each in enumerate(prompts):
            assert fast.generate(each, max_new_tokens=NEW_TOKENS).token_ids == alone[index]
        assert [each.token_ids for each in fast.generate(prompts, max_new_tokens=NEW_TOKENS)] == alone
    several = fast.generate(start, max_new_tokens=8, n=3)
    assert len({tuple(each.token_ids) for each in several}) == 1


@pytest.mark.parametrize("back", [0, 5, 150])
def test_a_kept_text_goes_on_or_is_computed_anew(model: LlamaForCausalLM, back: int) -> None:
    fast, kept, first = decoder(model, "ngram", kv="int4"), KeptPrefix(), PROMPTS[0]
    with fast.stream(first, kept=kept, max_new_tokens=30) as stream:
        text = [piece.token_id for piece in stream]
    following = [*[*first, *text][: len(first) + 30 - back], 7, 8, 9]
    with fast.stream(following, kept=kept, max_new_tokens=20) as stream:
        got = [piece.token_id for piece in stream]
    assert got == decoder(model, kv="int4").generate(following, max_new_tokens=20).token_ids


def test_rows_join_while_others_run(model: LlamaForCausalLM, expected: dict[str, list[list[int]]]) -> None:
    fast = decoder(model, "ngram", kv="int4")

    async def answers() -> list[list[int]]:
        async with fast.serve(max_rows=2) as server:
            streams = [await server.submit(each, max_new_tokens=NEW_TOKENS) for each in PROMPTS]
            return [(await stream.wait()).token_ids for stream in streams]

    assert asyncio.run(asyncio.wait_for(answers(), 60)) == expected["int4"]


def test_the_plan_counts_quantized_tokens(model: LlamaForCausalLM) -> None:
    target = HFTarget(model)
    dense = ModelShape.of(target)
    target.kv_bits = 4
    shape, cache = ModelShape.of(target), target.new_cache(1, 4096)
    assert isinstance(cache, QuantizedKVCache)
    target.extend([[1] * 4 * WINDOW], cache)
    assert 0.9 * shape.kv_bytes(4096) < cache.num_bytes <= shape.kv_bytes(4096)
    assert shape.kv_bytes(4096) < 0.5 * dense.kv_bytes(4096)


def test_latency_is_measured_for_each_precision(model: LlamaForCausalLM) -> None:
    targets = [HFTarget(model) for _ in range(3)]
    targets[1].kv_bits, targets[2].kv_bits = 8, 4
    assert len({LatencyKey.of(target).path() for target in targets}) == 3


def test_what_cannot_be_asked_is_said(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="unknown precision of the KV cache 'int3'"):
        SpecDecoder("no such model", kv="int3")
    with pytest.raises(ValueError, match="drafter 'ngram' has none"):
        SpecDecoder(model, "ngram", draft_kv="int4")
    with pytest.raises(ValueError, match="kv_bits = 8"):
        SpecDecoder(HFTarget(model), kv="int8")
    found = CliRunner().invoke(main, ["generate", "-m", "no such model", "--kv", "int9", "text"])
    assert found.exit_code == 2
    assert "unknown precision of the KV cache 'int9'" in found.stderr
