"""What a drafter starts from, so that little data suffices: the target's own layers, and linear maps in closed form."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from specdec.target import HFTarget


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


class Ridge:
    """A linear map fitted to pairs that come in pieces.

    Args:
        inputs: width of what it reads.
        outputs: width of what it predicts.
        strength: of the ridge, as a share of the inputs' mean square.
    """

    def __init__(self, inputs: int, outputs: int, strength: float = 1e-2) -> None:
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._moment = torch.zeros(inputs, outputs, dtype=torch.float64)
        self._strength = strength

    def add(self, known: Tensor, wanted: Tensor) -> None:
        """Count pairs ``[N, inputs]`` and ``[N, outputs]`` in."""
        self._gram += (known.T @ known).double().cpu()
        self._moment += (known.T @ wanted).double().cpu()

    def weight(self) -> Tensor:
        """``[outputs, inputs]`` float32, as a linear layer has it; zeros where nothing was counted in."""
        size = self._gram.diagonal().mean()
        gram = self._gram + (self._strength * size + 1e-9) * torch.eye(len(self._gram), dtype=torch.float64)
        weight: Tensor = torch.linalg.solve(gram, self._moment).T.float()
        return weight
