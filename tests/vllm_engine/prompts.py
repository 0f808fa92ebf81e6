"""What the tiny model is asked."""

from __future__ import annotations

import random

import tiny


def make_prompts() -> list[list[int]]:
    """Eight of different lengths, each said twice, so that lookups find something."""
    draw = random.Random(0)
    return [[draw.randrange(3, tiny.VOCAB) for _ in range(3 + 5 * index)] * 2 for index in range(8)]
