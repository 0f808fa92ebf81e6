"""Self-speculation: what a draft pass computes, that it leaves target and cache as they were, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache
from unit_rows import make_batch

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.skip import SkipConfig, SkipDrafter, SkippedLayers, parse_layers
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.kv_cache import KVCache
from specdec.memory_plan import drafter_kv, drafter_weights
from specdec.target import HFTarget
from specdec.tree import TokenTree

PROMPTS = [[5, 6, 7, 8, 9] * 3, [30, 31], [9, 10, 11, 9, 10, 11, 9]]
# Float64 rounding, 1e-16, of sums of some hundred products, through a few layers, of entries of order 10.
TOLERANCE = 1e-9


def test_layers_are_read_from_indices_and_ranges() -> None:
    assert parse_layers("0-3,7,9-10") == [0, 1, 2, 3, 7, 9, 10]
    for text in ("", "a", "3-1", "1,1", "2,1", "0-2,2", "1,"):
        with pytest.raises(ValueError, match="ascending indices and ranges"):
            parse_layers(text)


def read(target: HFTarget, tokens: list[int]) -> KVCache:
    """A cache in which the target has committed tokens."""
    cache = target.new_cache(1, len(tokens) + 8)
    target.extend([tokens], cache)
    return cache


def chain_logits(draft: SkippedLayers, cache: KVCache, tokens: list[int]) -> Tensor:
    """``[n, V]`` of a chain behind the committed tokens, drafted a token at a time."""
    parts = []
    for count in range(1, len(tokens) + 1):
        tree = TokenTree(torch.tensor([tokens[:count]]), torch.arange(-1, count - 1).unsqueeze(0))
        parts.append(draft.forward(tree, cache, count - 1)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "smollm3", "gpt2"])
@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_an_early_exit_is_the_model_with_its_first_layers_to_rounding(architecture: str, count: int) -> None:
    """Its keys and values are the whole model's, so sharing the cache changes nothing."""
    model = tiny_model(architecture, num_hidden_layers=4).double()
    target = HFTarget(model)
    prompt, drafted = PROMPTS[0], [3, 50, 7]
    draft = SkippedLayers(target, range(count))
    got = chain_logits(draft, read(target, prompt), drafted)
    short = copy.deepcopy(model)
    inner = getattr(short, "model", None) or short.transformer
    name = "layers" if hasattr(inner, "layers") else "h"
    setattr(inner, name, getattr(inner, name)[:count])
    expected = short(torch.tensor([prompt + drafted]), use_cache=False).logits[0, len(prompt) :]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_behind_a_gap_a_draft_reads_the_whole_models_keys_and_values() -> None:
    model = tiny_model("llama", num_hidden_layers=4).double()
    target = HFTarget(model)
    prompt, drafted, kept = PROMPTS[0], [3, 50, 7], [0, 2, 3]
    got = chain_logits(SkippedLayers(target, kept), read(target, prompt), drafted)

    whole = DynamicCache()
    model(torch.tensor([prompt]), past_key_values=whole, use_cache=True)
    short, held = copy.deepcopy(model), DynamicCache()
    short.model.layers = nn.ModuleList([short.model.layers[index] for index in kept])
    for place, layer in enumerate(short.model.layers):
        layer.self_attn.layer_idx = place
        held.update(whole.layers[kept[place]].keys, whole.layers[kept[place]].values, place)
    expected = short(torch.tensor([drafted]), past_key_values=held, use_cache=True).logits[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def proposing(target: HFTarget, prompt: list[int], **options: Any) -> tuple[SkipDrafter, Batch, KVCache]:
    """A drafter in the middle of a generation of one row."""
    drafter = SkipDrafter(SkipConfig(**options))
    drafter.bind(target, None)
    batch = make_batch([prompt], VOCAB)
    batch.cache = cache = read(target, prompt[:-1])
    return drafter, batch, cache


@torch.no_grad()
def test_drafting_leaves_what_is_committed_and_the_model_as_they_were() -> None:
    target = HFTarget(tiny_model("gemma3_text"))
    drafter, batch, cache = proposing(target, PROMPTS[0], layers="0,3")
    length = len(PROMPTS[0]) - 1
    before = {layer: held.keys[:, :, :length].clone() for layer, held in cache.layers.items()}
    layers, kinds = list(target.model.model.layers), list(target.config.layer_types)
    tree = drafter.propose(batch)

    assert int(tree.num_drafted[0]) > 0
    assert cache.row_lengths == [length]
    assert all(torch.equal(held.keys[:, :, :length], before[layer]) for layer, held in cache.layers.items())
    assert list(target.model.model.layers) == layers
    assert target.config.layer_types == kinds


def test_a_pass_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    target = HFTarget(tiny_model("llama"))
    drafter, batch, _ = proposing(target, PROMPTS[0], layers="0")
    layers, head = list(target.model.model.layers), target.model.get_output_embeddings()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(target, "run", fail)
    with pytest.raises(RuntimeError, match="planted"):
        drafter.propose(batch)
    assert list(target.model.model.layers) == layers
    assert target.model.get_output_embeddings() is head


def test_without_a_cache_nothing_is_drafted() -> None:
    target = HFTarget(tiny_model("llama"))
    drafter, batch, _ = proposing(target, PROMPTS[0])
    batch.cache = None
    assert drafter.propose(batch).num_nodes == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_layers_together_are_never_wrong(architecture: str, temperature: float) -> None:
    """Then a draft is the target itself: each pass accepts all of its chain, sampled tokens included."""
    target = HFTarget(tiny_model(architecture).double())
    config = SkipConfig(layers=f"0-{target.num_layers - 1}", depth=3, width=1, branching=1)
    fields: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 2, "ignore_eos": True}
    decoder = SpecDecoder(target, SkipDrafter(config), on_drafter_error="raise", adaptive=False)
    results = decoder.generate(PROMPTS, **fields)
    assert [result.stats.passes for result in results] == [24 // 4] * 3
    plain = SpecDecoder(target, "none").generate(PROMPTS, **fields)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4])
