"""Prompts are computed in chunks, in the passes of rows that decode: no row waits for a prompt, no text shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specdec.decoder import SpecDecoder
from specdec.filling import LEAST_CHUNK
from specdec.generation import Generation
from specdec.kv_cache import KVCache
from specdec.lean_stack import make_lean
from specdec.packing import can_pack, pack_linears
from specdec.sampling import SamplingParams
from specdec.target import Chunk, HFTarget
from specdec.tree import TokenTree

VOCAB = 96
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "initializer_range": 0.3, "max_position_embeddings": 512,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
LONG = [(7 * n + n // 5) % VOCAB for n in range(150)]
PROMPTS = [[5, 9, 5, 9, 5], LONG, [60, 2, 60, 2], [*LONG[:90], 3, 4], [33]]
LENGTHS = [30, 6, 12, 9, 4]


class Recording(HFTarget):
    """Says what each pass computed: nodes of decoding rows, then tokens of prompts."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.passes: list[tuple[int, int]] = []

    def forward_beside(self, tree: TokenTree, cache: KVCache, chunks: Sequence[Chunk], *args: Any) -> Any:
        self.passes.append((tree.tokens.numel(), sum(len(chunk.tokens) for chunk in chunks)))
        return super().forward_beside(tree, cache, chunks, *args)

    def extend_all(self, chunks: Sequence[Chunk]) -> None:
        self.passes.append((0, sum(len(chunk.tokens) for chunk in chunks)))
        super().extend_all(chunks)


@pytest.fixture(scope="module")
def target() -> Recording:
    torch.manual_seed(3)
    return Recording(LlamaForCausalLM(LlamaConfig(**SIZES)))


def compiled(kind: str) -> Recording:
    """A model whose layers run through the compiled kernels, where a row is the same to the bit in any pass."""
    torch.manual_seed(4)
    sizes = SIZES | {"initializer_range": 0.2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**sizes))
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    if not can_pack(model):
        pytest.skip("this CPU does not compute in bfloat16")
    pack_linears(model)
    assert make_lean(model) == 2
    return Recording(model)


def alone(target: HFTarget, **params: Any) -> list[list[int]]:
    decoder = SpecDecoder(target, "none")
    return [
        decoder.generate(prompt, max_new_tokens=length, **params).token_ids
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]


def together(
    target: Recording, drafter: str, most_rows: int, pass_tokens: int, start: int = 0, **params: Any
) -> list[list[int]]:
    """Texts where ``start`` rows begin and the others join them."""
    decoder = SpecDecoder(target, drafter, adaptive=False)
    rows = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        fields = SamplingParams(max_new_tokens=length, **params)
        verifier = decoder._pick_verifier(fields)
        rows += decoder._make_rows([prompt], fields, verifier)
    generation = Generation(
        target, decoder.drafter, verifier, rows[:start], raise_drafter_errors=True, most_rows=most_rows,
        pass_tokens=pass_tokens,
    )  # fmt: skip
    for row in rows[start:]:
        generation.add(row)
    target.passes = []
    for _ in generation.passes():
        pass
    return [row.emitted for row in rows]


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("drafter", ["none", "ngram", "recycling"])
def test_texts_are_those_of_each_row_alone(target: Recording, drafter: str, start: int) -> None:
    expected = alone(target)
    for most_rows, pass_tokens in ((2, 8), (3, 40), (5, 1000)):
        assert together(target, drafter, most_rows, pass_tokens, start) == expected


def test_sampled_texts_are_those_of_each_row_alone(target: Recording) -> None:
    params = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    assert together(target, "ngram", 3, 40, **params) == alone(target, **params)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_compiled_layers_write_the_same_text_to_the_token(kind: str, drafter: str) -> None:
    """In bfloat16, where ties are frequent."""
    short = compiled(kind)
    assert together(short, drafter, 3, 40, 1) == alone(short)
    assert any(nodes and chunk for nodes, chunk in short.passes)


