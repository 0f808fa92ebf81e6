"""What "auto" stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integration.architectures import tiny_model

from specdec.drafters import weights
from specdec.drafters.hybrid import HybridDrafter
from specdec.panels import panels_run
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


@pytest.mark.parametrize(
    ("precision", "as_in_16_bit"), [("int8", True), ("int4", True), ("w8a8", True), ("w4a8", False)]
)
def test_auto_drafts_as_in_16_bit_where_passes_are_as_flat_as_there(
    precision: str, as_in_16_bit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not panels_run():
        pytest.skip("this CPU has none of our own kernels")
    monkeypatch.setattr(weights, "find_pretrained", lambda drafter, facts: Path(drafter))
    model = tiny_model().to(torch.bfloat16)
    quantize_linears(model, precision)
    assert resolve_drafter("auto", HFTarget(model)) == (next(iter(FASTER_THAN_AUTO)) if as_in_16_bit else AUTO_DRAFTER)
