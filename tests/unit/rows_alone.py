"""A row of a product is to the bit what it is among any number of others."""

from __future__ import annotations

from typing import Any

import torch


def assert_rows_are_alone(packed: Any, shape: tuple[int, int]) -> None:
    """Of a packed weight ``[out, in]`` of this shape, with and without a residual."""
    inputs = torch.randn(40, shape[1], dtype=torch.bfloat16)
    # Nearly all cancels against the rounded value: what is left are the last bits of the float32 sums.
    rounded = -packed(inputs)
    expected = packed.add_to(rounded, inputs)
    for rows in range(1, 41):
        assert torch.equal(packed(inputs[:rows].clone()), -rounded[:rows]), rows
        assert torch.equal(packed.add_to(rounded[:rows].clone(), inputs[:rows].clone()), expected[:rows]), rows
    assert packed(inputs[:1].view(1, 1, -1)).shape == (1, 1, shape[0])
