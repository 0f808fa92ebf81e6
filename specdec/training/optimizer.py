"""The optimizer of drafters' training: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups of ``matrices``, AdamW (Loshchilov and Hutter 2019) for the others.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that all its directions learn at one
    rate; with few tokens to learn from it gets further than AdamW. An update is scaled to the size AdamW's would have
    (Liu et al. 2025, section 2.2), so that both take the same learning rate.

    Args:
        groups: of parameters, with ``weight_decay`` and, where they are matrices ``[..., m, n]``, ``matrices``.
        lr: learning rate.
        betas: AdamW's.
        momentum: Muon's.
        eps: AdamW's.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], momentum: float = 0.95,
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum, "eps": eps, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; ``closure`` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient: Tensor = parameter.grad
                state: dict[str, Tensor] = self.state[parameter]
                update = muon(state, gradient, group) if group["matrices"] else adam(state, gradient, group)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def muon(state: dict[str, Tensor], gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The step of a matrix, to be scaled by the learning rate; its state goes on."""
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
    ahead = gradient.lerp(state["momentum"], group["momentum"])  # Nesterov's
    return orthogonal(ahead).mul_(0.2 * max(gradient.shape[-2:]) ** 0.5)


def adam(state: dict[str, Tensor], gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The same for other parameters, by AdamW."""
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    first, second = group["betas"]
    state["step"] += 1
    step = int(state["step"])
    state["exp_avg"].lerp_(gradient, 1.0 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
    root = (state["exp_avg_sq"] / (1.0 - second**step)).sqrt_().add_(group["eps"])
    update: Tensor = state["exp_avg"] / (1.0 - first**step)
    return update.div_(root)


def orthogonal(matrix: Tensor) -> Tensor:
    """Matrices ``[..., m, n]`` with about the same singular vectors and singular values near 1, by Newton-Schulz
    iteration.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x: Tensor = (matrix if wide else matrix.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)
