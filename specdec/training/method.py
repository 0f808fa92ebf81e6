"""What a kind of drafter must say to be trained, and where each one's training stands."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec.drafters.weights import DrafterWeights, TargetFacts
from specdec.registry import make_config, unknown
from specdec.target import Feature, HFTarget

METHODS = {
    "medusa": "specdec.training.medusa:MedusaMethod",
    "clover": "specdec.training.clover:CloverMethod",
    "eagle": "specdec.training.eagle:EagleMethod",
    "ppd": "specdec.training.ppd:PPDMethod",
    "model": "specdec.training.draft_model:DraftModelMethod",
}
"""Drafter -> "module:Class" of its training."""


@dataclass(frozen=True)
class TrainingBatch:
    """Texts, padded at the end.

    Attributes:
        tokens: ``[B, T]`` int64; 0 behind a text's end.
        lengths: ``[B]`` int64, tokens of each text.
        prompt_lengths: ``[B]`` int64, at least 1; tokens of the prompt are never what is to be predicted.
        features: name -> ``[B, T, d]``, the target's hidden states at each token, in the target's dtype; 0 behind a
            text's end. Empty for a method that asks for none.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    features: dict[Feature, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The same batch elsewhere."""
        return TrainingBatch(
            self.tokens.to(device),
            self.lengths.to(device),
            self.prompt_lengths.to(device),
            {name: states.to(device) for name, states in self.features.items()},
        )

    def trained(self, ahead: int) -> Tensor:
        """``[B, T]`` bool: positions t for which the token at t + ``ahead`` belongs to the reply."""
        goal = torch.arange(self.tokens.shape[1], device=self.tokens.device) + ahead
        return (goal >= self.prompt_lengths.unsqueeze(1)) & (goal < self.lengths.unsqueeze(1))

    def ahead(self, distance: int) -> Tensor:
        """``[B, T]`` int64: the token ``distance`` places after each position; 0 beyond the end."""
        return nn.functional.pad(self.tokens, (0, distance))[:, distance:]


class Method(ABC):
    """How one kind of drafter learns.

    Attributes:
        name: of the drafter.
        Options: frozen dataclass of options, each with a default; filled from ``-o name=value``.
        features: hidden states of the target it learns from.
        target: the model that is drafted for.
        module: what trains: its parameters with ``requires_grad``, in float32.
        learning_rate: what suits it where none is given.
        fitted: beginnings of the names of parameters that ``fit`` sets: they are near where they belong, and learn at a
            tenth of the rate.
        muon: whether matrices learn by Muon (``specdec.training.optimizer``), else all by AdamW.

    Args:
        target: the model that is drafted for; its weights are frozen.
        options: an instance of ``Options``.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    features: Sequence[Feature] = ()
    learning_rate: ClassVar[float] = 1e-3
    fitted: ClassVar[tuple[str, ...]] = ()
    muon: bool = False
    target: HFTarget
    module: nn.Module

    @abstractmethod
    def __init__(self, target: HFTarget, options: Any) -> None: ...

    @classmethod
    def options_of(cls, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Options, as far as a module's shape tells them, that make a module of that shape."""
        known = {option.name for option in fields(cls.Options)}
        return {name: value for name, value in shape.items() if name in known}

    def prepare(self, counts: Tensor) -> None:  # noqa: B027  most methods need no counts
        """Called once before training, on a resumed run too, and before ``module`` is first used.

        Args:
            counts: ``[V]`` int64, how often each token occurs in the replies; a reduced vocabulary is made of it.
        """

    def fit(self, batches: Iterable[TrainingBatch]) -> None:  # noqa: B027  most methods fit nothing
        """Called after ``prepare`` with some batches to train on, before a new training; the place for what has a
        closed form."""

    def start_from(self, weights: DrafterWeights) -> None:
        """Take finished weights to go on from, after ``prepare`` and instead of ``fit``.

        Raises:
            ValueError: for those of another drafter, of another shape, or for a target that does not fit.
        """
        if weights.drafter != self.name:
            raise ValueError(f"the weights to start from are of drafter {weights.drafter!r}, not {self.name!r}")
        difference = weights.target.difference(TargetFacts.of(self.target))
        if difference is not None:
            raise ValueError(f"the weights to start from are for another target: {difference}")
        weights.load_into(self.module)

    @abstractmethod
    def loss(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        """The mean loss, a scalar, and the number of positions it is over.

        Random numbers come from torch's default generator, which is seeded for every step.
        """

    @abstractmethod
    def hits(self, batch: TrainingBatch, ranks: int = 10) -> tuple[Tensor, Tensor]:
        """How often the guesses are right. Called under ``torch.no_grad`` with the module in evaluation mode.

        Returns:
            ``[D, ranks]`` int64: how often the true token at draft depth d + 1 had rank r, the true tokens before it
            given, and ``[D]`` int64, how many positions were looked at.
        """

    @abstractmethod
    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the drafter's weights, through ``specdec.drafters.weights``.

        Args:
            folder: made where it is missing.
            facts: how it was trained; ``specdec.training.card.make_card`` turns them into the model card.
        """


def method_class(name: str) -> type[Method]:
    """The training of a drafter; raises ValueError for a drafter that has none."""
    if name not in METHODS:
        raise ValueError(unknown("trainable drafter", name, METHODS))
    module, _, attribute = METHODS[name].partition(":")
    cls: type[Method] = getattr(importlib.import_module(module), attribute)
    return cls


def create_method(name: str, target: HFTarget, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name, with options; strings are converted to the option's type.

    Raises:
        ValueError: for an unknown name, an unknown option, or a value of the wrong type.
    """
    cls = method_class(name)
    return cls(target, make_config(cls.Options, options or {}, f"the training of {name!r}"))


def expected_tau(acceptance: Sequence[float]) -> float:
    """Estimate of tokens per target pass of a greedy chain: 1 + sum over depths of the product of the rates so far."""
    tau, reached = 1.0, 1.0
    for rate in acceptance:
        reached *= rate
        tau += reached
    return tau
