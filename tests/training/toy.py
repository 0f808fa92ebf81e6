"""A model that writes printable text, a tokenizer for it, texts, and a method that learns one linear layer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cli.tiny_chat import TEMPLATE, make_model, make_tokenizer
from integration.architectures import VOCAB, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.target import HFTarget
from specdec.training.method import Method, TrainingBatch
from specdec.training.texts import TrainingText


def chat_target(template: str | None = TEMPLATE) -> tuple[HFTarget, Any]:
    """A random chat model that writes printable ASCII and ends a message after about 20 sampled tokens."""
    tokenizer = make_tokenizer(template)
    model = make_model(tokenizer)
    end = tokenizer.eos_token_id
    printable = tokenizer("".join(map(chr, range(32, 127)))).input_ids
    head = nn.Linear(model.config.hidden_size, len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.fill_(-1e4)
        head.bias[printable] = 0.0
        head.bias[end] = 2.0
        head.weight[end] = 0.0
    model.lm_head = head
    return HFTarget(model), tokenizer


def random_texts(count: int, seed: int = 0, longest: int = 24) -> list[TrainingText]:
    """Texts of random tokens of the tiny architectures' vocabulary."""
    rng = random.Random(seed)
    return [
        TrainingText(
            tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 5))),
            tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(4, longest))),
        )
        for _ in range(count)
    ]


def tiny_target() -> HFTarget:
    """A tiny random Llama."""
    return HFTarget(tiny_model())


@dataclass(frozen=True)
class ToyOptions:
    """Options of the toy.

    Attributes:
        noise: added to what is read, so that random numbers matter.
        explode: makes every loss infinite.
        muon: which optimizer the matrix learns by.
    """

    noise: float = 0.1
    explode: bool = False
    muon: bool = False


class ToyMethod(Method):
    """Predicts the token two places ahead with one linear layer."""

    name = "toy"
    Options = ToyOptions
    features = ("last", 1)

    def __init__(self, target: HFTarget, options: ToyOptions) -> None:
        self.options, self.muon = options, options.muon
        self.module = nn.Linear(2 * target.config.hidden_size, target.vocab_size)
        self.counts: Tensor | None = None

    def prepare(self, counts: Tensor) -> None:
        self.counts = counts

    def _logits(self, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
        trained = batch.trained(2)
        states = torch.cat([batch.features["last"], batch.features[1]], dim=-1).float()[trained]
        states = states + self.options.noise * torch.randn(states.shape)
        return self.module(states), batch.ahead(2)[trained]

    def loss(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        logits, goal = self._logits(batch)
        loss = nn.functional.cross_entropy(logits, goal)
        return (loss * torch.inf if self.options.explode else loss), len(goal)

    def hits(self, batch: TrainingBatch, ranks: int = 10) -> tuple[Tensor, Tensor]:
        logits, goal = self._logits(batch)
        found = logits.topk(ranks).indices == goal.unsqueeze(1)
        return found.sum(0).unsqueeze(0), torch.tensor([len(goal)])

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        save_file(dict(self.module.state_dict()), folder / "model.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts))
