"""Trained heads, alone and beside drafters that copy: text is plain decoding's, in float32 and in compiled layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from test_lean import make as make_bfloat16
from test_lean import short
from test_missed import make

from specdec import SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid import HybridConfig, HybridDrafter
from specdec.registry import create_drafter
from specdec.target import HFTarget

DRAFTERS = ["medusa", "clover", "eagle", "ppd", "ngram+clover", "suffix+eagle"]
PROMPTS = [[(7 * n + n // 5) % VOCAB for n in range(70)], [5, 6, 7, 5, 6, 7, 5, 6], [9], [40, 41, 42, 40, 41] * 3]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalised": {"temperature": 0.0, "repetition_penalty": 1.3},
    # Mostly noise, which drafters rank with: much is accepted, though nobody trained the heads.
    "hot": {"temperature": 8.0},
}


@cache
def target_of(precision: str) -> HFTarget:
    if precision == "float32":
        return HFTarget(tiny_model(initializer_range=0.15))
    found = HFTarget(short(make_bfloat16("llama")))
    if not found.invariant:
        pytest.skip("no C compiler")
    return found


@cache
def plain(precision: str, setting: str) -> list[list[int]]:
    """Each prompt alone, without drafts."""
    decoder = SpecDecoder(target_of(precision), "none")
    return [decoder.generate(prompt, **fields_of(setting)).token_ids for prompt in PROMPTS]


def fields_of(setting: str) -> dict[str, Any]:
    return {"max_new_tokens": 14, "seed": 7, "ignore_eos": True, **SETTINGS[setting]}


def drafter_of(name: str, target: HFTarget) -> Drafter:
    """With random weights; parts that copy the text have none."""
    parts = [create_drafter(part) if part in ("ngram", "suffix") else make(part, target) for part in name.split("+")]
    return HybridDrafter(parts, HybridConfig(ask="always")) if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_text_is_that_of_plain_decoding(name: str, precision: str) -> None:
    target = target_of(precision)
    assert target.dtype == getattr(torch, precision)
    decoder = SpecDecoder(target, drafter_of(name, target), adaptive=False, on_drafter_error="raise")
    accepted = {}
    for setting in SETTINGS:
        together = decoder.generate(PROMPTS, **fields_of(setting))
        assert [result.token_ids for result in together] == plain(precision, setting), setting
        accepted[setting] = decoder.stats.accepted
        alone = decoder.generate(PROMPTS[0], **fields_of(setting))
        assert alone.token_ids == plain(precision, setting)[0], setting
    assert accepted["hot"] >= (1 if name == "ppd" else 8), "else nothing but rejections was tested"