def test_the_end_of_a_text_and_of_the_context_cut_drafts_short(max_new_tokens: int) -> None:
    target = HFTarget(tiny_model("llama", max_position_embeddings=len(PROMPTS[0]) + max_new_tokens))
    plain = SpecDecoder(target, "none").generate(PROMPTS[:2], max_new_tokens=max_new_tokens, ignore_eos=True)
    decoder = SpecDecoder(target, "skip", on_drafter_error="raise", adaptive=False)
    found = decoder.generate(PROMPTS[:2], max_new_tokens=max_new_tokens, ignore_eos=True)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]


def save_layers(folder: Path, target: HFTarget, layers: list[int], vocabulary: list[int]) -> None:
    tensors = {"vocabulary": torch.tensor(vocabulary)}
    save_weights(folder, DrafterWeights("skip", TargetFacts.of(target), {"layers": layers}, tensors), "card")


@torch.no_grad()
def test_a_folder_names_layers_and_the_tokens_that_are_drafted(tmp_path: Path) -> None:
    target = HFTarget(tiny_model("llama", num_hidden_layers=4))
    vocabulary = [3, 9, 11, 40, 41, 90]
    save_layers(tmp_path, target, [0, 2, 3], vocabulary)
    drafter, batch, _ = proposing(target, PROMPTS[0], weights=str(tmp_path), max_nodes=20)
    assert drafter.layers == (0, 2, 3)
    tree = drafter.propose(batch)
    assert set(tree.tokens[0, 1:].tolist()) <= set(vocabulary)
    assert tree.num_nodes > 3

    root = TokenTree.from_pending(batch.pending)
    expected = SkippedLayers(target, [0, 2, 3]).forward(root, read(target, PROMPTS[0][:-1]), 0)
    best = max(vocabulary, key=lambda token: float(expected[0, 0, token]))
    assert int(tree.tokens[0, 1]) == best

    named, _, _ = proposing(target, PROMPTS[0], weights=str(tmp_path), layers="1")
    assert named.layers == (1,)
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=20)
    decoder = SpecDecoder(target, "skip", drafter_options={"weights": str(tmp_path)}, on_drafter_error="raise")
    assert [r.token_ids for r in decoder.generate(PROMPTS, max_new_tokens=20)] == [r.token_ids for r in plain]


def test_it_takes_no_memory_of_its_own_but_a_reduced_head(tmp_path: Path) -> None:
    target = HFTarget(tiny_model("llama"))
    whole = SkipDrafter()
    whole.bind(target, None)
    assert drafter_weights(whole, target) == drafter_kv(whole, rows=2, length=100) == 0
    save_layers(tmp_path, target, [0], [1, 2, 3, 4])
    reduced = SkipDrafter(SkipConfig(weights=str(tmp_path)))
    reduced.bind(target, None)
    assert drafter_weights(reduced, target) == 4 * 64 * 4 + 4 * 8  # rows of the head, and their ids


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    target = HFTarget(tiny_model("llama"))
    for layers in ("2", "0-2"):
        with pytest.raises(ValueError, match=r"layers must ascend within 0 \.\. 1, got"):
            SkipDrafter(SkipConfig(layers=layers)).bind(target, None)
    with pytest.raises(ValueError, match=r"count must be in \[1, 2\]"):
        SkipDrafter(SkipConfig(count=3)).bind(target, None)
    with pytest.raises(ValueError, match="layers='0' and count=1 exclude each other"):
        SkipConfig(layers="0", count=1)
    for name in ("depth", "width", "branching", "max_nodes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            SkipConfig(**{name: 0})
    save_layers(tmp_path, target, [0], [1, 2])
    with pytest.raises(ValueError, match="for another target: hidden_size 64, not 32"):
        SkipDrafter(SkipConfig(weights=str(tmp_path))).bind(HFTarget(tiny_model("llama", hidden_size=32)), None)
