"""A tiny target, texts with its hidden states, and a training loop of a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.target import HFTarget
from specdec.training.method import Method, TrainingBatch

AnyMethod = TypeVar("AnyMethod", bound=Method)
__all__ = [
    "VOCAB",
    "acceptance",
    "batch_of",
    "counts_of",
    "generated_batch",
    "prepared",
    "random_batch",
    "target_model",
    "train",
]


def target_model(dtype: torch.dtype = torch.float32) -> HFTarget:
    """Random, with texts that are not constant."""
    return HFTarget(tiny_model().to(dtype))


def batch_of(target: HFTarget, texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> TrainingBatch:
    """Texts with the target's states, 0 behind the end of each."""
    longest = max(map(len, texts))
    with torch.no_grad():
        out = target.extend(texts, target.new_cache(len(texts), longest), ("last", "pre_norm"))
    lengths = torch.tensor([len(text) for text in texts])
    inside = (torch.arange(longest) < lengths.unsqueeze(1)).unsqueeze(2)
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    return TrainingBatch(tokens, lengths, torch.tensor(prompts), {k: v * inside for k, v in out.features.items()})


def random_batch(target: HFTarget) -> TrainingBatch:
    """Three texts of several lengths, with prompts of 4, 1 and 2 tokens: 4 + 2 + 7 anchors."""
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, VOCAB, (size,), generator=draw).tolist() for size in (8, 4, 9)]
    return batch_of(target, texts, [4, 1, 2])


def generated_batch(target: HFTarget) -> TrainingBatch:
    """What the target greedily writes after a few prompts."""
    prompts = [[5, 6, 7], [9], [40, 41], [30, 20, 10, 3], [60], [70, 71]]
    results = SpecDecoder(target, "none").generate(prompts, max_new_tokens=24, ignore_eos=True)
    texts = [prompt + result.token_ids for prompt, result in zip(prompts, results, strict=True)]
    return batch_of(target, texts, [len(prompt) for prompt in prompts])


def counts_of(batch: TrainingBatch) -> Tensor:
    """``[V]`` how often tokens occur."""
    return torch.bincount(batch.tokens.flatten(), minlength=VOCAB)


def prepared(method: AnyMethod, batch: TrainingBatch) -> AnyMethod:
    """The method, having counted the batch's tokens."""
    method.prepare(counts_of(batch))
    return method


def train(method: Method, batch: TrainingBatch, steps: int, rate: float) -> None:
    """Learn the batch by heart."""
    optimizer = torch.optim.AdamW([p for p in method.module.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        method.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def acceptance(method: Method, batch: TrainingBatch) -> list[float]:
    """How often the first guess is right, per depth."""
    with torch.no_grad():
        found, totals = method.hits(batch)
    rates: list[float] = (found[:, 0] / totals).tolist()
    return rates
