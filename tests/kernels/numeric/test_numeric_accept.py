"""The Triton kernels of acceptance against the reference, exactly. Runs in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from accept_cases import accept_case

from specdec.kernels.accept import reference
from specdec.kernels.accept import triton as kernel
from specdec.sampling import PositionNoise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _noise_kernel(key, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, kernel._gumbel(tl.load(key), index), mask=index < size)


def test_the_noise_is_that_of_sampling() -> None:
    size = 50_000
    noise = PositionNoise(0x9E3779B97F4A7C15, torch.arange(size))
    for position in (0, 77, 1 << 33):
        key = noise.gumbel_key(position)
        signed = torch.tensor([key - (1 << 64) if key >> 63 else key], device=DEVICE)
        out = torch.full((size,), torch.nan, device=DEVICE)
        _noise_kernel[(triton.cdiv(size, 1024),)](signed, out, size, BLOCK=1024)
        # A logarithm's last bit in float64 moves the rounding to float32 once in 2^28.
        assert torch.equal(out.cpu(), noise.gumbel(position))


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_reference(dtype: torch.dtype, temperature: float | None) -> None:
    for num_nodes, vocab_size in ((1, 5), (6, 17_000)):
        case = accept_case(2, num_nodes, vocab_size, dtype, temperature)
        out = kernel.accept(*case.operands(DEVICE))
        assert torch.equal(out.packed.cpu(), reference.accept(*case.operands()).packed)


def test_many_nodes_and_stretches() -> None:
    case = accept_case(1, 40, 20_000, torch.float32, None, seed=4)
    out = kernel.accept(*case.operands(DEVICE))
    assert int(out.num_accepted) == 5
    assert torch.equal(out.packed.cpu(), reference.accept(*case.operands()).packed)


def test_of_equal_logits_the_first_token_is_taken() -> None:
    logits = torch.zeros(1, 2, 9000, device=DEVICE)
    logits[:, 0, [4097, 8500]] = 1.0
    logits[:, 1] = -torch.inf
    tokens, parents = (torch.tensor([row], device=DEVICE) for row in ([0, 4097], [-1, 0]))
    out = kernel.accept(logits, tokens, parents).cpu()
    assert (out.num_accepted.tolist(), out.bonus.tolist(), out.path.tolist()) == ([1], [0], [[0, 1]])


def test_a_row_fails_where_a_node_on_its_path_has_nan_and_not_elsewhere() -> None:
    case = accept_case(3, 6, 8200, torch.float32, None)
    case.parents[:] = torch.tensor([-1, 0, 1, 2, 3, 4])
    case.tokens[:, 1:] = case.logits.argmax(-1)[:, :-1]
    case.logits[0, 2, 8199] = torch.nan
    case.tokens[1, 2] += 1  # row 1 stops before its node
    case.logits[1, 2, 0] = torch.nan
    out = kernel.accept(*case.operands(DEVICE)).cpu()
    assert out.failed.tolist() == [True, False, False]
    assert out.num_accepted.tolist() == [2, 1, 5]
    assert torch.equal(out.packed, reference.accept(*case.operands()).packed)
