"""Quantized weights beside the rest: kept prefixes, shared ones, serving and draft models leave the text as it is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from integration.architectures import tiny_model
from integration.checkpoints import save_gguf
from specdec.decoder import SpecDecoder
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.models import load_model
from specdec.panels import panels_run
from specdec.quantization import is_quantized
from specdec.target import HFTarget

VOCAB = 96
HEAD = [(5 * n) % VOCAB for n in range(40)]
PROMPTS = [[*HEAD, 4, 9, 4, 9], [*HEAD, 17], [*HEAD, 50, 60, 70, 50, 60], [8, 8, 9]]
FIELDS: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}


def make_model(seed: int, layers: int = 2) -> Any:
    return tiny_model(
        seed=seed, num_hidden_layers=layers, vocab_size=VOCAB, intermediate_size=128, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip


class Counting(HFTarget):
    """Counts the tokens it computes, padding included."""

    computed = 0

    def run(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        self.computed += tokens.numel()
        return super().run(tokens, *args, **kwargs)


needs_panels = pytest.mark.skipif(not panels_run(), reason="this CPU has none of our own kernels")


@pytest.fixture(
    scope="module",
    params=[
        ("int8", "fp32"), ("int4", "fp32"), pytest.param(("w8a8", "bf16"), marks=needs_panels),
        pytest.param(("gguf-a8", "bf16"), marks=needs_panels),
    ],
    ids=lambda pair: "-".join(pair),
)  # fmt: skip
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Counting:
    quantize, dtype = request.param
    path = tmp_path_factory.mktemp("model")
    if quantize == "gguf-a8":
        path /= "tiny.gguf"
        save_gguf(make_model(3), path)
    else:
        make_model(3).save_pretrained(path)
    model = load_model(str(path), dtype=dtype, device="cpu", packed=True, quantize=quantize).model
    assert is_quantized(model)
    return Counting(model)


def make(target: HFTarget, drafter: Any = "ngram") -> SpecDecoder:
    return SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")


@pytest.fixture(scope="module")
def alone(target: Counting) -> list[list[int]]:
    """What the quantized target writes, prompt by prompt, without drafts."""
    decoder = make(target, "none")
    texts = [decoder.generate(prompt, **FIELDS).token_ids for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == len(PROMPTS)
    return texts


def test_a_kept_prefix(target: Counting, alone: list[list[int]]) -> None:
    decoder = make(target)
    with decoder.prefix(HEAD):
        target.computed = 0
        decoder.generate(PROMPTS[0], max_new_tokens=1)
        assert target.computed == len(PROMPTS[0]) - len(HEAD)
        assert [decoder.generate(prompt, **FIELDS).token_ids for prompt in PROMPTS] == alone


def test_a_batch_that_shares_a_prefix(target: Counting, alone: list[list[int]]) -> None:
    target.computed = 0
    make(target).generate(PROMPTS, max_new_tokens=1)
    assert target.computed < 2 * len(HEAD)  # of three rows that begin with it
    assert [result.token_ids for result in make(target).generate(PROMPTS, **FIELDS)] == alone


@pytest.mark.parametrize("name", ["recycling", "suffix"])
def test_trees_over_a_batch_that_shares_a_prefix(target: Counting, alone: list[list[int]], name: str) -> None:
    target.computed = 0
    decoder = make(target, name)
    decoder.generate(PROMPTS, max_new_tokens=1)
    assert target.computed < 2 * len(HEAD)
    results = decoder.generate(PROMPTS, **FIELDS)
    assert [result.token_ids for result in results] == alone
    nodes = sum(result.stats.drafted for result in results)
    assert nodes > 0
    if name == "recycling":  # the tree is static, and no chain
        assert nodes > sum(depth * count for result in results for depth, count in result.stats.offered_depth.items())


def test_serving(target: Counting, alone: list[list[int]]) -> None:
    async def work() -> list[list[int]]:
        async with make(target).serve(max_rows=3) as server:
            streams = [await server.submit(prompt, **FIELDS) for prompt in PROMPTS]
            return [(await stream.wait()).token_ids for stream in streams]

    assert asyncio.run(asyncio.wait_for(work(), 60)) == alone


@pytest.mark.parametrize("draft", ["another model", "the target before it was quantized"])
def test_a_draft_model(target: Counting, alone: list[list[int]], draft: str) -> None:
    drafter = ModelDrafter(ModelConfig(depth=3), model=make_model(*((4, 1) if draft == "another model" else (3,))))
    decoder = make(target, drafter)
    assert [decoder.generate(prompt, **FIELDS).token_ids for prompt in PROMPTS] == alone
    results = decoder.generate(PROMPTS, **FIELDS)
    assert [result.token_ids for result in results] == alone
    accepted = sum(result.stats.accepted for result in results)
    assert accepted > 0 or draft == "another model"
