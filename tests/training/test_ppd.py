"""Training of prompt tokens: the loss and its gradient against one cut at a time, and that they learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.drafters.ppd import PPDConfig, PPDDrafter
from specdec.drafters.weights import load_weights
from specdec.packing import PackedLinear
from specdec.target import HFTarget
from specdec.training import ppd
from specdec.training.method import TrainingBatch, create_method
from specdec.training.ppd import PPDMethod, PPDOptions

TEXTS = [(list(range(5, 14)), 3), (list(range(40, 66)), 6), ([9, 8, 7, 9, 8, 7, 9, 8], 2)]
"""Token ids and length of the prompt."""


def make_batch(texts: Sequence[tuple[list[int], int]] = TEXTS) -> TrainingBatch:
    width = max(len(tokens) for tokens, _ in texts)
    return TrainingBatch(
        tokens=torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in texts]),
        lengths=torch.tensor([len(tokens) for tokens, _ in texts]),
        prompt_lengths=torch.tensor([prompt for _, prompt in texts]),
    )


def make_method(architecture: str = "llama", **options: Any) -> PPDMethod:
    """On a float64 model, with embeddings unlike each other."""
    method = PPDMethod(HFTarget(tiny_model(architecture).double()), PPDOptions(**options))
    method.module.double()
    with torch.no_grad():
        method.module.embeddings.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    return method


def naive(method: PPDMethod, vocabulary: Tensor | None) -> tuple[Tensor, int, Tensor, Tensor]:
    """Loss, count, hits and totals, by transformers' own passes over one cut and one member at a time."""
    model, options = method.target.model, method.options
    embed = model.get_input_embeddings()
    total, count = torch.zeros((), dtype=torch.float64), 0
    hits = torch.zeros(options.num_tokens, 10, dtype=torch.int64)
    totals = torch.zeros(options.num_tokens, dtype=torch.int64)
    for tokens, prompt in TEXTS:
        teacher = model(torch.tensor([tokens]), use_cache=False).logits[0].detach()
        for last in range(max(prompt - 2, 0), len(tokens) - 2):
            members = []
            for member in range(options.ensembles):
                chain = method.module.embeddings[:, member]
                inputs = torch.cat([embed(torch.tensor(tokens[: last + 1])), chain]).unsqueeze(0)
                members.append(model(inputs_embeds=inputs, use_cache=False).logits[0, last + 1 :])
            student = torch.stack(members).mean(0)  # [k, V]
            for index in range(options.num_tokens):
                if last + index + 2 >= len(tokens):
                    continue
                guess, truth = student[index], teacher[last + 1 + index]
                place = int((guess > guess[tokens[last + index + 2]]).sum())
                totals[index] += 1
                if place < 10:
                    hits[index, place] += 1
                if vocabulary is not None:
                    guess, truth = guess[vocabulary], truth[vocabulary]
                p, q = truth.log_softmax(-1), guess.log_softmax(-1)
                total = total + options.decay**index * (p.exp() * (p - q)).sum()
                count += 1
    return total / count, count, hits, totals


@pytest.mark.parametrize(
    ("architecture", "options", "pass_nodes", "reduced"),
    [
        ("llama", {}, 1024, False),
        ("llama", {"ensembles": 2, "num_tokens": 2, "decay": 0.5}, 20, True),
        ("mistral", {"num_tokens": 4}, 7, False),
        ("gpt2", {}, 1024, False),
        ("gemma3_text", {"ensembles": 2}, 40, True),
    ],
)
def test_loss_gradient_and_hits_equal_one_cut_at_a_time(
    architecture: str, options: dict[str, Any], pass_nodes: int, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppd, "PASS_NODES", pass_nodes)
    method = make_method(architecture, vocab_size=30, **options)
    vocabulary = None
    if reduced:
        counts = torch.zeros(VOCAB, dtype=torch.int64)
        counts[10:45] = torch.arange(35) + 1
        before = method.module.embeddings.detach().clone()
        method.prepare(counts)
        with torch.no_grad():
            method.module.embeddings.copy_(before)
        vocabulary = torch.tensor([2, *range(16, 45)])  # the end of sequence and the 29 most frequent
    expected, count, hits, totals = naive(method, vocabulary)
    (gradient,) = torch.autograd.grad(expected, method.module.embeddings)
    loss, positions = method.loss(make_batch())
    assert positions == count
    # The divergence is in float32: rounding of 6e-8 on log-probabilities of order 10.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    (3.0 * loss).backward()
    assert method.module.embeddings.grad is not None
    torch.testing.assert_close(method.module.embeddings.grad, 3 * gradient, rtol=1e-4, atol=1e-6)
    found, seen = method.hits(make_batch())
    assert found.tolist() == hits.tolist()
    assert seen.tolist() == totals.tolist()
    assert all(parameter.grad is None for parameter in method.target.model.parameters())


