"""Trained drafters emit more tokens a pass than ngram, by half a token, on held-out prompts; untrained ones do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor, nn

from specdec import SpecDecoder
from specdec.target import HFTarget
from specdec.training.method import create_method
from training.distilled import batch_of, counts_of, train

RING, PROMPT, REPLY, HELD_OUT, BLANK = 13, 4, 24, 8, 0
STEPS = {"medusa": 20, "clover": 10, "eagle": 10, "ppd": 40}
OPTIONS: dict[str, dict[str, Any]] = {
    "medusa": {"vocab_size": 0},
    "clover": {"vocab_size": 0},
    "eagle": {"vocab_size": 0, "num_drafts": 3},
    "ppd": {"vocab_size": 0, "cuts": 16},
}


def rings() -> Tensor:
    """``[7, RING]`` int64, the language: a token's successor is the next on its ring."""
    return (torch.randperm(VOCAB - 6, generator=torch.Generator().manual_seed(0)) + 6).view(-1, RING)


def walks(starts: Tensor, length: int) -> Tensor:
    """``[N, length]`` texts of the language from their first tokens ``[N]``; they repeat after ``RING`` tokens."""
    follow = torch.zeros(VOCAB, dtype=torch.int64)
    follow[rings()] = rings().roll(-1, 1)
    texts = [starts]
    for _ in range(length - 1):
        texts.append(follow[texts[-1]])
    return torch.stack(texts, dim=1)


@pytest.fixture(scope="module")
def target() -> HFTarget:
    """Speaks the language, and reads on where tokens are blank, as PPD's prompt tokens need it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, draw, tokens = tiny_model(initializer_range=0.1), torch.Generator().manual_seed(1), rings().flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)
    for _ in range(200):
        texts = walks(tokens[torch.randint(len(tokens), (48,), generator=draw)], 20)
        blank = torch.rand(texts.shape, generator=draw) < 0.4
        blank[:, 0] = False
        logits = model(texts.masked_fill(blank, BLANK)).logits[:, :-1]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return HFTarget(model.requires_grad_(False))


def tokens_per_pass(target: HFTarget, name: str, prompts: list[list[int]], **options: Any) -> float:
    """Greedy, all prompts together; their texts must be plain decoding's."""
    decoder = SpecDecoder(target, name, drafter_options=options, adaptive=False, on_drafter_error="raise")
    results = decoder.generate(prompts, max_new_tokens=REPLY, ignore_eos=True)
    plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=REPLY, ignore_eos=True)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]
    return decoder.stats.tau


@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_trained_emits_more_tokens_a_pass_than_ngram(target: HFTarget, tmp_path: Path, name: str) -> None:
    """By gradient steps alone: the least-squares start of ``Method.fit`` would do for so simple a language."""
    starts = rings().flatten()[torch.randperm(rings().numel(), generator=torch.Generator().manual_seed(2))]
    prompts = walks(starts, PROMPT).tolist()
    learnt, held_out = prompts[HELD_OUT:], prompts[:HELD_OUT]
    replies = SpecDecoder(target, "none").generate(learnt, max_new_tokens=REPLY, ignore_eos=True)
    texts = [prompt + reply.token_ids for prompt, reply in zip(learnt, replies, strict=True)]
    torch.manual_seed(0)
    method = create_method(name, target, OPTIONS[name])
    batch = batch_of(target, texts, [PROMPT] * len(texts))
    if method.features:
        with torch.no_grad():
            out = target.extend(texts, target.new_cache(len(texts), PROMPT + REPLY), method.features)
        batch = replace(batch, features=out.features)
    method.prepare(counts_of(batch))
    bar = tokens_per_pass(target, "ngram", held_out) + 0.5
    assert bar > 2.0, "a baseline that finds nothing would be easily beaten"
    method.save(tmp_path / "untrained", {})
    assert tokens_per_pass(target, name, held_out, weights=str(tmp_path / "untrained")) < bar
    train(method, batch, steps=STEPS[name], rate=1e-2)
    method.save(tmp_path / "trained", {})
    assert tokens_per_pass(target, name, held_out, weights=str(tmp_path / "trained")) > bar
