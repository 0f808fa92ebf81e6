"""Training of Medusa heads, and what all methods of distillation share: losses, positions, vocabulary, hits, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import SpecDecoder
from specdec.drafters.medusa import MedusaConfig, MedusaDrafter
from specdec.drafters.weights import load_weights
from specdec.target import HFTarget
from specdec.training import distillation
from specdec.training.distillation import Anchors, cross_entropies
from specdec.training.medusa import MedusaMethod, MedusaOptions
from specdec.training.method import TrainingBatch
from training.distilled import (
    VOCAB,
    acceptance,
    counts_of,
    generated_batch,
    prepared,
    random_batch,
    target_model,
    train,
)


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return target_model()


def method_of(target: HFTarget, batch: TrainingBatch, **options: Any) -> MedusaMethod:
    """Prepared, with random weights, so that heads differ."""
    method = prepared(MedusaMethod(target, MedusaOptions(**{"vocab_size": 60, **options})), batch)
    torch.manual_seed(2)
    for parameter in method.module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return method


def loss_by_hand(method: MedusaMethod, batch: TrainingBatch) -> tuple[Tensor, int]:
    """The definition, text by text, head by head."""
    total, count = torch.zeros(()), 0
    last = batch.features["last"].float()
    for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        for position in range(max(prompt - 2, 0), length - 2):
            count += 1
            drafts = method.module(last[row, position])
            for head in range(min(method.num_drafts, length - 2 - position)):
                wanted = method.head(last[row, position + 1 + head]).softmax(-1)
                log_probs = method.head(drafts[head]).log_softmax(-1)
                total = total - method.options.decay**head * (wanted * log_probs).sum()
    return total / count, count


@pytest.mark.parametrize("block", [128, 5, 1])
@pytest.mark.parametrize("vocab_size", [60, 0])
def test_loss_and_gradient_are_those_of_the_definition(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch, block: int, vocab_size: int
) -> None:
    monkeypatch.setattr(distillation, "_BLOCK", block)
    batch = random_batch(target)
    method = method_of(target, batch, vocab_size=vocab_size)
    loss, count = method.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    got = [parameter.grad.clone() for parameter in method.module.parameters() if parameter.grad is not None]
    method.module.zero_grad()
    expected, expected_count = loss_by_hand(method, batch)
    expected.backward()  # type: ignore[no-untyped-call]

    assert count == expected_count == 13
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for mine, parameter in zip(got, method.module.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_gradient_of_the_blockwise_cross_entropy_is_right_in_float64() -> None:
    torch.manual_seed(0)
    head: Any = torch.nn.Linear(5, 7).double().requires_grad_(False)
    drafts = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
    goals = torch.randn(6, 5, dtype=torch.float64)
    valid = torch.ones(6, 3, dtype=torch.bool).triu(-3).flip(1)
    losses = cross_entropies(drafts, goals, head, valid)
    weights = torch.rand(6, 3)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), drafts)

    slow = torch.zeros(6, 3, dtype=torch.float64)
    for n, k in valid.nonzero().tolist():
        if n + k < 6:
            slow[n, k] = -(head(goals[n + k]).softmax(-1) * head(drafts[n, k]).log_softmax(-1)).sum()
    (expected,) = torch.autograd.grad((slow * weights).sum(), drafts)
    torch.testing.assert_close(losses.double(), slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_guesses_of_the_prompt_carry_no_loss(target: HFTarget) -> None:
    batch = random_batch(target)
    anchors = Anchors.of(batch, 4)
    goals = {
        (row, position + 2 + draft)
        for (row, position), valid in zip(
            zip(anchors.rows.tolist(), anchors.positions.tolist(), strict=True), anchors.valid.tolist(), strict=True
        )
        for draft in range(4)
        if valid[draft]
    }
    lengths, prompts = batch.lengths.tolist(), batch.prompt_lengths.tolist()
    # Of a prompt of one token no state is known before the reply's first token.
    assert goals == {(row, at) for row in range(3) for at in range(max(prompts[row], 2), lengths[row])}


def test_what_lies_before_the_prompts_end_and_behind_the_text_changes_nothing(target: HFTarget) -> None:
    batch = random_batch(target)
    method = method_of(target, batch)
    loss, _ = method.loss(batch)
    position = torch.arange(batch.tokens.shape[1])
    unused = (position < batch.prompt_lengths.unsqueeze(1) - 2) | (position >= batch.lengths.unsqueeze(1))
    batch.features["last"][unused] = 1e3
    batch.tokens[unused] = 5

    assert torch.equal(method.loss(batch)[0], loss)


def test_batch_without_a_guess_has_no_loss(target: HFTarget) -> None:
    batch = random_batch(target)
    method = method_of(target, batch)
    empty = TrainingBatch(batch.tokens, batch.prompt_lengths + 0, batch.prompt_lengths, batch.features)
    loss, count = method.loss(empty)
    loss.backward()  # type: ignore[no-untyped-call]

    assert (float(loss.detach()), count) == (0.0, 0)
    assert method.hits(empty)[1].tolist() == [0] * 4


def test_vocabulary_is_the_most_frequent_tokens_and_the_end_of_sequence(target: HFTarget) -> None:
    counts = torch.arange(VOCAB)
    method = MedusaMethod(target, MedusaOptions(vocab_size=5))
    method.prepare(counts)

    assert method.module.vocabulary is not None
    assert target.eos_token_ids == {2}
    assert method.module.vocabulary.tolist() == [2, VOCAB - 4, VOCAB - 3, VOCAB - 2, VOCAB - 1]
    assert torch.equal(method.head.weight, target.model.get_output_embeddings().weight[method.module.vocabulary])


@pytest.mark.parametrize("size", [0, VOCAB, VOCAB + 1])
def test_whole_vocabulary_needs_no_map(target: HFTarget, size: int) -> None:
    method = MedusaMethod(target, MedusaOptions(vocab_size=size))
    method.prepare(torch.ones(VOCAB))

    assert method.module.vocabulary is None
    assert method.shape["vocab_size"] == 0


@pytest.mark.parametrize("vocab_size", [60, 0])
def test_hits_count_the_rank_of_the_true_token(target: HFTarget, vocab_size: int) -> None:
    batch = random_batch(target)
    method = method_of(target, batch, vocab_size=vocab_size)
    ranks = 30
    with torch.no_grad():
        found, totals = method.hits(batch, ranks)
    vocabulary = method.module.vocabulary
    ids = list(range(VOCAB)) if vocabulary is None else vocabulary.tolist()
    expected, seen = torch.zeros(4, ranks, dtype=torch.int64), [0] * 4
    for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        for position in range(max(prompt - 2, 0), length - 2):
            drafts = method.module(batch.features["last"][row, position])
            for head in range(min(4, length - 2 - position)):
                seen[head] += 1
                order = [ids[place] for place in method.head(drafts[head]).argsort(descending=True).tolist()]
                truth = int(batch.tokens[row, position + 2 + head])
                if truth in order[:ranks]:
                    expected[head, order.index(truth)] += 1

    assert totals.tolist() == seen
    assert found.tolist() == expected.tolist()
    assert 0 < int(found.sum()) < sum(seen)


def test_thirty_steps_lower_the_loss_and_raise_the_hits(target: HFTarget) -> None:
    batch = generated_batch(target)
    method = prepared(MedusaMethod(target, MedusaOptions(vocab_size=80)), batch)
    before, hits_before = float(method.loss(batch)[0].detach()), acceptance(method, batch)
    train(method, batch, steps=30, rate=1e-2)

    assert float(method.loss(batch)[0].detach()) < 0.7 * before
    assert all(rate < 0.25 for rate in hits_before)
    assert all(rate > 0.5 for rate in acceptance(method, batch))


@pytest.mark.parametrize("int8", [True, False])
def test_saved_heads_draft_what_was_trained_and_more_than_before(target: HFTarget, tmp_path: Path, int8: bool) -> None:
    batch = generated_batch(target)
    method = prepared(MedusaMethod(target, MedusaOptions(vocab_size=80, int8=int8)), batch)

    def drafted() -> float:
        method.save(tmp_path, {"tokens": 5})
        decoder = SpecDecoder(
            target, MedusaDrafter(MedusaConfig(weights=str(tmp_path))), on_drafter_error="raise", adaptive=False
        )
        prompts = [row[:length].tolist() for row, length in zip(batch.tokens, batch.prompt_lengths, strict=True)]
        results = decoder.generate(prompts, max_new_tokens=24, ignore_eos=True)
        plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=24, ignore_eos=True)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        return decoder.stats.accepted / decoder.stats.passes

    before = drafted()
    train(method, batch, steps=30, rate=1e-2)
    after = drafted()
    assert after > 1.5 * before

    weights = load_weights(tmp_path)
    assert (weights.drafter, weights.shape, weights.facts) == ("medusa", method.shape, {"tokens": 5})
    step = method.module.weight.detach().abs().amax(-1, keepdim=True)
    error = (weights.tensors["weight"].float() - method.module.weight.detach()).abs()
    assert bool((error <= step * (0.5 / 127 if int8 else 2**-8) * 1.001).all())


def test_target_in_bfloat16_is_learned_from_in_float32() -> None:
    rounded = target_model(torch.bfloat16)
    batch = random_batch(rounded)
    assert batch.features["last"].dtype == torch.bfloat16
    method = method_of(rounded, batch)
    loss, _ = method.loss(batch)

    assert loss.dtype == method.module.weight.dtype == method.head.weight.dtype == torch.float32
    assert bool(loss.isfinite())
    assert rounded.model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_training_leaves_the_target_as_it_was(target: HFTarget) -> None:
    batch = random_batch(target)
    before = [parameter.clone() for parameter in target.model.parameters()]
    train(method_of(target, batch, vocab_size=0), batch, steps=2, rate=0.1)

    assert all(torch.equal(old, new) for old, new in zip(before, target.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in target.model.parameters())


def test_counts_may_lack_tokens(target: HFTarget) -> None:
    batch = random_batch(target)
    assert int((counts_of(batch) > 0).sum()) < 60
    assert method_of(target, batch, vocab_size=60).module.vocabulary is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"vocab_size": -1}, r"vocab_size must be at least 0 .*, got -1"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0\.0"),
        ({"decay": float("nan")}, r"decay must be in \(0, 1\], got nan"),
    ],
)
def test_impossible_options_are_refused_with_their_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MedusaOptions(**options)


def test_the_linear_maps_start_as_the_least_squares_solution(target: HFTarget) -> None:
    batch = generated_batch(target)
    method = prepared(MedusaMethod(target, MedusaOptions(vocab_size=0)), batch)
    before = acceptance(method, batch)
    method.fit([batch])

    assert method.module.mix is not None
    last, known, wanted = batch.features["last"].float(), [], []
    for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
        for position in range(max(prompt - 2, 0), length - 3):  # the second head's goal is three tokens on
            known.append(last[row, position])
            wanted.append(last[row, position + 2])
    inputs, outputs = torch.stack(known).double(), torch.stack(wanted).double()
    ridge = 1e-2 * (inputs.T @ inputs).diagonal().mean() + 1e-9
    gram = inputs.T @ inputs + ridge * torch.eye(inputs.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(gram, inputs.T @ outputs).T.float()
    torch.testing.assert_close(method.module.mix[1], expected, rtol=1e-3, atol=1e-4)
    assert acceptance(method, batch)[0] > before[0]


def test_the_published_form_has_no_linear_maps(target: HFTarget) -> None:
    method = prepared(MedusaMethod(target, MedusaOptions(vocab_size=0, mixed=False)), generated_batch(target))
    method.fit([generated_batch(target)])
    assert method.module.mix is None
    hidden = torch.randn(2, method.shape["hidden_size"])
    torch.testing.assert_close(method.module(hidden), hidden.unsqueeze(1).expand(-1, method.num_drafts, -1))
