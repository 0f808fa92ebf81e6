"""Attention with shared prefixes on the CPU, against each row as one sequence; flash-attn by a stand-in."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prefix_cases import NESTED, PrefixCase, Ranges, make_prefix_case
from torch import Tensor

from specdec.kernels.shared_prefix import PrefixLevel, flash, reference, shared_prefix, shared_prefix_with_lse
from specdec.kernels.tree_attention.storage import KVFormat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_nodes", [1, 7])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"sinks": True}, {"page": 16, "prefix_page": 16}, {"prefix_stored": torch.int8}]
)
def test_equals_each_row_as_one_sequence(options: dict[str, Any], num_nodes: int, dtype: torch.dtype) -> None:
    case = make_prefix_case([3, 0, 70, 1, 20], NESTED, num_nodes, heads=(9, 3), width=80, dtype=dtype, **options)
    if "prefix_stored" not in options:
        case = case.finite()
    else:  # NaN would be in the scales
        case = PrefixCase(case.finite().own, case.levels)
    out, lse = shared_prefix_with_lse(*case.operands())
    assert torch.equal(out, shared_prefix(*case.operands()))
    assert lse.dtype == torch.float32
    case.check(out, lse)


@pytest.mark.parametrize(
    ("own_lengths", "levels", "options"),
    [
        ([0, 0, 0], [(((0, 3),), [40])], {"num_tree": 0}),
        ([0, 0, 0], [(((0, 3),), [40])], {}),
        ([3, 5, 2, 7], [(((0, 1), (2, 4)), [0, 513])], {}),
        ([3, 40], [], {}),
        ([4, 4, 4, 4], [(((2, 4), (0, 2)), [5, 6]), (((1, 3),), [7]), (((0, 4),), [1])], {}),
    ],
    ids=["no tree", "only a tree", "no group, no keys", "no level", "three levels in any order"],
)
def test_corners(own_lengths: list[int], levels: list[tuple[Ranges, list[int]]], options: dict[str, Any]) -> None:
    case = make_prefix_case(own_lengths, levels, width=16, **options).finite()
    case.check(*shared_prefix_with_lse(*case.operands()))


def test_no_own_slots_at_all() -> None:
    case = make_prefix_case([0, 0], [(((0, 2),), [9])], num_tree=0).finite()
    own = replace(case.own, keys=case.own.keys[:, :, :0], values=case.own.values[:, :, :0])
    case = PrefixCase(own, case.levels)
    case.check(*shared_prefix_with_lse(*case.operands()))


def test_reference_is_exact_and_reads_no_slot_that_nobody_sees() -> None:
    case = make_prefix_case([3, 0, 70, 1, 20], NESTED, dtype=torch.float64, softcap=3.0, sinks=True)
    out, lse = reference.shared_prefix_with_lse(*case.operands())
    for row in range(5):
        exact, exact_lse = case.whole(row).exact()
        assert torch.allclose(out[row], exact[0], atol=1e-13, rtol=0.0)
        assert torch.allclose(lse[row], exact_lse[0], atol=1e-13, rtol=0.0)
    assert torch.equal(shared_prefix(*case.operands()), out)


def test_each_prefix_is_attended_to_once_for_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    keys_read: list[int] = []

    def counted(query: Tensor, keys: Tensor, *rest: Any, **named: Any) -> Any:
        keys_read.append(keys.shape[0] * keys.shape[2])
        return fused(query, keys, *rest, **named)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", counted)
    case = make_prefix_case([2] * 8, [(((0, 8),), [100])], num_nodes=2).finite()
    shared_prefix(*case.operands())
    assert sum(keys_read) == 100 + 8 * 4


def fake_flash_attn(calls: list[int]) -> SimpleNamespace:
    """``flash_attn_with_kvcache`` of flash-attn 2 as documented, by the definition."""

    def with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, softmax_scale: float, causal: bool,
        softcap: float, return_softmax_lse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert return_softmax_lse
        assert not causal
        assert cache_seqlens.dtype == torch.int32
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert len(q) == len(k_cache) == len(cache_seqlens)
        calls.append(len(q))
        outs, lses = [], []
        for row, length in enumerate(cache_seqlens.tolist()):
            keys, values = (c[row, :length].repeat_interleave(q.shape[2] // c.shape[2], 1) for c in (k_cache, v_cache))
            scores = torch.einsum("qhd,khd->hqk", q[row].float(), keys.float()) * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float()).to(q.dtype))
            lse = scores.logsumexp(-1)
            lses.append(lse if length else torch.full_like(lse, torch.inf))
        return torch.stack(outs), torch.stack(lses)

    return SimpleNamespace(flash_attn_with_kvcache=with_kvcache)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("ranges", "lengths", "calls"),
    [
        (((0, 2), (2, 4), (4, 6)), [5, 0, 33], [3]),
        (((0, 1), (3, 6), (2, 2)), [5, 33, 2], [1, 1]),
        (((0, 2), (4, 6)), [7, 8], [1, 1]),
        (((2, 2),), [4], []),
    ],
    ids=["even groups in one call", "uneven groups", "groups apart", "an empty group"],
)
def test_flash_attn_gives_the_same_parts(
    ranges: Ranges, lengths: list[int], calls: list[int], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layout and log-sum-exp translated; rows without a prefix are left alone."""
    seen: list[int] = []
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn(seen))
    case = make_prefix_case([1] * 6, [(ranges, lengths)], heads=(4, 2), softcap=softcap).finite()
    level, query = case.levels[0], case.own.query
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
    flash.attend(query, level, case.own.scale, softcap, out, lse)
    assert seen == calls
    nothing = torch.zeros(6, 2, 0, 64)
    mask = replace(case.own.mask, lengths=torch.zeros(6), ancestors=torch.zeros(6, 3, 0), depth=torch.zeros(6, 0))
    expected, expected_lse = reference.shared_prefix_with_lse(
        query, [level], nothing, nothing, mask, case.own.scale, softcap
    )
    behind = [row for row in range(6) if any(first <= row < end for first, end in ranges)]
    assert torch.allclose(out[behind], expected[behind], atol=1e-6)
    assert torch.allclose(lse[behind], expected_lse[behind], atol=1e-5)
    others = [row for row in range(6) if row not in behind]
    assert bool(out[others].isnan().all())
    assert bool(lse[others].isnan().all())


