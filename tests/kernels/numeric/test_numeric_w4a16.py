"""Products with 4-bit weights in Triton against float64. Runs in Triton's interpreter or on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from w4a16_cases import make_product

from specdec.kernels.w4a16 import Int4Weight
from specdec.kernels.w4a16 import triton as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("zero_points", [True, False], ids=["zero points", "minima"])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs", "group_size", "config"),
    [
        (1, 1, 128, 128, kernel.Config(64, 128, 1, 4, 3)),
        (7, 63, 640, 128, kernel.Config(64, 256, 2, 4, 2)),  # half a block at the end
        (16, 130, 384, 128, kernel.Config(128, 128, 8, 4, 3)),  # more splits than blocks
        (5, 65, 160, 32, kernel.Config(64, 128, 2, 4, 3)),  # a block of one group at the end
        (3, 64, 320, 64, kernel.Config(64, 128, 4, 4, 3)),
    ],
)
def test_few_rows(
    num_rows: int, num_outputs: int, num_inputs: int, group_size: int, config: kernel.Config, zero_points: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    case = make_product(num_rows, num_outputs, num_inputs, group_size, zero_points, dtype, DEVICE)
    case.check(kernel.few_rows(case.inputs, case.weight, config))


@pytest.mark.parametrize("num_rows", [17, 63, 64, 65, 150])
def test_more_rows_take_larger_and_several_tiles(num_rows: int) -> None:
    case = make_product(num_rows, 20, 256, device=DEVICE)
    case.check(kernel.few_rows(case.inputs, case.weight, kernel.CONFIGS[1]))


def test_no_rows() -> None:
    case = make_product(0, 20, 256, device=DEVICE)
    assert kernel.few_rows(case.inputs, case.weight, kernel.CONFIGS[1]).shape == (0, 20)


def test_a_row_does_not_depend_on_the_others() -> None:
    case = make_product(9, 40, 512, dtype=torch.bfloat16, device=DEVICE)
    config = kernel.Config(64, 128, 2, 4, 3)
    together = kernel.few_rows(case.inputs, case.weight, config)
    assert torch.equal(kernel.few_rows(case.inputs[4:5], case.weight, config), together[4:5])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("zero_points", [True, False], ids=["zero points", "minima"])
@pytest.mark.parametrize(("num_outputs", "num_inputs", "group_size"), [(33, 384, 128), (5, 288, 32), (64, 64, 64)])
def test_dequantized_weights(
    num_outputs: int, num_inputs: int, group_size: int, zero_points: bool, dtype: torch.dtype
) -> None:
    """Zero points exactly; minima with one rounding of ``minimum - 16 * scale`` more, in float32."""
    weight = make_product(1, num_outputs, num_inputs, group_size, zero_points, device=DEVICE).weight
    dense, exact = kernel.dequantize(weight, dtype), weight.dequantize(torch.float64)
    if zero_points:
        assert torch.equal(dense, exact.to(dtype))
        return
    largest = float((weight.minima().abs() + 16.0 * weight.scales.float()).max())
    bound = 2.0 * torch.finfo(torch.float32).eps * largest + torch.finfo(dtype).eps / 2 * exact.abs()
    assert bool(((dense.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("num_rows", [1, 64, 65, 300])
def test_the_rule_and_every_candidate_give_the_product(num_rows: int) -> None:
    case = make_product(num_rows, 24, 256, device=DEVICE)
    case.check(kernel.w4a16(case.inputs, case.weight, kernel.default(num_rows, case.weight)))
    for name in kernel.candidates(num_rows)[-2:]:
        case.check(kernel.w4a16(case.inputs, case.weight, name))


def test_float32_inputs_take_the_dense_weight() -> None:
    case = make_product(3, 24, 256, dtype=torch.float32, device=DEVICE)
    case.check(kernel.w4a16(case.inputs, case.weight, kernel.CONFIGS[0].name))


def test_names_of_implementations() -> None:
    for config in kernel.CONFIGS:
        assert kernel.Config.parse(config.name) == config
    with pytest.raises(ValueError, match="unknown implementation 'split'"):
        kernel.Config.parse("split")


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU's own path measures Triton kernels")
def test_choices_measured_on_the_device(tmp_path: Path) -> None:
    from specdec.kernels.w4a16 import ChoiceTable, measure_choices, w4a16

    case = make_product(8, 4096, 4096, device=DEVICE)
    table = ChoiceTable.load(case.inputs.device, tmp_path)
    measure_choices(case.weight, torch.float16, table, rows=(8,), rounds=3)
    assert isinstance(case.weight, Int4Weight)
    assert table.best(case.weight, torch.float16, 8) in kernel.candidates(8)
    case.check(w4a16(case.inputs, case.weight, table))
