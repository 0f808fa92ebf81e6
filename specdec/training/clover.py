"""Training of Clover-2's heads (Xiao et al. 2024): teacher-forced, with a regression to the target's states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.clover import CloverHead, embed, make_clover, output_table, unit
from specdec.drafters.layer import LayerShape, causal_attention
from specdec.target import HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod
from specdec.training.initial import Ridge, copy_if_fits, final_norm, layer_tensors
from specdec.training.method import TrainingBatch


@dataclass(frozen=True)
class CloverOptions(DistillationOptions):
    """Options of Clover's training.

    Attributes:
        num_layers: layers of the augmenting block, copied from the target's last ones; 0 leaves it out.
        num_drafts: tokens ahead that are trained.
    """

    num_layers: int = 2
    num_drafts: int = 5
    decay: float = 0.7
    regression: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_layers", 0), ("num_drafts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class CloverMethod(HeadMethod):
    """The heads see the true tokens, and their own states, as they will when drafting.

    Args:
        target: the model drafted for.
        options: how to train.
    """

    name = "clover"
    Options = CloverOptions
    fitted = ("first.key_value.", "later.key_value.", "first_out.", "later_out.", "first_norm.", "later_norm.")
    features = ("pre_norm", "last")
    options: CloverOptions
    module: CloverHead

    def __init__(self, target: HFTarget, options: CloverOptions) -> None:
        super().__init__(target, options)
        self.num_drafts = options.num_drafts
        self.module = make_clover(self.shape).to(target.device)
        self._table = output_table(target)
        start_from(self.module, target)

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "layer": asdict(LayerShape.of(self.target)),
            "num_layers": self.options.num_layers,
            "num_drafts": self.options.num_drafts,
            "vocab_size": self.vocab_size,
        }

    @torch.no_grad()
    def fit(self, batches: Iterable[TrainingBatch]) -> None:
        """Set what is linear by ridge regressions to the target's state one token on.

        First the values of the attention decoders, from embedding and state together; then, these given, what the first
        head makes of its state, and the later ones, all depths alike, of theirs and the embedding.
        """
        module, kept = self.module, list(batches)
        width = module.first_out.out_features
        values, first, later = Ridge(2 * width, width), Ridge(width, width), Ridge(2 * width, width)
        for batch in kept:
            anchors = Anchors.of(batch, 1)
            hidden = unit(batch.features["pre_norm"].float())
            inputs = torch.cat([self._embed(batch.ahead(1)), hidden], dim=-1)
            values.add(anchors.pick(inputs), anchors.pick(hidden, 1))
        for decoder in (module.first, module.later):
            decoder.key_value.weight[width:] = values.weight()[:, :width]
        for batch in kept:
            anchors = Anchors.of(batch, self.num_drafts)
            hidden = batch.features["pre_norm"].float()
            positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            states = module.augment(hidden, self._embed(batch.ahead(1)), positions, lambda _: causal_attention)
            states, hidden = anchors.pick(states), unit(hidden)
            first.add(states, anchors.pick(hidden, 1))
            for depth in range(1, self.num_drafts):
                embedded = self._embed(anchors.pick(batch.tokens, 1 + depth))
                states = module.step(states, embedded)
                known = anchors.valid[:, depth]
                later.add(torch.cat([states, embedded], dim=-1)[known], anchors.pick(hidden, 1 + depth)[known])
        module.first_out.weight.copy_(first.weight())
        module.later_out.weight.copy_(later.weight())

    def drafts(self, batch: TrainingBatch, anchors: Anchors) -> Tensor:
        hidden = batch.features["pre_norm"].float()
        positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        following = self._embed(batch.ahead(1))
        states = anchors.pick(self.module.augment(hidden, following, positions, lambda _: causal_attention))
        drafts = [self.module.read_first(states)]
        for depth in range(1, self.num_drafts):
            embedded = self._embed(anchors.pick(batch.tokens, 1 + depth))
            states = self.module.step(states, embedded)
            drafts.append(self.module.read_later(states, embedded))
        return torch.stack(drafts, dim=1)

    def _embed(self, tokens: Tensor) -> Tensor:
        return embed(self._table, tokens).float()


@torch.no_grad()
def start_from(module: CloverHead, target: HFTarget) -> None:
    """Initialise the augmenting block with the target's last layers and the norms with its final one.

    What the block adds is nothing at first. Tensors that the target lacks, or has in another shape, keep their random
    values.
    """
    count = len(module.layers)
    layers: Iterable[Any] = module.layers
    norms: Iterable[Any] = module.norms
    for norm, layer, have in zip(norms, layers, layer_tensors(target, count), strict=False):
        copy_if_fits(norm.weight, have.get("input_layernorm.weight"))
        for name, parameter in layer.named_parameters():
            copy_if_fits(parameter, have.get(name))
    for layer in module.layers:
        for name, parameter in layer.named_parameters():
            if name.startswith(("o_proj", "down_proj")):
                parameter.zero_()
    factors = final_norm(target)
    for mine in (module.first_norm, module.later_norm):
        copy_if_fits(mine.weight, factors)
