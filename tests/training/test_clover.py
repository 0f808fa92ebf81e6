"""Training of Clover's heads: the loss of the paper, teacher-forced as it will draft, started from the target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import tiny_model
from torch import Tensor
from torch.nn import functional as F

from specdec import SpecDecoder
from specdec.drafters.clover import CloverConfig, CloverDrafter, CloverHead, embed, make_clover
from specdec.drafters.layer import causal_attention
from specdec.drafters.weights import load_weights
from specdec.target import HFTarget
from specdec.training.clover import CloverMethod, CloverOptions, start_from
from specdec.training.method import TrainingBatch
from training.distilled import VOCAB, acceptance, generated_batch, prepared, random_batch, target_model, train

DRAFTS = 5


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return target_model()


def method_of(target: HFTarget, batch: TrainingBatch, **options: Any) -> CloverMethod:
    """Prepared, with random weights."""
    method = prepared(CloverMethod(target, CloverOptions(**{"vocab_size": 60, **options})), batch)
    torch.manual_seed(2)
    for parameter in method.module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return method


def drafts_by_hand(method: CloverMethod, batch: TrainingBatch, row: int, position: int, length: int) -> list[Tensor]:
    """What the output head reads after the true tokens up to ``position + 1``, for each of the drafts."""
    module, table = method.module, method.target.model.get_output_embeddings().weight
    tokens = batch.tokens[row]
    hidden = batch.features["pre_norm"][row : row + 1, : position + 1]
    embedded = embed(table, tokens[1 : position + 2]).unsqueeze(0)
    places = torch.arange(position + 1).unsqueeze(0)
    state = module.augment(hidden, embedded, places, lambda _: causal_attention)[0, -1]
    outs = [module.read_first(state)]
    for draft in range(1, min(DRAFTS, length - 2 - position)):
        word = embed(table, tokens[position + 1 + draft])
        state = module.step(state, word)
        outs.append(module.read_later(state, word))
    return outs


@pytest.mark.parametrize("num_layers", [0, 2])
def test_loss_and_gradient_are_those_of_the_definition(target: HFTarget, num_layers: int) -> None:
    batch = random_batch(target)
    method = method_of(target, batch, num_layers=num_layers)
    loss, count = method.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    got = {name: parameter.grad.clone() for name, parameter in method.module.named_parameters()}  # type: ignore[union-attr]
    method.module.zero_grad()

    total, expected_count = torch.zeros(()), 0
    for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        for position in range(max(prompt - 2, 0), length - 2):
            expected_count += 1
            for draft, out in enumerate(drafts_by_hand(method, batch, row, position, length)):
                wanted = batch.features["last"][row, position + 1 + draft]
                cross_entropy = -(method.head(wanted).softmax(-1) * method.head(out).log_softmax(-1)).sum()
                total = total + 0.7**draft * (10 * F.smooth_l1_loss(out, wanted) + cross_entropy)
    expected = total / expected_count
    expected.backward()  # type: ignore[no-untyped-call]

    assert count == expected_count == 13
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in method.module.named_parameters():
        assert parameter.grad is not None, name
        # What cancels keeps the roundings of what it was: some hundred of them, each of half an ulp of the largest.
        slack = 2.0**-16 * float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name], parameter.grad, rtol=0, atol=slack, msg=name)


def test_hits_are_teacher_forced_and_of_the_reply_only(target: HFTarget) -> None:
    batch = random_batch(target)
    method = method_of(target, batch, vocab_size=12)
    with torch.no_grad():
        found, totals = method.hits(batch, VOCAB)
        expected, seen = torch.zeros(DRAFTS, VOCAB, dtype=torch.int64), [0] * DRAFTS
        ids = [] if method.module.vocabulary is None else method.module.vocabulary.tolist()
        for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
            for position in range(max(prompt - 2, 0), length - 2):
                for draft, out in enumerate(drafts_by_hand(method, batch, row, position, length)):
                    seen[draft] += 1
                    truth = int(batch.tokens[row, position + 2 + draft])
                    if truth in ids:
                        logits = method.head(out)
                        expected[draft, int((logits > logits[ids.index(truth)]).sum())] += 1

    assert totals.tolist() == seen
    assert found.tolist() == expected.tolist()
    assert 0 < int(found.sum()) < sum(seen)  # tokens outside the vocabulary are misses


def test_what_stands_behind_a_text_changes_nothing(target: HFTarget) -> None:
    batch = random_batch(target)
    method = method_of(target, batch)
    loss, _ = method.loss(batch)
    behind = torch.arange(batch.tokens.shape[1]) >= batch.lengths.unsqueeze(1)
    for name in ("last", "pre_norm"):
        batch.features[name][behind] = 1e3
    batch.tokens[behind] = 5

    torch.testing.assert_close(method.loss(batch)[0], loss)


def test_thirty_steps_lower_the_loss_and_raise_the_hits(target: HFTarget) -> None:
    batch = generated_batch(target)
    method = prepared(CloverMethod(target, CloverOptions(vocab_size=80)), batch)
    before, hits_before = float(method.loss(batch)[0].detach()), acceptance(method, batch)
    train(method, batch, steps=30, rate=5e-3)

    assert float(method.loss(batch)[0].detach()) < 0.6 * before
    assert all(rate < 0.25 for rate in hits_before)
    assert all(rate > 0.5 for rate in acceptance(method, batch))


@pytest.mark.parametrize(("int8", "num_layers"), [(True, 2), (False, 1), (False, 0)])
def test_saved_heads_draft_what_was_trained(target: HFTarget, tmp_path: Path, int8: bool, num_layers: int) -> None:
    batch = generated_batch(target)
    method = prepared(CloverMethod(target, CloverOptions(vocab_size=80, int8=int8, num_layers=num_layers)), batch)
    train(method, batch, steps=30, rate=5e-3)
    method.save(tmp_path, {"tokens": 5})
    weights = load_weights(tmp_path)
    assert (weights.drafter, weights.shape, weights.facts) == ("clover", method.shape, {"tokens": 5})

    decoder = SpecDecoder(
        target, CloverDrafter(CloverConfig(weights=str(tmp_path))), on_drafter_error="raise", adaptive=False
    )
    prompts = [row[:length].tolist() for row, length in zip(batch.tokens, batch.prompt_lengths, strict=True)]
    results = decoder.generate(prompts, max_new_tokens=24, ignore_eos=True)
    plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=24, ignore_eos=True)

    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert decoder.stats.emitted / decoder.stats.passes > 2.0


def test_untrained_head_guesses_like_the_targets_last_layers(target: HFTarget) -> None:
    """Nothing of the new parts is in the way: W1 passes on, values are zero, the last norm is the target's."""
    module = make_clover(CloverMethod(target, CloverOptions(num_layers=0)).shape)
    start_from(module, target)
    hidden = 20 * torch.randn(1, 6, 64)
    states = module.augment(hidden, torch.randn(1, 6, 64), torch.arange(6).unsqueeze(0), lambda _: causal_attention)
    expected = target.model.model.norm(hidden)

    torch.testing.assert_close(module.read_first(states), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.read_later(states, torch.randn(1, 6, 64)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.step(states, torch.randn(1, 6, 64)), states)


def test_augmenting_layers_start_as_the_targets_last_ones() -> None:
    target = HFTarget(tiny_model(num_hidden_layers=3))
    method = CloverMethod(target, CloverOptions(num_layers=2))
    for mine, norm, theirs in zip(
        method.module.layers, method.module.norms, target.model.model.layers[1:], strict=True
    ):
        assert torch.equal(mine.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(mine.up_proj.weight, theirs.mlp.up_proj.weight)
        assert torch.equal(norm.weight, theirs.input_layernorm.weight)
        assert not mine.down_proj.weight.any()
        assert not mine.o_proj.weight.any()
        assert mine.q_proj.weight.data_ptr() != theirs.self_attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen3", "gemma2", "olmo2", "mixtral", "phi3"])
def test_targets_of_other_kinds_are_trained_for(architecture: str) -> None:
    """What does not fit keeps its random values."""
    target = HFTarget(tiny_model(architecture))
    batch = random_batch(target)
    method = prepared(CloverMethod(target, CloverOptions(vocab_size=50, num_layers=3)), batch)
    before = float(method.loss(batch)[0].detach())
    train(method, batch, steps=10, rate=1e-3)

    assert float(method.loss(batch)[0].detach()) < before


def test_module_starts_the_same_for_a_seed(target: HFTarget) -> None:
    def made() -> CloverHead:
        torch.manual_seed(4)
        return CloverMethod(target, CloverOptions()).module

    first, second = made(), made()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": -1}, "num_layers must be at least 0, got -1"),
        ({"num_drafts": 0}, "num_drafts must be at least 1, got 0"),
        ({"regression": -0.5}, r"regression must be at least 0, got -0\.5"),
        ({"decay": 1.5}, r"decay must be in \(0, 1\], got 1\.5"),
    ],
)
def test_impossible_options_are_refused_with_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CloverOptions(**options)
