"""Training of EAGLE-3's head (Li et al. 2025): it learns on its own states, as it will run (training-time test)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.eagle import EagleHead, make_eagle
from specdec.drafters.layer import Attend, LayerShape
from specdec.target import Feature, HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod
from specdec.training.initial import Ridge, copy_if_fits, final_norm, layer_tensors
from specdec.training.method import TrainingBatch


@dataclass(frozen=True)
class EagleOptions(DistillationOptions):
    """Options of EAGLE's training.

    Attributes:
        num_drafts: steps the head is unrolled for.
        low: layer of the target whose states are fused as the low ones.
        middle: the middle one, -1 for half the layers.
        high: the high one, -1 for the last, before the final norm.
    """

    num_drafts: int = 5
    low: int = 2
    middle: int = -1
    high: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_drafts < 1:
            raise ValueError(f"num_drafts must be at least 1, got {self.num_drafts}")


class EagleMethod(HeadMethod):
    """The loss of section 3.2: cross-entropy alone, at every step of the unrolled head.

    Args:
        target: the model drafted for.
        options: how to train.
    """

    name = "eagle"
    Options = EagleOptions
    fitted = ("fc.", "mix.", "norm.")
    options: EagleOptions
    module: EagleHead

    def __init__(self, target: HFTarget, options: EagleOptions) -> None:
        super().__init__(target, options)
        self.num_drafts = options.num_drafts
        self.states = choose_states(target, options)
        self.features = tuple(dict.fromkeys((*self.states, "last")))
        self.module = make_eagle(self.shape).to(target.device)
        self._table = target.model.get_input_embeddings().weight.detach()
        start_from(self.module, target)

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "layer": asdict(LayerShape.of(self.target)),
            "states": list(self.states),
            "vocab_size": self.vocab_size,
        }

    @torch.no_grad()
    def fit(self, batches: Iterable[TrainingBatch]) -> None:
        """Set the mix to the ridge regression of the next high state on the embedding and the state before it.

        It predicts its own next input, so it runs ahead of the target as the trained head will.
        """
        assert self.module.mix is not None
        width = self.module.fc.out_features
        ridge = Ridge(2 * width, width)
        for batch in batches:
            anchors = Anchors.of(batch, 1)
            hidden = self.module.fuse({name: batch.features[name].float() for name in self.states})
            embedded = self.module.embedding_norm(self._table[batch.ahead(1)].float())
            inputs = torch.cat([embedded, self.module.hidden_norm(hidden)], dim=-1)
            ridge.add(anchors.pick(inputs), anchors.pick(hidden, 1))
        self.module.mix.weight.copy_(ridge.weight())

    def drafts(self, batch: TrainingBatch, anchors: Anchors) -> Tensor:
        hidden = self.module.fuse({name: batch.features[name].float() for name in self.states})
        positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        chain = Chain()
        drafts = []
        for step in range(self.num_drafts):
            embedded = self._table[batch.ahead(1 + step)].float()
            hidden = self.module(hidden, embedded, positions + step, chain.attention())
            drafts.append(anchors.pick(self.module.read(hidden)))
        return torch.stack(drafts, dim=1)


class Chain:
    """Attention of an unrolled head: step s at a position stands for s drafted tokens behind it.

    It sees the first step's keys up to its position, which the cache will hold, and those of the steps since then at
    its own position, which are the nodes above it.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attention(self) -> Attend:
        """The attention of the next step."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            groups = query.shape[1] // key.shape[1]
            self._keys.append(key.repeat_interleave(groups, dim=1))
            self._values.append(value.repeat_interleave(groups, dim=1))
            return self._attend(query * query.shape[-1] ** -0.5)

        return attend

    def _attend(self, query: Tensor) -> Tensor:
        """``[B, H, T, d_h]`` for scaled queries."""
        length = query.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = (query @ self._keys[0].transpose(2, 3)).masked_fill(future, -torch.inf)  # [B, H, T, T]
        own = [(query * key).sum(-1, keepdim=True) for key in self._keys[1:]]  # [B, H, T, 1] each
        weights = torch.cat([scores, *own], dim=-1).softmax(-1)
        out = weights[..., :length] @ self._values[0]
        for step, value in enumerate(self._values[1:]):
            out = out + weights[..., length + step : length + step + 1] * value
        return out


def choose_states(target: HFTarget, options: EagleOptions) -> tuple[Feature, Feature, Feature]:
    """The states that are fused.

    Raises:
        ValueError: for a layer that the target lacks.
    """
    count = target.num_layers
    low, middle = min(options.low, count), count // 2 if options.middle < 0 else options.middle
    for layer in (low, middle, options.high):
        if not -1 <= layer <= count:
            raise ValueError(f"the target has {count} layers, so a state must be in 0..{count}, got {layer}")
    return low, middle, "pre_norm" if options.high in (-1, count) else options.high


@torch.no_grad()
def start_from(module: EagleHead, target: HFTarget) -> None:
    """Initialise with the target's last layer, reading the high state, so that little data suffices.

    The fused state is the high one. The layer's projections read it as the target's do; what the layer adds is nothing
    yet. Tensors that the target lacks, or has in another shape, keep their random values.
    """
    width = module.fc.out_features
    module.fc.weight.zero_()
    module.fc.weight[:, -width:] = torch.eye(width)
    for have in layer_tensors(target, 1):
        for name, parameter in module.layer.named_parameters():
            part = parameter[:, width:] if name.startswith(("q_", "k_", "v_")) else parameter
            copy_if_fits(part, have.get(name))
    module.layer.o_proj.weight.zero_()
    module.layer.down_proj.weight.zero_()
    copy_if_fits(module.norm.weight, final_norm(target))
