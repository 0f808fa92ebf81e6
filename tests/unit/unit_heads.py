"""Drafters with random weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from integration.architectures import VOCAB

from specdec.drafters.clover import make_clover
from specdec.drafters.layer import LayerShape
from specdec.drafters.medusa import MedusaHeads
from specdec.drafters.weights import DrafterWeights, TargetFacts
from specdec.target import HFTarget

WIDTH = 64
"""Hidden size of the tiny targets."""


def random_weights(target: HFTarget, name: str, vocab_size: int = 0, num_layers: int = 2) -> DrafterWeights:
    """Weights without training, none of them zero."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {"num_layers": num_layers, "vocab_size": vocab_size}
    module: Any
    if name == "medusa":
        shape |= {"hidden_size": WIDTH, "num_heads": 4}
        module = MedusaHeads(**shape)
    else:
        shape |= {"layer": asdict(LayerShape.of(target))}
        module = make_clover(shape)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if module.vocabulary is not None:
        module.vocabulary.copy_(torch.randperm(VOCAB)[:vocab_size].sort().values)
    return DrafterWeights(name, TargetFacts.of(target), shape, module.state_dict())
