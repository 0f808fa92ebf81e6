"""What a speed-up benchmark is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from specdec.benchmarks.schema import PLAIN
from specdec.registry import create_verifier
from specdec.sampling import SamplingParams


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter by name, with options, and the label it has in the results."""

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What is asked for; a run can only be resumed with the same.

    Attributes:
        model: the target's name, for the record.
        dtype: of its weights, or the scheme they are quantized by.
        device: where it runs.
        drafters: to compare with plain decoding, which always runs.
        turns: 1 or 2 messages of each question, where it has as many.
        max_new_tokens: most tokens per turn.
        temperature: 0 is greedy.
        batch_size: questions decoded together; their times are shared and make one run.
        queue: questions of a call, of all categories, where they are more than are decoded together: the others take
            the places of rows that end. 0 for calls of ``batch_size`` questions of one category.
        repeat: how often everything runs, each time with new drafters.
        seed: of sampling and of the bootstrap.
        verifier: acceptance policy of the drafters; plain decoding always has the automatic one.
        adaptive: draft no more than pays, as decoders do by default; otherwise trees are as the drafters make them.
        cuda_graphs: the target's passes are captured.
        threads: CPU threads.
    """

    model: str
    dtype: str
    device: str
    drafters: tuple[DrafterSpec, ...]
    turns: int = 2
    max_new_tokens: int = 128
    temperature: float = 0.0
    batch_size: int = 1
    queue: int = 0
    repeat: int = 1
    seed: int = 0
    verifier: str = "auto"
    adaptive: bool = True
    cuda_graphs: bool = False
    threads: int = field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        if self.turns not in (1, 2):
            raise ValueError(f"turns must be 1 or 2, got {self.turns}")
        for name in ("batch_size", "repeat"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if 0 != self.queue <= self.batch_size:
            raise ValueError(f"queue must be above batch_size, {self.batch_size}, got {self.queue}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        labels = [PLAIN, *(spec.label for spec in self.drafters)]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            raise ValueError(f"drafter {doubled[0]!r} is there twice (plain decoding, {PLAIN!r}, always runs)")

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of every call."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)

    @property
    def comparable(self) -> bool:
        """Whether the drafters' policy has to give plain decoding's very tokens."""
        if self.verifier == "auto":
            return True
        verifier = create_verifier(self.verifier)
        return self.params.greedy or (verifier.lossless and verifier.coupled)

    @property
    def lossless(self) -> bool:
        """Whether the drafters' policy leaves the target's distribution as it is."""
        return self.verifier == "auto" or create_verifier(self.verifier).lossless

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"drafters": [asdict(spec) for spec in self.drafters], "lossless": self.lossless}
