"""What a drafter's layers start from: the target's own, so that little data suffices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from specdec.target import Feature, HFTarget

_SAMPLE = 256
"""Tokens over which the size of the target's states is measured."""


def layer_tensors(target: HFTarget, count: int) -> list[dict[str, Tensor]]:
    """The tensors of the target's last ``count`` decoder layers, by Llama's names without their submodule.

    "q_proj.weight", "gate_proj.weight", "input_layernorm.weight" and so on; what a target names otherwise keeps its
    name, and a target without a list of layers has none.
    """
    layers: Iterable[nn.Module] = getattr(target.model.base_model, "layers", ())
    chosen = list(layers)[-count:] if count else []
    return [
        {name.removeprefix("self_attn.").removeprefix("mlp."): tensor for name, tensor in layer.named_parameters()}
        for layer in chosen
    ]


def final_norm(target: HFTarget) -> Tensor | None:
    """``[d]`` factors of the target's final norm; None where it is no RMSNorm."""
    norm = getattr(target.model.base_model, "norm", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.LayerNorm):
        return None
    ones = torch.ones(int(target.config.hidden_size), dtype=target.dtype, device=target.device)
    factors: Tensor = norm(ones)  # of ones it makes its factors, however it stores them
    return factors.detach()


def copy_if_fits(parameter: Tensor, source: Tensor | None, factor: float = 1.0) -> None:
    """Set a parameter to a tensor times a factor, where there is one of its shape."""
    if source is not None and source.shape == parameter.shape:
        parameter.copy_(source.float() * factor)


def size_of_states(target: HFTarget, feature: Feature) -> float:
    """Median root mean square of the target's states, over tokens drawn at random."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(target.vocab_size, (_SAMPLE,), generator=generator).tolist()
    tokens = tokens[: target.max_context]
    with torch.inference_mode():
        out = target.extend([tokens], target.new_cache(1, len(tokens)), (feature,))
    return float(out.features[feature].float().square().mean(-1).sqrt().median())
