"""Canaries: where one fails, the interpreter's bfloat16 is wrong and no bfloat16 result of the suite means anything."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _product(a, b, out):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 16)
    place = i[:, None] * 16 + i[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place)))


@triton.jit
def _cast(a, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(a + i).to(out.dtype.element_ty))


@triton.jit
def _sum(a, out):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(a + i) + tl.load(a + i))


def test_products_of_bfloat16() -> None:
    a, b = torch.randn(2, 16, 16, device=DEVICE).bfloat16()
    out = torch.full((16, 16), torch.nan, device=DEVICE)
    _product[(1,)](a, b, out)
    # Products are exact in float32; 16 of them are added in an order of the device's own.
    bound = 16 * torch.finfo(torch.float32).eps * float((a.double().abs() @ b.double().abs()).max())
    assert float((out.double() - a.double() @ b.double()).abs().max()) <= bound


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_casts_round_to_nearest_even(other: torch.dtype) -> None:
    odd = torch.tensor([1.0, 1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 3.0e-5, torch.inf], device=DEVICE)
    numbers = torch.cat([odd, torch.randn(56, device=DEVICE)]).to(other)
    rounded = torch.zeros(64, dtype=torch.bfloat16, device=DEVICE)
    _cast[(1,)](numbers, rounded, 64)
    assert torch.equal(rounded, numbers.bfloat16())
    back = torch.zeros(64, dtype=other, device=DEVICE)
    _cast[(1,)](rounded, back, 64)
    assert torch.equal(back, rounded.to(other))


def test_integers_become_bfloat16() -> None:
    numbers = torch.arange(-128, 128, device=DEVICE).to(torch.int8)
    out = torch.zeros(256, dtype=torch.bfloat16, device=DEVICE)
    _cast[(1,)](numbers, out, 256)
    assert torch.equal(out, numbers.bfloat16())


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU adds bfloat16")
def test_the_interpreter_refuses_other_arithmetic_on_bfloat16() -> None:
    with pytest.raises(Exception, match="cast to float32 first"):
        _sum[(1,)](torch.ones(16).bfloat16(), torch.zeros(16).bfloat16())