def test_flash_attn_is_not_asked_on_the_cpu() -> None:
    case = make_prefix_case([1], [(((0, 1),), [4])], dtype=torch.float16)
    assert not flash.serves(case.own.query, case.levels[0])


def level(ranges: Ranges, width: int = 16, heads: int = 2, storage: KVFormat | None = None) -> PrefixLevel:
    """Prefixes of four zeros."""
    keys = torch.zeros(len(ranges), heads, 4, width)
    return PrefixLevel(keys, keys, torch.full((len(ranges),), 4), ranges, storage or KVFormat())


@pytest.mark.parametrize(
    ("ranges", "message"),
    [(((0, 2), (1, 3)), "overlap"), (((2, 1),), "first row"), (((-1, 1),), "first row")],
)
def test_ranges_that_make_no_groups_are_named(ranges: Ranges, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        level(ranges)


def test_lengths_and_prefixes_must_be_as_many_as_ranges() -> None:
    keys = torch.zeros(2, 2, 4, 16)
    with pytest.raises(ValueError, match="1 ranges need as many prefixes and lengths, got 2"):
        PrefixLevel(keys, keys, torch.tensor([4]), ((0, 1),))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (level(((0, 3),)), r"level 0 has ranges \[\(0, 3\)\], the batch 2 rows"),
        (level(((0, 2),), width=8), "KV heads and width must be the same"),
        (level(((0, 2),), heads=1), "KV heads and width must be the same"),
        (level(((0, 2),), storage=KVFormat(None, torch.ones(1), torch.ones(1))), "with scales"),
        (replace(level(((0, 2),)), values=torch.zeros(1, 2, 3, 16)), "differ in more than their width"),
    ],
)
def test_levels_that_do_not_fit_are_named(prefix: PrefixLevel, message: str) -> None:
    case = make_prefix_case([1, 2], [], width=16)
    operands = list(case.operands())
    operands[1] = [prefix]
    with pytest.raises(ValueError, match=message):
        shared_prefix(*operands)


def test_windows_are_refused() -> None:
    case = make_prefix_case([1, 2], [], width=16, window=4)
    with pytest.raises(ValueError, match=r"a window \(4\)"):
        shared_prefix(*case.operands())