def test_a_long_prompt_stops_nobody(target: Recording) -> None:
    """One row decodes; a prompt of 149 tokens to compute takes as many passes as its chunks, each of them both's."""
    pass_tokens = 24
    decoder = SpecDecoder(target, "none")
    params = SamplingParams(max_new_tokens=20)
    rows = [decoder._make_rows([prompt], params, decoder._pick_verifier(params))[0] for prompt in (PROMPTS[0], LONG)]
    generation = Generation(
        target, decoder.drafter, decoder._pick_verifier(params), rows[:1], pass_tokens=pass_tokens, most_rows=2
    )
    passes = generation.passes()
    next(passes)
    generation.add(rows[1])
    target.passes, emitted = [], []
    while not rows[1].emitted:
        next(passes)
        emitted.append(len(rows[0].emitted))
    chunk = pass_tokens - 1
    filling = -(-(len(LONG) - 1) // chunk)
    last = len(LONG) - 1 - chunk * (filling - 1)
    assert target.passes == [(1, chunk)] * (filling - 1) + [(1, last), (2, 0)]
    assert emitted == list(range(2, 2 + filling + 1))  # a token a pass, as if it were alone
    passes.close()


def test_passes_keep_to_their_budget(target: Recording) -> None:
    for pass_tokens in (8, 40):
        together(target, "none", 5, pass_tokens, 1)
        mixed = [(nodes, chunk) for nodes, chunk in target.passes if nodes and chunk]
        assert mixed
        assert all(nodes + chunk <= max(pass_tokens, nodes + LEAST_CHUNK) for nodes, chunk in mixed)


def test_what_prompts_share_is_computed_once(target: Recording) -> None:
    """Two of them begin with the same 90 tokens."""
    together(target, "none", 5, 40)
    computed = sum(chunk for _, chunk in target.passes)
    assert computed == sum(len(prompt) - 1 for prompt in PROMPTS) - 90


def test_a_row_cancelled_while_its_prompt_is_computed_leaves_no_trace(target: Recording) -> None:
    expected = alone(target)
    decoder = SpecDecoder(target, "none")
    params = SamplingParams(max_new_tokens=30)
    rows = [decoder._make_rows([prompt], params, decoder._pick_verifier(params))[0] for prompt in PROMPTS[:4]]
    generation = Generation(
        target, decoder.drafter, decoder._pick_verifier(params), rows[:1], pass_tokens=8, most_rows=4
    )
    passes = generation.passes()
    next(passes)
    for row in rows[1:]:
        generation.add(row)
    next(passes)
    next(passes)  # in the middle of what the second and the fourth share
    generation.cancel(rows[1])
    target.passes = []
    for _ in passes:
        pass
    assert [row.emitted[:length] for row, length in zip(rows, LENGTHS, strict=False)] == [
        expected[0], [], expected[2], expected[3]
    ]  # fmt: skip
    assert rows[1].finish_reason == "cancelled"
    for row in rows[2:]:
        assert row.finish_reason == "length"


def test_layers_see_the_tree_and_the_chunks_apart(target: Recording) -> None:
    """A pass of both gives the logits of the tree's own pass, and leaves the caches that own passes leave."""
    tree = TokenTree(torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.tensor([[-1, 0, 0], [-1, 0, 1]]))
    with torch.inference_mode():
        caches = [target.new_cache(2, 16) for _ in range(2)]
        for cache in caches:
            target.extend([[1, 2, 3], [4]], cache)
        chunks = [Chunk(LONG[:7], target.new_cache(1, 4)), Chunk([1, 2], target.new_cache(1, 2))]
        target.extend([[50, 51]], chunks[1].cache)
        beside = target.forward_beside(tree, caches[0], chunks, ("last",))
        expected = target.forward(tree, caches[1], ("last",))
        torch.testing.assert_close(beside.logits, expected.logits)
        torch.testing.assert_close(beside.features["last"], expected.features["last"])
        for chunk, text in zip(chunks, ([*LONG[:7]], [50, 51, 1, 2]), strict=True):
            own = target.new_cache(1, len(text))
            target.extend([text], own)
            assert chunk.cache.row_lengths == [len(text)]
            for layer in own.layers:
                for part, other in zip(chunk.cache.entries(layer, 0), own.entries(layer, 0), strict=True):
                    torch.testing.assert_close(part, other)
