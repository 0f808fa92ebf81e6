"""bfloat16 for Triton's interpreter, which keeps it as 16-bit integers and mistakes it for them in products and casts.

Casts go through PyTorch, products through float32. Other arithmetic on bfloat16 is refused: on a device it would round
in other places, so kernels should not depend on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as held by the interpreter, in float32."""
    flat = np.ascontiguousarray(bits).reshape(-1).view(np.int16)
    return torch.from_numpy(flat).view(torch.bfloat16).float().numpy().reshape(bits.shape)


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Numbers rounded to bfloat16, as the interpreter holds it."""
    flat = np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1)
    return torch.from_numpy(flat).bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)


def _is_bfloat16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    return TensorHandle(to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def install() -> None:
    """Patch the interpreter, for the whole process."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source if target.scalar == tl.bfloat16 else _widened(source), target)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), acc, *rest)

    def binary_op(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if _is_bfloat16(left) or _is_bfloat16(right):
            raise NotImplementedError(f"{operation} on bfloat16: cast to float32 first")
        return binary(self, left, right, operation)

    def unary_op(self: Any, operand: Any, operation: Any) -> Any:
        if _is_bfloat16(operand):
            raise NotImplementedError(f"{operation} on bfloat16: cast to float32 first")
        return unary(self, operand, operation)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary_op, unary_op
