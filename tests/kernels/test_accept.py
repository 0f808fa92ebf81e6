"""Acceptance on the CPU: the reference, the fast path and the verifiers agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accept_cases import AcceptCase, accept_case

from specdec.batch import Batch, Row
from specdec.kernels.accept import accept, cpu, noise_keys, reference
from specdec.sampling import SamplingParams, keyed_gumbel, noise_key
from specdec.tree import ROOT, TokenTree
from specdec.verifiers.match import CoupledVerifier, GreedyVerifier


def verdict(case: AcceptCase, temperature: float | None) -> Any:
    """What the verifier that ``SpecDecoder`` uses decides."""
    params = SamplingParams(temperature=temperature or 0.0)
    rows = []
    for noise, position in zip(case.rows, case.positions, strict=True):
        rows.append(Row([0] * position, position, position + 100, params, noise))
    batch = Batch(rows, case.logits.shape[-1])
    verifier = GreedyVerifier() if temperature is None else CoupledVerifier()
    return verifier.accept(TokenTree(case.tokens, case.parents), case.logits, batch)


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_reference_and_the_verifiers(seed: int, dtype: torch.dtype, temperature: float | None) -> None:
    for num_nodes in (1, 2, 29):
        case = accept_case(3, num_nodes, 100, dtype, temperature, seed)
        out = accept(*case.operands())
        assert torch.equal(out.packed, reference.accept(*case.operands()).packed)
        expected = verdict(case, temperature)
        assert out.num_accepted.tolist() == expected.num_accepted
        assert out.failed.tolist() == expected.failed
        for b, tokens in enumerate(expected.tokens):
            path = out.path[b, : len(tokens)]
            assert path.tolist() == expected.path[b, : len(tokens)].tolist()
            assert [*case.tokens[b, path[1:]].tolist(), int(out.bonus[b])] == tokens


def test_the_cases_reach_deep() -> None:
    """The tests above would see little if trees were left at the root."""
    case = accept_case(8, 29, 100, torch.float32, None)
    assert int(accept(*case.operands()).num_accepted.max()) >= 4


def test_a_node_with_a_negative_parent_is_never_accepted() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, :, 2] = 1.0
    for parent, accepted in ((ROOT, 0), (-2, 0), (0, 1)):
        out = accept(logits, torch.tensor([[0, 2, 1]]), torch.tensor([[ROOT, parent, 0]]))
        assert (int(out.num_accepted), int(out.bonus)) == (accepted, 2)


def test_of_siblings_with_one_token_the_first_is_taken() -> None:
    logits = torch.zeros(1, 4, 4)
    logits[0, :, 2] = 1.0
    out = accept(logits, torch.tensor([[0, 1, 2, 2]]), torch.tensor([[ROOT, 0, 0, 0]]))
    assert out.path.tolist() == [[0, 2, 2, 2]]


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("path", [accept, reference.accept])
def test_nan_on_the_path_fails_the_row(path: Any, node: int) -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, :, 2] = 1.0
    logits[0, node, 3] = torch.nan
    out = path(logits, torch.tensor([[0, 2]]), torch.tensor([[ROOT, 0]]))
    assert (bool(out.failed), int(out.num_accepted), int(out.bonus)) == (True, node, -1)


def test_keys_of_any_64_bits_survive_the_tensor() -> None:
    case = accept_case(2, 5, 50, torch.float32, 1.0)
    keys = noise_keys(case.rows, case.positions, 4)
    unsigned = [[key & (1 << 64) - 1 for key in row] for row in keys.tolist()]
    places = zip(case.rows, case.positions, strict=True)
    assert unsigned == [[row.gumbel_key(first + depth) for depth in range(4)] for row, first in places]
    assert min(min(row) for row in keys.tolist()) < 0


def operands(**changes: Any) -> dict[str, Any]:
    """Valid arguments but for ``changes``."""
    tree = {"tokens": torch.zeros(2, 3, dtype=torch.int64), "parents": torch.tensor([[-1, 0, 0]] * 2)}
    return {"logits": torch.zeros(2, 3, 5), **tree, "keys": torch.zeros(2, 2, dtype=torch.int64), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, r"logits must be \[B, N, V\]"),
        ({"logits": torch.zeros(2, 4, 5)}, r"\(2, 4, 5\)"),
        ({"parents": torch.zeros(2, 2, dtype=torch.int64)}, r"\(2, 2\)"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int32)}, "torch.int32"),
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.int64)}, "floating point"),
        ({"keys": torch.zeros(1, 2, dtype=torch.int64)}, r"keys must be \[2, L\]"),
        ({"keys": torch.zeros(2, 2)}, "torch.float32"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_operands_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    accept(**operands())
    with pytest.raises(ValueError, match=message):
        accept(**operands(**changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_the_best_of_a_row_is_the_first_of_the_largest(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for _ in range(40):  # few values, so that many are equal
        row = torch.randint(-2, 3, (size,), generator=generator).to(dtype)
        assert cpu.find_best(row) == int(row.argmax())
        place = int(torch.randint(size, (), generator=generator))
        row[place] = torch.inf
        assert cpu.find_best(row) == place
        row[int(torch.randint(size, (), generator=generator))] = torch.nan
        assert cpu.find_best(row) == -1
    assert cpu.find_best(torch.full((size,), -torch.inf, dtype=dtype)) == 0
    assert cpu.find_best(torch.tensor([-0.0, 0.0], dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("spread", "offset"), [(0.0, 0.0), (0.01, -50.0), (1.0, 0.0), (5.0, 1000.0), (30.0, 0.0)])
def test_a_draw_is_the_largest_with_noise(dtype: torch.dtype, spread: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (1, 7, 16, 33, 5000):
        for temperature in (0.1, 1.0, 50.0):
            row = (torch.randn(size, generator=generator) * spread + offset).to(dtype)
            key = int(torch.randint(-(1 << 62), 1 << 62, (), generator=generator)) * 2 + 1
            noise = keyed_gumbel(key & (1 << 64) - 1, torch.arange(size))
            scores = row.to(torch.promote_types(dtype, torch.float32)) / temperature + noise
            assert cpu.draw_best(row, key, temperature) == int(scores.argmax())
            row[size // 2] = torch.nan
            assert cpu.draw_best(row, key, temperature) == -1


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])
    count = 20_000
    drawn = torch.tensor([cpu.draw_best(logits, noise_key(7, 0, position), 0.8) for position in range(count)])
    expected = (logits / 0.8).softmax(-1)
    found = torch.bincount(drawn, minlength=5) / count
    # Five standard deviations of each share.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()
