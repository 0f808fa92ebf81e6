"""Tree attention on the CPU: rules or a matrix as mask, any form of storage, with and without the log-sum-exp."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, make_case

from specdec.kernels.tree_attention import KVFormat, TreeMask, reference, tree_attention, tree_attention_with_lse
from specdec.kernels.tree_attention.combine import combine

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 5},
    {"window": 60},
    {"softcap": 3.0},
    {"sinks": True},
    {"window": 9, "softcap": 3.0, "sinks": True},
    {"page": 16},
    {"num_tree": 40},
    {"num_tree": 0},
    {"stored": torch.int8},
    {"stored": torch.float8_e4m3fn, "page": 16},
]


def attend(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The public operation; slots that no row sees must be finite on the CPU."""
    keys, values, storage = case.keys, case.values, case.storage
    if storage.key_scales is None:
        keys, values = keys.nan_to_num(), values.nan_to_num()
    else:
        assert storage.value_scales is not None
        storage = replace(
            storage, key_scales=storage.key_scales.nan_to_num(), value_scales=storage.value_scales.nan_to_num()
        )
    if keys.dtype == torch.float8_e4m3fn:
        keys, values = (t.float().nan_to_num().to(t.dtype) for t in (keys, values))
    operands = (case.query, keys, values, case.mask, case.scale, case.softcap, case.sinks, storage)
    out, lse = tree_attention_with_lse(*operands)
    assert torch.equal(out, tree_attention(*operands))
    return out, lse


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[50, 50], [70, 1, 33], [4100, 4200]], ids=str)
def test_equals_attention_over_what_each_node_sees(
    lengths: list[int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if options.get("num_tree") == 0:
        lengths = [max(length, 1) for length in lengths]
    case = make_case(lengths, 7, heads=(9, 3), width=80, dtype=dtype, **options)
    out, lse = attend(case)
    exact, exact_lse = case.exact()
    allowed = 2.0 * float((case.same_precision().double() - exact).abs().max())
    assert float((out.double() - exact).abs().max()) <= allowed + 1e-6
    bound = case.query.shape[-1] * torch.finfo(torch.float32).eps * float(exact_lse.abs().max().clamp(min=1.0))
    if dtype == torch.float32 and "stored" not in options:
        assert float((lse - exact_lse).abs().max()) <= bound
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("num_nodes", [9, 4])
def test_rules_and_matrix_say_the_same(num_nodes: int, window: int | None) -> None:
    """Against the definition, slot by slot."""
    case = make_case([6, 0, 3], num_nodes, num_tree=9, window=window)
    lengths, ancestors, depth = (t.tolist() for t in (case.mask.lengths, case.mask.ancestors, case.mask.depth))
    dense = case.mask.dense(18).tolist()
    for b in range(3):
        for i in range(num_nodes):
            position = lengths[b] + depth[b][9 - num_nodes + i]
            for slot in range(18):
                node = slot - lengths[b]
                seen = node < 0 or (node < 9 and ancestors[b][i][node])
                if seen and window is not None:
                    seen = position - (slot if node < 0 else lengths[b] + depth[b][node]) < window
                assert dense[b][i][slot] == seen
    assert case.mask.dense(18, 5).tolist() == [[row[5:] for row in rows] for rows in dense]


@pytest.mark.parametrize("num_tree", [1, 31, 32, 33, 64, 256])
def test_bits_are_the_ancestors(num_tree: int) -> None:
    mask = make_case([2, 3], 1, num_tree=num_tree, width=16).mask
    bits = mask.bits
    assert bits.dtype == torch.int32
    assert bits.shape == (2, 1, -(-num_tree // 32))
    for node in range(num_tree):
        assert torch.equal((bits[:, :, node // 32] >> node % 32) & 1, mask.ancestors[:, :, node].int())


def test_a_matrix_serves_where_rules_do() -> None:
    case = make_case([20, 9], 5)
    dense = replace(case, mask=case.mask.dense(case.keys.shape[2]))
    out, lse = attend(dense)
    expected, expected_lse = attend(case)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_parts_of_the_keys_make_up_the_whole() -> None:
    """With the log-sum-exp, attention over two sets of keys joins to that over both; an empty set changes nothing."""
    case = make_case([30, 30], 4, num_tree=0)
    first = TreeMask(case.mask.lengths - 18, case.mask.ancestors, case.mask.depth)
    rest = torch.zeros(2, 4, case.keys.shape[2], dtype=torch.bool)
    rest[:, :, 12:30] = True
    keys, values = case.keys.nan_to_num(), case.values.nan_to_num()
    parts = [tree_attention_with_lse(case.query, keys, values, m, case.scale) for m in (first, rest)]
    nothing = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], -torch.inf))
    for many in (parts, [nothing, *parts], [parts[1], nothing, parts[0]]):
        out, lse = combine(many, torch.float32)
        exact, exact_lse = case.exact()
        assert torch.allclose(out.double(), exact, atol=2e-6)
        assert torch.allclose(lse.double(), exact_lse, atol=1e-5)
    out, lse = combine([nothing, nothing], torch.float32)
    assert torch.equal(out, nothing[0])
    assert torch.equal(lse, nothing[1])


def test_a_row_that_sees_nothing_is_0_and_its_log_sum_exp_minus_infinity() -> None:
    case = make_case([0, 7], 3, num_tree=0)
    for path in (attend, Case.exact):
        out, lse = path(case)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert bool((lse[0] == -torch.inf).all())
        assert bool(out[1].isfinite().all())


def test_values_may_be_narrower_or_wider_than_keys() -> None:
    case = make_case([20, 9], 5)
    keys, values = case.keys.nan_to_num(), case.values.nan_to_num()
    for wide in (values[..., :24], torch.cat([values, values], -1)):
        operands = (case.query, keys, wide, case.mask, case.scale)
        out, lse = tree_attention_with_lse(*operands)
        expected, expected_lse = reference.tree_attention_with_lse(*operands)
        assert torch.allclose(out, expected, atol=2e-6)
        assert torch.allclose(lse, expected_lse, atol=1e-5)


def operands(**changes: Any) -> dict[str, Any]:
    """Valid arguments but for ``changes``."""
    case = make_case([4, 2], 3, width=16)
    named = {"query": case.query, "keys": case.keys, "values": case.values, "mask": case.mask, "scale": 1.0}
    return {**named, **changes}


CASE = make_case([4, 2], 3, width=16)
INT8 = torch.zeros(2, 2, 10, 16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": CASE.query[:, :3]}, "multiple of KV heads"),
        ({"query": CASE.query[..., :8]}, "same width"),
        ({"values": CASE.values[:, :, 1:]}, "differ in more than their width"),
        ({"query": CASE.query[:1]}, "query has 1 rows, keys have 2"),
        ({"query": CASE.query.to(torch.int32)}, "torch.int32"),
        ({"query": CASE.query[:, :, :2]}, r"mask is for \(2, 3\)"),
        ({"keys": INT8, "values": INT8}, "without scales"),
        ({"storage": KVFormat(None, torch.ones(2, 2, 10), torch.ones(2, 2, 10))}, "with scales"),
        ({"values": CASE.values.half()}, "of one type"),
    ],
)
def test_operands_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    tree_attention_with_lse(**operands())
    with pytest.raises(ValueError, match=message):
        tree_attention_with_lse(**operands(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, "need lengths"),
        ({"depth": torch.zeros(2, 4, dtype=torch.int64)}, "need lengths"),
        ({"window": 0}, "at least 1 position, got 0"),
        ({"ancestors": torch.ones(2, 4, 3, dtype=torch.bool)}, "must be nodes of the tree"),
    ],
)
def test_rules_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CASE.mask, **changes)
