"""What holds for every numeric test of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What the launchers allocate without writing holds NaN, so that a place not written shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))),
    ):
        yield
