"""After every commit the cache holds what a fresh prefill of the same tokens would, on every architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from integration.architectures import ARCHITECTURES, EAGER_ONLY, VOCAB, prefilled, tiny_model
from integration.scripted import ScriptedDrafter, bush
from specdec import KeptPrefix, SpecDecoder
from specdec.batch import Batch
from specdec.kv_cache import KVCache
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

PROMPTS = [[5, 6, 7, 8, 9] * 3, [30, 31], [9, 10, 11, 9, 10, 11, 9]]
NEW_TOKENS = 30

# Float64 rounding, 1e-16, of sums of some hundred products, through four layers, of entries of order 10.
OWN_TOLERANCE = 1e-10
# Where the reference is transformers' eager attention, its softmax is in float32 (6e-8) whatever the model's dtype.
EAGER_TOLERANCE = 1e-4


class CheckingDrafter(ScriptedDrafter):
    """Sees the cache after each commit, before the tokens are appended to the rows."""

    def __init__(self, wholes: Sequence[Sequence[int]], target: HFTarget) -> None:
        super().__init__(bush(wholes, VOCAB))
        self.target = target
        self.caches: list[KVCache] = []
        self.moved = self.ragged = self.commits = 0
        self.worst_fresh = self.worst_reference = 0.0

    def observe(self, *arguments: Any) -> None:
        batch, tree, _, verdict = arguments
        self.check(batch, tree, verdict)

    def check(self, batch: Batch, tree: TokenTree, verdict: Verdict) -> None:
        cache = self.caches[-1]
        cache.check_integrity()
        self.commits += 1
        self.ragged += len(set(verdict.num_accepted)) > 1
        for index, row in enumerate(batch.rows):
            count = verdict.num_accepted[index]
            path = verdict.path[index, : count + 1].tolist()
            self.moved += path != list(range(count + 1))
            tokens = row.tokens + verdict.tokens[index][:count]
            assert cache.row_lengths[index] == len(tokens)
            fresh = self.target.new_cache(1, len(tokens))
            self.target.extend([tokens], fresh)
            reference = prefilled(self.target.model, tokens)
            assert sorted(cache.layers) == sorted(fresh.layers) == list(range(len(reference)))
            for layer, buffers in cache.layers.items():
                own = (fresh.layers[layer].keys[0], fresh.layers[layer].values[0])
                for held, mine, theirs in zip((buffers.keys, buffers.values), own, reference[layer], strict=True):
                    committed = held[index, :, : len(tokens)]
                    self.worst_fresh = max(self.worst_fresh, float((committed - mine).abs().max()))
                    self.worst_reference = max(self.worst_reference, float((committed - theirs).abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_equals_a_fresh_prefill_after_every_commit(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture).double()
    target = HFTarget(model)
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    wholes = [prompt + result.token_ids for prompt, result in zip(PROMPTS, plain, strict=True)]
    drafter = CheckingDrafter(wholes, target)
    new_cache = target.new_cache

    def recorded(batch_size: int, capacity: int) -> KVCache:
        cache = new_cache(batch_size, capacity)
        if capacity > len(wholes[0]):  # not one of the fresh ones
            drafter.caches.append(cache)
        return cache

    monkeypatch.setattr(target, "new_cache", recorded)
    results = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False).generate(
        PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True
    )
    assert [prompt + r.token_ids for prompt, r in zip(PROMPTS, results, strict=True)] == wholes
    assert len(drafter.caches) == 1
    assert drafter.moved > 5, "no accepted node had to move"
    assert drafter.ragged > 2, "all rows accepted alike"
    assert drafter.commits < NEW_TOKENS
    assert drafter.worst_fresh < OWN_TOLERANCE
    assert drafter.worst_reference < (EAGER_TOLERANCE if architecture in EAGER_ONLY else OWN_TOLERANCE)


@pytest.mark.parametrize("close_after", [1, 4, None])
def test_a_kept_prefix_holds_exactly_the_emitted_text(close_after: int | None) -> None:
    """Closed in the middle of a pass or run to its end."""
    model = tiny_model("llama").double()
    target, kept = HFTarget(model), KeptPrefix()
    whole = PROMPTS[0] + SpecDecoder(target, "none").generate(PROMPTS[0], max_new_tokens=NEW_TOKENS).token_ids
    decoder = SpecDecoder(target, ScriptedDrafter(bush([whole], VOCAB)), on_drafter_error="raise")
    with decoder.stream(PROMPTS[0], max_new_tokens=NEW_TOKENS, kept=kept) as stream:
        for index, _ in enumerate(stream):
            if index + 1 == close_after:
                break
    assert kept.cache is not None
    kept.cache.check_integrity()
    text = PROMPTS[0] + stream.result.token_ids
    assert kept.tokens == text[: len(kept.tokens)]
    assert kept.cache.row_lengths == [len(kept.tokens)]
    assert len(text) - 1 <= len(kept.tokens) <= len(text)
    for layer, (keys, values) in enumerate(prefilled(model, kept.tokens)):
        held = kept.cache.layers[layer]
        torch.testing.assert_close(held.keys[0, :, : len(kept.tokens)], keys, rtol=0, atol=OWN_TOLERANCE)
        torch.testing.assert_close(held.values[0, :, : len(kept.tokens)], values, rtol=0, atol=OWN_TOLERANCE)


def test_a_tree_computed_in_parts_equals_one_pass() -> None:
    """A drafter's own model grows its tree level by level over the same cache."""
    for architecture in ("llama", "gemma2", "gpt2"):
        target = HFTarget(tiny_model(architecture).double())
        tokens = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
        parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 1, 1, 0]])
        tree = TokenTree(tokens, parents)
        outputs: list[TargetOutput] = []
        with torch.inference_mode():
            for parts in ([(0, 5)], [(0, 1), (1, 3), (3, 5)]):
                cache = target.new_cache(2, 64)
                target.extend([PROMPTS[0], PROMPTS[1]], cache)
                for start, end in parts:
                    part = TokenTree(tokens[:, :end], parents[:, :end])
                    outputs.append(target.forward(part, cache, first_node=start))
        whole = target.vocab_size, outputs[0].logits
        pieces = torch.cat([output.logits for output in outputs[1:]], dim=1)
        assert pieces.shape == (*tree.tokens.shape, whole[0])
        torch.testing.assert_close(pieces, whole[1], rtol=0, atol=1e-9)
