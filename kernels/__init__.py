"""Operations with a reference, a CPU path and a Triton path each, one folder per operation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; it is not imported for that."""
    return find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton path of an operation serves this tensor: it is on a GPU and Triton is installed."""
    return tensor.is_cuda and has_triton()


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one within the block: that is where Triton launches."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
