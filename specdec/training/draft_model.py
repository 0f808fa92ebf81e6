"""Training of a draft model made of the target's own layers: distilled on the target's own text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.drafters.model import USUAL_DEPTH
from specdec.drafters.pruned import PrunedLayers, choose_layers, spaced_layers
from specdec.packing import PackedLinear
from specdec.target import HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod
from specdec.training.method import TrainingBatch


@dataclass(frozen=True)
class DraftModelOptions(DistillationOptions):
    """Options of a draft model.

    Attributes:
        layers: how many of the target's layers it starts from.
        spread: which they are: "ends" takes half from the front and half from the back (``choose_layers``), "even"
            spaces them evenly (``spaced_layers``).
        keep: their indices instead, as "0,1,28,29", whatever ``spread``.
    """

    layers: int = 6
    spread: Literal["ends", "even"] = "ends"
    keep: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if self.spread not in ("ends", "even"):
            raise ValueError(f"spread must be 'ends' or 'even', got {self.spread!r}")
        try:
            [int(index) for index in self.keep.split(",") if self.keep]
        except ValueError:
            raise ValueError(f"keep must be indices as '0,1,28,29', got {self.keep!r}") from None

    def chosen(self, num_layers: int) -> list[int]:
        """The target's layers that are kept; ``PrunedLayers`` checks them."""
        if self.keep:
            return [int(index) for index in self.keep.split(",")]
        choose = spaced_layers if self.spread == "even" else choose_layers
        return choose(num_layers, self.layers)


class DraftModelMethod(HeadMethod):
    """The state at each token learns to give the distribution that the target's state there gives.

    Args:
        target: the model drafted for.
        options: how to train.
    """

    name = "model"
    Options = DraftModelOptions
    features = ("last",)
    num_drafts = 1
    options: DraftModelOptions
    module: PrunedLayers

    def __init__(self, target: HFTarget, options: DraftModelOptions | None = None) -> None:
        options = options or DraftModelOptions()
        if any(isinstance(module, PackedLinear) for module in target.model.modules()):
            raise ValueError("layers cannot be taken out of packed weights: load the model anew")
        if options.layers >= target.num_layers:
            raise ValueError(f"layers must be fewer than the model's {target.num_layers}, got {options.layers}")
        super().__init__(target, options)
        self.module = PrunedLayers(target, **self.shape).to(target.device)
        self.module.copy_layers(target)

    @classmethod
    def options_of(cls, shape: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Method.options_of``: a shape names the layers themselves."""
        layers = shape["layers"]
        return {**super().options_of(shape), "layers": len(layers), "keep": ",".join(map(str, layers))}

    @property
    def shape(self) -> dict[str, Any]:
        return {"layers": self.options.chosen(self.target.num_layers), "vocab_size": self.vocab_size}

    def drafts(self, batch: TrainingBatch, anchors: Anchors) -> Tensor:
        with torch.no_grad():
            embedded = self.target.model.get_input_embeddings()(batch.tokens).float()
        # An anchor is the last token whose state a head knows; a draft model reads the one behind it as well.
        return anchors.pick(self.module(embedded), 1).unsqueeze(1)

    def hits(self, batch: TrainingBatch, ranks: int = 10) -> tuple[Tensor, Tensor]:
        """See ``Method.hits``. A draft model is no worse deeper in the tree, the true tokens before given."""
        found, totals = super().hits(batch, ranks)
        return found.expand(USUAL_DEPTH, -1), totals.expand(USUAL_DEPTH)
