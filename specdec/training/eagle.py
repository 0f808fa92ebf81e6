"""Training of EAGLE-3's head (Li et al. 2025): it learns on its own states, as it will run (training-time test)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from specdec.drafters.eagle import EagleHead, make_eagle
from specdec.drafters.layer import Attend, LayerShape
from specdec.drafters.weights import DrafterWeights
from specdec.target import Feature, HFTarget
from specdec.training.distillation import Anchors, DistillationOptions, HeadMethod, computing_dtype
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
        intermediate: width of the layer's MLP, 0 for that of the target's; finished weights with a narrower one may be
            gone on from.
    """

    num_drafts: int = 5
    regression: float = 10.0
    muon: bool = True
    low: int = 2
    middle: int = -1
    high: int = -1
    intermediate: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_drafts < 1:
            raise ValueError(f"num_drafts must be at least 1, got {self.num_drafts}")
        if self.intermediate < 0:
            raise ValueError(f"intermediate must be at least 0, got {self.intermediate}")


class EagleMethod(HeadMethod):
    """The loss of section 3.2, at every step of the unrolled head, and a distance between states.

    EAGLE-3 does without the distance and says why: it limits what plenty of text can teach. With the million tokens
    that two cores write in an hour or two it is missed (docs/training.md).

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
        layer = asdict(LayerShape.of(self.target))
        if self.options.intermediate:
            layer["intermediate_size"] = self.options.intermediate
        return {
            "layer": layer,
            "states": list(self.states),
            "vocab_size": self.vocab_size,
        }

    def start_from(self, weights: DrafterWeights) -> None:
        super().start_from(self._widened(weights))

    def _widened(self, weights: DrafterWeights) -> DrafterWeights:
        """The same function with an MLP as wide as the module's: the channels it did not have add nothing yet."""
        layer = self.module.layer
        have, wanted = weights.shape.get("layer", {}).get("intermediate_size", 0), layer.shape.intermediate_size
        if weights.drafter != self.name or not 0 < have < wanted:
            return weights
        shape = {**weights.shape, "layer": {**weights.shape["layer"], "intermediate_size": wanted}}
        tensors = dict(weights.tensors)
        for name in ("gate_proj", "up_proj"):
            new = getattr(layer, name).weight.detach()[have:]
            tensors[f"layer.{name}.weight"] = torch.cat([tensors[f"layer.{name}.weight"].to(new.dtype), new])
        down = tensors["layer.down_proj.weight"]
        tensors["layer.down_proj.weight"] = torch.cat([down, down.new_zeros(len(down), wanted - have)], dim=1)
        return replace(weights, shape=shape, tensors=tensors)

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
            groups, dtype = query.shape[1] // key.shape[1], computing_dtype(query)
            self._keys.append(key.to(dtype).repeat_interleave(groups, dim=1))
            self._values.append(value.to(dtype).repeat_interleave(groups, dim=1))
            query = query.to(dtype)
            if len(self._keys) == 1:
                return F.scaled_dot_product_attention(query, self._keys[0], self._values[0], is_causal=True)
            if query.device.type == "cpu" and dtype != torch.float64:
                apply: Any = _ChainAttention.apply
                attended: Tensor = apply(query, *self._keys, *self._values)
                return attended
            return chain_attention(query, self._keys, self._values)

        return attend


def chain_attention(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Softmax over the first keys up to each position and the other keys at it; all are ``[B, H, T, d_h]``."""
    length, query = query.shape[2], query * query.shape[-1] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ keys[0].transpose(2, 3)).masked_fill(future, -torch.inf)  # [B, H, T, T]
    own = [(query * key).sum(-1, keepdim=True) for key in keys[1:]]  # [B, H, T, 1] each
    weights = torch.cat([scores, *own], dim=-1).softmax(-1)
    out = weights[..., :length] @ values[0]
    for step, value in enumerate(values[1:]):
        out = out + weights[..., length + step : length + step + 1] * value
    return out


class _ChainAttention(torch.autograd.Function):
    """``chain_attention`` without the scores in memory, by PyTorch's flash attention on a CPU.

    It attends to the first keys alone and returns the logarithm of their weights' sum, to which those of the other keys
    are added. Its backward pass, given the sum over all keys and the whole output, is right for the first keys as it
    is: it makes each weight and the softmax's derivative of these two.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, *pairs: Tensor) -> Tensor:
        keys, values = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        attended = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys[0], values[0], 0.0, True)
        out: Tensor = attended[0]
        scale = query.shape[-1] ** -0.5
        own = torch.stack([attended[1], *((query * key).float().sum(-1) * scale for key in keys[1:])])  # [S, B, H, T]
        total = own.logsumexp(0)
        weights = (own - total).exp().unsqueeze(-1).to(query.dtype)
        out = out * weights[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            out = torch.addcmul(out, weight, value)
        ctx.save_for_backward(query, *pairs, out, total, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, *pairs, out, total, weights = ctx.saved_tensors
        keys, values, scale = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :], query.shape[-1] ** -0.5
        grad = grads[0].to(query.dtype).contiguous()
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, keys[0], values[0], out, total, 0.0, True
        )
        of_keys, of_values = [of_key], [of_value]
        for weight, key, value in zip(weights[1:], keys[1:], values[1:], strict=True):
            of_values.append(weight * grad)
            of_score = weight * ((grad * (value - out)).float().sum(-1, keepdim=True) * scale).to(query.dtype)
            of_keys.append(of_score * query)
            of_query = torch.addcmul(of_query, of_score, key)
        return of_query, *of_keys, *of_values


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
