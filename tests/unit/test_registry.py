"""What "auto" stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.architectures import tiny_model

from specdec.drafters import weights
from specdec.drafters.hybrid import HybridDrafter
from specdec.quantization import quantize_linears
from specdec.registry import AUTO_DRAFTER, FASTER_THAN_AUTO, create_drafter, resolve_drafter
from specdec.target import HFTarget


def test_auto_is_what_ships_for_the_target_else_what_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target = HFTarget(tiny_model())
    assert resolve_drafter("auto", target) == AUTO_DRAFTER
    assert resolve_drafter("ngram", target) == "ngram"
    shipped = {part: Path(part) for part in FASTER_THAN_AUTO.values()}
    monkeypatch.setattr(weights, "find_pretrained", lambda drafter, facts: shipped.get(drafter))
    best = next(iter(FASTER_THAN_AUTO))
    assert resolve_drafter("auto", target) == best
    assert isinstance(create_drafter(best), HybridDrafter)
    quantize_linears(target.model, "int8")
    assert resolve_drafter("auto", target) == AUTO_DRAFTER
