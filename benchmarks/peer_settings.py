"""What a comparison with peers is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from specdec.benchmarks.schema import PLAIN
from specdec.benchmarks.settings import DrafterSpec
from specdec.sampling import SamplingParams


@dataclass(frozen=True)
class PeerSettings:
    """What is asked for; a run can only be resumed with the same.

    Attributes:
        model: its name, for the record.
        precisions: of specdec's rows, as peers name them.
        drafters: specdec's, in every precision; plain decoding always runs.
        peers: names of those asked for.
        max_new_tokens: most tokens per answer.
        threads: CPU threads of every row.
        block: questions that a row answers in one go; 1 interleaves best.
        loaded: most peers that are loaded at a time; None for as many as the memory holds.
        reference: name of specdec's row that the others are compared with; None for the fastest.
        seed: of the intervals.
    """

    model: str
    precisions: tuple[str, ...] = ("bf16",)
    drafters: tuple[DrafterSpec, ...] = ()
    peers: tuple[str, ...] = ()
    max_new_tokens: int = 128
    threads: int = field(default_factory=torch.get_num_threads)
    block: int = 1
    loaded: int | None = None
    reference: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "threads", "block", "loaded"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not self.precisions:
            raise ValueError("specdec needs at least one precision to run in, got none")
        labels = (PLAIN, *(spec.label for spec in self.drafters))
        for kind, names in (("precision", self.precisions), ("peer", self.peers), ("drafter", labels)):
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                also = f" (plain decoding, {PLAIN!r}, always runs)" if kind == "drafter" else ""
                raise ValueError(f"{kind} {doubled[0]!r} is there twice{also}")

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of specdec's rows."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``dtype`` and ``turns`` are there for readers of any benchmark's result."""
        return asdict(self) | {
            "precisions": list(self.precisions),
            "peers": list(self.peers),
            "drafters": [asdict(spec) for spec in self.drafters],
            "dtype": ", ".join(self.precisions),
            "turns": 1,
        }
