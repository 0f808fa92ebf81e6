"""Training of Medusa heads on the target's own states (Cai et al. 2024, section 2.2.1, with soft targets)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.medusa import MedusaHeads
from specdec.target import HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod
from specdec.training.initial import Ridge
from specdec.training.method import TrainingBatch


@dataclass(frozen=True)
class MedusaOptions(DistillationOptions):
    """Options of Medusa's training.

    Attributes:
        num_heads: heads, tokens drafted ahead.
        num_layers: residual blocks of each.
        mixed: a linear map per head, fitted in closed form, in place of the identity; false is the published form,
            which other engines load.
    """

    num_heads: int = 4
    num_layers: int = 1
    mixed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class MedusaMethod(HeadMethod):
    """Head i reads the state at t and learns the target's distribution at t + 1 + i.

    Args:
        target: the model drafted for.
        options: how to train.
    """

    name = "medusa"
    Options = MedusaOptions
    features = ("last",)
    fitted = ("mix",)
    options: MedusaOptions
    module: MedusaHeads

    def __init__(self, target: HFTarget, options: MedusaOptions) -> None:
        super().__init__(target, options)
        self.num_drafts = options.num_heads
        self.module = MedusaHeads(**self.shape).to(target.device)

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "hidden_size": int(self.target.config.hidden_size),
            "num_heads": self.options.num_heads,
            "num_layers": self.options.num_layers,
            "vocab_size": self.vocab_size,
            "mixed": self.options.mixed,
        }

    @torch.no_grad()
    def fit(self, batches: Iterable[TrainingBatch]) -> None:
        """Set each head's linear map to the ridge regression of the state it is to foresee on the one it reads."""
        if self.module.mix is None:
            return
        width = self.module.mix.shape[-1]
        ridges = [Ridge(width, width) for _ in range(self.num_drafts)]
        for batch in batches:
            anchors = Anchors.of(batch, self.num_drafts)
            last = batch.features["last"].float()
            for depth, ridge in enumerate(ridges):
                known = anchors.valid[:, depth]
                ridge.add(anchors.pick(last)[known], anchors.pick(last, 1 + depth)[known])
        self.module.mix.copy_(torch.stack([ridge.weight() for ridge in ridges]))

    def drafts(self, batch: TrainingBatch, anchors: Anchors) -> Tensor:
        drafts: Tensor = self.module(anchors.pick(batch.features["last"]).float())
        return drafts
