"""Training of Medusa heads on the target's own states (Cai et al. 2024, section 2.2.1, with soft targets)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specdec.drafters.medusa import MedusaHeads
from specdec.target import HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod
from specdec.training.method import TrainingBatch


@dataclass(frozen=True)
class MedusaOptions(DistillationOptions):
    """Options of Medusa's training.

    Attributes:
        num_heads: heads, tokens drafted ahead.
        num_layers: residual blocks of each.
    """

    num_heads: int = 4
    num_layers: int = 1

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
        }

    def drafts(self, batch: TrainingBatch, anchors: Anchors) -> Tensor:
        drafts: Tensor = self.module(anchors.pick(batch.features["last"]).float())
        return drafts
