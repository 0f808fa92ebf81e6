"""Training of Clover-2's heads (Xiao et al. 2024): teacher-forced, with a regression to the target's states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.drafters.clover import CloverHead, embed, make_clover, output_table
from specdec.drafters.layer import LayerShape, causal_attention
from specdec.target import HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod
from specdec.training.method import TrainingBatch

_SAMPLE = 256
"""Tokens over which the size of the target's states is measured."""


@dataclass(frozen=True)
class CloverOptions(DistillationOptions):
    """Options of Clover's training.

    Attributes:
        num_layers: layers of the augmenting block, copied from the target's last ones; 0 leaves it out.
        num_drafts: tokens ahead that are trained.
        decay: factor on the loss from each draft depth to the next.
        regression: weight of the smooth L1 distance to the target's states.
    """

    num_layers: int = 2
    num_drafts: int = 5
    decay: float = 0.7
    regression: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_layers", 0), ("num_drafts", 1), ("regression", 0)):
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

    def extra_losses(self, drafts: Tensor, goals: Tensor, anchors: Anchors) -> Tensor:
        count, depth = drafts.shape[:2]
        ahead = torch.arange(count, device=drafts.device).unsqueeze(1) + torch.arange(depth, device=drafts.device)
        wanted = goals[ahead.clamp(max=max(count - 1, 0))]  # [N, K, d]
        distances = F.smooth_l1_loss(drafts, wanted, reduction="none").mean(-1)
        return self.options.regression * distances.masked_fill(~anchors.valid, 0.0)

    def _embed(self, tokens: Tensor) -> Tensor:
        return embed(self._table, tokens).float()


@torch.no_grad()
def start_from(module: CloverHead, target: HFTarget) -> None:
    """Initialise the augmenting block with the target's last layers and the norms with its final one.

    The module's states are the target's divided by their size, so what a copied layer adds to them is divided as well.
    Tensors that the target lacks, or has in another shape, keep their random values.
    """
    layers = _decoder_layers(target)
    count = len(module.layers)
    size = _size_of_states(target) if count else 1.0
    norms: Iterable[Any] = module.norms
    for norm, layer, source in zip(norms, module.layers, layers[max(len(layers) - count, 0) :], strict=False):
        have = dict(source.named_parameters())
        _copy(norm.weight, have.get("input_layernorm.weight"))
        for name, parameter in layer.named_parameters():
            where = "self_attn." if name.startswith(("q_", "k_", "v_", "o_")) else ""
            where = "mlp." if name.startswith(("gate_", "up_", "down_")) else where
            _copy(parameter, have.get(where + name), 1 / size if name.startswith(("o_", "down_")) else 1.0)
    final = getattr(target.model.base_model, "norm", None)
    if isinstance(final, nn.Module) and not isinstance(final, nn.LayerNorm):
        ones = torch.ones(module.first_norm.weight.shape, dtype=target.dtype, device=target.device)
        for mine in (module.first_norm, module.later_norm):
            _copy(mine.weight, final(ones))  # of ones it makes its factors, however it stores them


def _copy(parameter: Tensor, source: Tensor | None, factor: float = 1.0) -> None:
    if source is not None and source.shape == parameter.shape:
        parameter.copy_(source.float() * factor)


def _decoder_layers(target: HFTarget) -> list[nn.Module]:
    layers: Iterable[nn.Module] = getattr(target.model.base_model, "layers", ())
    return list(layers)


def _size_of_states(target: HFTarget) -> float:
    """Median root mean square of the target's states before its final norm, over tokens drawn at random."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (_SAMPLE,), generator=generator).tolist()
    tokens = tokens[: target.max_context]
    with torch.inference_mode():
        out = target.extend([tokens], target.new_cache(1, len(tokens)), ("pre_norm",))
    return float(out.features["pre_norm"].float().square().mean(-1).sqrt().median())
