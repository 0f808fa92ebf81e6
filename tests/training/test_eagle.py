"""EAGLE's training: the unrolled head is the one that drafts, and learning raises what is accepted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.drafters.eagle import EagleConfig, EagleDrafter
from specdec.drafters.heads import OutputHead
from specdec.drafters.weights import DrafterWeights, TargetFacts, load_weights
from specdec.sampling import SamplingParams
from specdec.target import HFTarget
from specdec.training.distillation import Anchors
from specdec.training.eagle import EagleMethod, EagleOptions, _ChainAttention, chain_attention
from specdec.training.method import TrainingBatch
from training.distilled import VOCAB, acceptance, batch_of, generated_batch, prepared, train
from training.eagle_reference import from_scratch

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [9], [40, 41, 42, 40, 41] * 3]
WIDE = EagleConfig(depth=4, width=4, branching=6, max_nodes=40)


@pytest.fixture(scope="module")
def exact() -> HFTarget:
    """In float64, so that another order of sums is all that may differ."""
    return HFTarget(tiny_model(initializer_range=0.15).double())


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model(initializer_range=0.15))


def with_features(target: HFTarget, batch: TrainingBatch, names: Any) -> TrainingBatch:
    """The batch with other hidden states of the same texts."""
    texts = [row[:length].tolist() for row, length in zip(batch.tokens, batch.lengths, strict=True)]
    cache = target.new_cache(len(texts), batch.tokens.shape[1])
    with torch.no_grad():
        return replace(batch, features=target.extend(texts, cache, names).features)


def random_weights(target: HFTarget, vocab_size: int = 60) -> DrafterWeights:
    """As training would save them, with noise on every tensor."""
    method = EagleMethod(target, EagleOptions(vocab_size=vocab_size))
    torch.manual_seed(1)
    for parameter in method.module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    method.prepare(torch.arange(VOCAB))
    return DrafterWeights("eagle", TargetFacts.of(target), method.shape, method.module.state_dict())


def bound(target: HFTarget, weights: DrafterWeights) -> EagleDrafter:
    drafter = EagleDrafter(WIDE, weights)
    drafter.bind(target, None)
    return drafter


def test_training_unrolls_the_head_as_it_drafts(exact: HFTarget) -> None:
    weights = random_weights(exact)
    drafter = bound(exact, weights)
    method = EagleMethod(exact, EagleOptions(vocab_size=60, num_drafts=4))
    weights.load_into(method.module)
    method.module.double()
    method.head = OutputHead(exact, method.module.vocabulary)
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, VOCAB, (size,), generator=draw).tolist() for size in (10, 7)]
    batch = with_features(exact, batch_of(exact, texts, [4, 1]), method.features)
    # The method computes in float32; here the same in float64.
    double = TrainingBatch(batch.tokens, batch.lengths, batch.prompt_lengths, batch.features)
    anchors = Anchors.of(double, 4)
    method._table = method._table.double()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", lambda tensor: tensor)
        drafts = method.drafts(double, anchors)
        logits = method.head(drafts)
    checked = 0
    for index, (row, position) in enumerate(zip(anchors.rows.tolist(), anchors.positions.tolist(), strict=True)):
        for draft in range(4):
            if not anchors.valid[index, draft]:
                continue
            text = texts[row]
            path = text[position + 2 : position + 2 + draft]
            expected = from_scratch(drafter, exact, text[: position + 2], path)
            torch.testing.assert_close(logits[index, draft], expected, rtol=1e-9, atol=1e-9)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24, ignore_eos=True),
        SamplingParams(max_new_tokens=24, temperature=1.0, top_k=40, seed=3, ignore_eos=True),
        SamplingParams(max_new_tokens=24, temperature=2.0, repetition_penalty=1.3, seed=3, ignore_eos=True),
    ],
    ids=["greedy", "coupled", "coupled and penalised"],
)
def test_text_is_plain_decodings(target: HFTarget, params: SamplingParams) -> None:
    plain = SpecDecoder(target, "none").generate(PROMPTS, params)
    decoder = SpecDecoder(target, EagleDrafter(WIDE, random_weights(target)), on_drafter_error="raise", adaptive=False)
    for _ in range(2):
        assert [r.token_ids for r in decoder.generate(PROMPTS, params)] == [r.token_ids for r in plain]
    assert [decoder.generate(prompt, params).token_ids for prompt in PROMPTS[:1]] == [plain[0].token_ids]


def test_training_helps_and_the_saved_weights_draft(target: HFTarget, tmp_path: Path) -> None:
    batch = generated_batch(target)
    method = EagleMethod(target, EagleOptions(vocab_size=60, num_drafts=3, int8=False))
    batch = with_features(target, batch, method.features)
    prepared(method, batch)
    before, loss = acceptance(method, batch), float(method.loss(batch)[0].detach())
    train(method, batch, steps=60, rate=3e-3)
    assert float(method.loss(batch)[0].detach()) < loss
    assert acceptance(method, batch)[0] > before[0] + 0.2
    method.save(tmp_path, {})
    assert load_weights(tmp_path).shape["states"] == [2, 1, "pre_norm"]
    decoder = SpecDecoder(
        target, "eagle", drafter_options={"weights": str(tmp_path)}, on_drafter_error="raise", adaptive=False
    )
    result = decoder.generate([5, 6, 7], max_new_tokens=24, ignore_eos=True)
    assert result.stats.tau > 1.5
    plain = SpecDecoder(target, "none").generate([5, 6, 7], max_new_tokens=24, ignore_eos=True)
    assert result.token_ids == plain.token_ids


def test_a_narrower_mlp_is_gone_on_from(target: HFTarget) -> None:
    narrow = random_weights(target)
    method = EagleMethod(target, EagleOptions(vocab_size=60, intermediate=128))
    before = EagleMethod(target, EagleOptions(vocab_size=60))
    before.start_from(narrow)
    assert narrow.shape["layer"]["intermediate_size"] < 128
    method.start_from(narrow)
    assert method.module.layer.gate_proj.weight.shape[0] == 128
    batch = with_features(target, generated_batch(target), method.features)
    anchors = Anchors.of(batch, 2)
    torch.testing.assert_close(method.drafts(batch, anchors), before.drafts(batch, anchors))
    loss = method.loss(batch)[0]
    loss.backward()  # and the channels that are new learn
    assert bool((method.module.layer.down_proj.weight.grad[:, -8:] != 0).any())
    with pytest.raises(ValueError, match="the options ask for"):
        EagleMethod(target, EagleOptions(vocab_size=60, intermediate=8)).start_from(narrow)
    with pytest.raises(ValueError, match="intermediate must be at least 0, got -1"):
        EagleOptions(intermediate=-1)


def test_the_states_are_chosen_within_the_target(target: HFTarget) -> None:
    with pytest.raises(ValueError, match=r"the target has 2 layers, so a state must be in 0\.\.2, got 9"):
        EagleMethod(target, EagleOptions(middle=9))
    with pytest.raises(ValueError, match="num_drafts must be at least 1, got 0"):
        EagleOptions(num_drafts=0)


@pytest.mark.parametrize("steps", [2, 4])
def test_attention_by_the_flash_kernel_is_the_one_over_all_scores(steps: int) -> None:
    torch.manual_seed(steps)
    query, *pairs = (torch.randn(2, 3, 37, 16, requires_grad=True) for _ in range(1 + 2 * steps))
    expected = chain_attention(query, pairs[:steps], pairs[steps:])
    found: Tensor = _ChainAttention.apply(query, *pairs)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [query, *pairs], upstream)
    for mine, theirs in zip(torch.autograd.grad(found, [query, *pairs], upstream), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
