"""No drafting: plain decoding, one token per pass, through the same loop."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.tree import TokenTree


@dataclass(frozen=True)
class NoneConfig:
    """No options."""


class NoneDrafter(Drafter):
    """Proposes a root alone."""

    name = "none"
    Config = NoneConfig

    def __init__(self, config: NoneConfig | None = None) -> None:
        self.config = config or NoneConfig()

    def propose(self, batch: Batch) -> TokenTree:
        return TokenTree.from_pending(batch.pending)
