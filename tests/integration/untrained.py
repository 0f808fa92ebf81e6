"""Drafters whose weights nobody trained: they run as trained ones do, and guess at random."""

from __future__ import annotations

from dataclasses import asdict

import torch

from integration.architectures import VOCAB
from specdec.drafters.eagle import EagleDrafter, make_eagle
from specdec.drafters.layer import LayerShape
from specdec.drafters.ppd import PPDDrafter
from specdec.drafters.weights import DrafterWeights, TargetFacts
from specdec.target import HFTarget


def untrained_eagle(target: HFTarget, vocab_size: int = VOCAB) -> EagleDrafter:
    torch.manual_seed(0)
    shape = {"layer": asdict(LayerShape.of(target)), "states": ("pre_norm",), "vocab_size": vocab_size}
    weights = DrafterWeights("eagle", TargetFacts.of(target), shape, make_eagle(shape).state_dict())
    return EagleDrafter(weights=weights)


def untrained_ppd(target: HFTarget) -> PPDDrafter:
    torch.manual_seed(0)
    shape = {"hidden_size": int(target.config.hidden_size), "num_tokens": 3, "ensembles": 1}
    embeddings = 0.3 * torch.randn(shape["num_tokens"], shape["ensembles"], shape["hidden_size"])
    return PPDDrafter(weights=DrafterWeights("ppd", TargetFacts.of(target), shape, {"embeddings": embeddings}))
