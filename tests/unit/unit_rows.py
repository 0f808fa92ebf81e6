"""Rows and batches made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specdec.batch import Batch, Row
from specdec.sampling import PositionNoise, SamplingParams

SAMPLING = SamplingParams(temperature=1.0)


def make_row(
    tokens: Sequence[int],
    vocab_size: int,
    params: SamplingParams = SAMPLING,
    seed: int = 0,
    noise: Any = None,
    max_new_tokens: int = 1000,
) -> Row:
    """A row whose prompt is ``tokens``."""
    return Row(
        tokens=list(tokens),
        prompt_len=len(tokens),
        max_len=len(tokens) + max_new_tokens,
        params=params,
        noise=PositionNoise(seed, torch.arange(vocab_size)) if noise is None else noise,
    )


def make_batch(
    rows: Sequence[Sequence[int]], vocab_size: int, params: SamplingParams = SAMPLING, seed: int = 0
) -> Batch:
    """A batch of rows with these prompts."""
    return Batch([make_row(tokens, vocab_size, params, seed) for tokens in rows], vocab_size)