def test_a_texts_loss_does_not_depend_on_the_others_in_the_batch() -> None:
    method = make_method()
    alone = [method.loss(make_batch([text])) for text in TEXTS]
    loss, count = method.loss(make_batch())
    assert count == sum(each for _, each in alone)
    expected = sum(float(value.detach()) * each for value, each in alone) / count
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_cuts_are_drawn_from_the_reply_alone_and_anew_each_time() -> None:
    method = make_method(cuts=4)
    batch = make_batch()
    drawn = set()
    for seed in range(100):
        torch.manual_seed(seed)
        places, valid = method._choose(batch, at_random=True)
        for row, (tokens, prompt) in enumerate(TEXTS):
            chosen = places[row][valid[row]].tolist()
            assert len(set(chosen)) == len(chosen) == min(4, len(tokens) - prompt)
            assert all(prompt - 2 <= place <= len(tokens) - 3 for place in chosen)
            drawn.update((row, place) for place in chosen)
    assert len(drawn) == sum(len(tokens) - prompt for tokens, prompt in TEXTS)
    first = method._choose(batch, at_random=False)
    assert torch.equal(first[0], method._choose(batch, at_random=False)[0])


def test_texts_too_short_for_a_guess_have_no_loss() -> None:
    method = make_method()
    loss, count = method.loss(make_batch([([5, 6, 7], 3)]))
    assert (float(loss.detach()), count) == (0.0, 0)
    loss.backward()
    assert method.hits(make_batch([([5, 6, 7], 3)]))[1].tolist() == [0, 0, 0]
    assert bool((method.module.embeddings.grad == 0).all())


def test_training_starts_from_frequent_tokens() -> None:
    method = make_method(ensembles=2)
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    frequent = [11, 22, 33, 44, 55, 66]
    counts[frequent] = 5
    method.prepare(counts)
    table = method.target.model.get_input_embeddings().weight
    assert torch.equal(method.module.embeddings.detach().flatten(0, 1), table[frequent])


def test_training_lowers_the_loss() -> None:
    target = HFTarget(tiny_model("llama"))
    method = create_method("ppd", target, {"cuts": "16", "vocab_size": "0"})
    assert isinstance(method, PPDMethod)
    texts = []
    plain = SpecDecoder(target, "none").generate([[5 + i, 6, 7] for i in range(6)], max_new_tokens=24, ignore_eos=True)
    for index, result in enumerate(plain):
        texts.append(([5 + index, 6, 7, *result.token_ids], 3))
    counts = torch.bincount(torch.tensor([token for tokens, _ in texts for token in tokens]), minlength=VOCAB)
    method.prepare(counts)
    optimizer = torch.optim.AdamW(method.module.parameters(), lr=PPDMethod.learning_rate * 3)
    losses = []
    for seed in range(60):
        torch.manual_seed(seed)
        loss, _ = method.loss(make_batch(texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_saved_weights_draft(tmp_path: Path) -> None:
    target = HFTarget(tiny_model("llama"))
    method = PPDMethod(target, PPDOptions(num_tokens=2, ensembles=2))
    method.save(tmp_path, {"drafter": "ppd", "target": "tiny", "options": {"num_tokens": 2}})
    weights = load_weights(tmp_path)
    assert weights.shape == {"hidden_size": 64, "num_tokens": 2, "ensembles": 2}
    assert json.loads((tmp_path / "config.json").read_text())["facts"]["target"] == "tiny"
    assert "ppd" in (tmp_path / "README.md").read_text()
    trained = method.module.embeddings.detach()
    torch.testing.assert_close(weights.tensors["embeddings"].float(), trained, rtol=2**-8, atol=0)
    drafter = PPDDrafter(PPDConfig(weights=str(tmp_path)))
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    plain = SpecDecoder(target, "none").generate([5, 6, 7], max_new_tokens=12)
    assert decoder.generate([5, 6, 7], max_new_tokens=12).token_ids == plain.token_ids


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        PPDOptions(num_tokens=0)
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 1.5"):
        PPDOptions(decay=1.5)
    target = HFTarget(tiny_model("llama"))
    target.model.model.layers[0].mlp.down_proj = PackedLinear.__new__(PackedLinear)
    torch.nn.Module.__init__(target.model.model.layers[0].mlp.down_proj)
    with pytest.raises(ValueError, match="weights were packed for decoding"):
        PPDMethod(target, PPDOptions())
