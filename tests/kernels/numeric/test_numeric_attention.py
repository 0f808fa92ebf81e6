"""The Triton kernel of tree attention against float64. Runs in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_case

from specdec.kernels.tree_attention import triton as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]


def agrees(case: Case, num_splits: int) -> None:
    """The kernel's error is at most twice that of PyTorch in the same precision; the log-sum-exp is float32's."""
    out, lse = kernel.tree_attention_with_lse(
        case.query, case.keys, case.values, case.mask, case.scale, case.softcap, case.sinks, case.storage, num_splits
    )
    exact, exact_lse = case.exact()
    allowed = 2.0 * float((case.same_precision().double() - exact).abs().max())
    assert out.dtype == case.query.dtype
    assert float((out.double() - exact).abs().max()) <= allowed + 1e-6  # NaN fails, too
    # A score is a sum of d products rounded to float32, of a size with the log-sum-exp.
    bound = case.query.shape[-1] * torch.finfo(torch.float32).eps * float(exact_lse.abs().max().clamp(min=1.0))
    assert float((lse.double() - exact_lse).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("lengths", "num_nodes", "heads", "width", "num_splits"),
    [
        ([0], 1, (4, 1), 80, 1),
        ([50, 0], 7, (9, 3), 80, 2),
        ([513, 130], 7, (4, 1), 64, 4),
        ([50], 63, (3, 1), 96, 1),
    ],
)
def test_equals_attention_over_what_each_node_sees(
    lengths: list[int], num_nodes: int, heads: tuple[int, int], width: int, num_splits: int, dtype: torch.dtype
) -> None:
    agrees(make_case(lengths, num_nodes, heads=heads, width=width, dtype=dtype, device=DEVICE), num_splits)


@pytest.mark.parametrize("width", [128, 256])
def test_wide_heads(width: int) -> None:
    agrees(make_case([70, 3], 5, heads=(2, 1), width=width, dtype=torch.float16, device=DEVICE), 2)


@pytest.mark.parametrize(("page", "num_splits"), [(0, 1), (0, 3), (16, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 9},
        {"window": 90, "softcap": 3.0},
        {"softcap": 20.0, "sinks": True},
    ],
    ids=["window", "window and soft-cap", "soft-cap and sinks"],
)
def test_options(options: dict[str, Any], page: int, num_splits: int) -> None:
    case = make_case([131, 20], 7, heads=(4, 2), width=64, page=page, device=DEVICE, **options)
    agrees(case, num_splits)


def test_queries_may_be_the_last_nodes_of_a_larger_tree() -> None:
    agrees(make_case([33, 64], 5, num_tree=40, device=DEVICE), 2)
    agrees(make_case([33, 64], 5, num_tree=40, window=4, device=DEVICE), 1)


def test_a_tree_of_256_nodes() -> None:
    agrees(make_case([5], 256, heads=(1, 1), width=16, device=DEVICE), 2)


def test_without_a_tree_the_committed_slots_are_seen() -> None:
    agrees(make_case([33, 64], 5, num_tree=0, device=DEVICE), 2)


@pytest.mark.parametrize(("page", "dtype"), [(0, torch.float32), (32, torch.float16), (0, torch.bfloat16)])
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
def test_quantized_storage(stored: torch.dtype, dtype: torch.dtype, page: int) -> None:
    agrees(make_case([70, 3], 7, width=64, dtype=dtype, stored=stored, page=page, device=DEVICE), 2)


def test_a_row_that_sees_nothing_is_0_and_its_log_sum_exp_minus_infinity() -> None:
    case = make_case([0, 7], 3, num_tree=0, device=DEVICE)
    for num_splits in (1, 3):
        out, lse = kernel.tree_attention_with_lse(
            case.query, case.keys, case.values, case.mask, case.scale, num_splits=num_splits
        )
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert bool((lse[0] == -torch.inf).all())
        assert bool(out[1].isfinite().all())


def test_rows_of_one_range_read_the_same_keys() -> None:
    """Three rows in two ranges over two sequences, as attention over shared prefixes launches it."""
    case = make_case([70, 21], 3, num_tree=0, device=DEVICE)
    query = torch.cat([case.query, case.query[:1].flip(2)])[[0, 2, 1]]  # rows 0 and 1 read sequence 0
    ranges = torch.tensor([[0, 2], [2, 3]], dtype=torch.int32, device=DEVICE)
    launch = kernel.Launch(case.keys, case.values, case.storage, case.mask.lengths32, row_ranges=ranges, max_rows=2)
    parts = kernel.Parts.allocate(2, query, case.values.shape[-1])
    launch.run(query, parts.out, parts.lse, case.scale, None, None, 2)
    out, lse = parts.merge(query.dtype, None)
    expected, expected_lse = case.exact()
    order = torch.tensor([0, 0, 1], device=DEVICE)
    expected, expected_lse = expected[order], expected_lse[order]
    expected[1], expected_lse[1] = expected[1].flip(1), expected_lse[1].flip(1)
    assert float((out - expected).abs().max()) < 1e-5
    assert float((lse - expected_lse).abs().max()) < 1e-5
