"""Attention with shared prefixes in Triton against float64. Runs in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prefix_cases import NESTED, make_prefix_case

from specdec.kernels.shared_prefix import flash
from specdec.kernels.shared_prefix import triton as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def agrees(*args: Any, **options: Any) -> None:
    case = make_prefix_case(*args, device=DEVICE, **options)
    case.check(*kernel.shared_prefix_with_lse(*case.operands()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_nodes", "heads", "width"), [(1, (4, 1), 64), (7, (9, 3), 80)])
def test_groups_of_different_size_at_two_levels(
    num_nodes: int, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    agrees([3, 0, 70, 1, 20], NESTED, num_nodes, heads=heads, width=width, dtype=dtype)


def test_a_long_prefix_is_split() -> None:
    agrees([2, 9], [(((0, 2),), [1030])], heads=(1, 1), width=16)


def test_rows_in_no_group_and_prefixes_without_keys() -> None:
    agrees([3, 5, 2, 7], [(((0, 1), (2, 4)), [0, 9])], width=16)


@pytest.mark.parametrize("tree", [0, 3], ids=["no tree", "tree"])
def test_empty_suffix(tree: int) -> None:
    agrees([0, 0, 0], [(((0, 3),), [40])], num_tree=tree, width=16)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0, "sinks": True},
        {"page": 16, "prefix_page": 16},
    ],
    ids=["soft-cap and sinks", "pages"],
)
def test_options(options: dict[str, Any]) -> None:
    agrees([3, 40, 12, 1, 20], NESTED, width=64, **options)


def test_without_prefixes_it_is_tree_attention() -> None:
    agrees([3, 40], [], width=16)
    agrees([3, 40], [(((1, 1),), [5])], width=16)


def test_a_row_that_sees_nothing_is_0_and_its_log_sum_exp_minus_infinity() -> None:
    case = make_prefix_case([0, 2], [(((0, 1),), [0])], num_tree=0, device=DEVICE)
    out, lse = kernel.shared_prefix_with_lse(*case.operands())
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((lse[0] == -torch.inf).all())
    assert bool(out[1].isfinite().all())


@pytest.mark.skipif(DEVICE == "cpu" or not flash.has_flash_attn(), reason="needs a GPU and flash-attn")
def test_flash_attn_takes_the_prefixes() -> None:
    case = make_prefix_case([3, 0, 70, 1, 20], NESTED, 7, heads=(8, 2), dtype=torch.float16, device=DEVICE).finite()
    assert all(flash.serves(case.own.query, level) for level in case.levels)
    case.check(*kernel.shared_prefix_with_lse(*case.operands()))
