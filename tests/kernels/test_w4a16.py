"""4-bit weights: the layouts of checkpoints, products on the CPU, and the table of choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from w4a16_cases import make_product

from specdec.kernels.w4a16 import (
    ChoiceTable,
    Int4Weight,
    cpu,
    from_awq,
    from_dense,
    from_gptq,
    from_q4_1,
    measure_choices,
    reference,
    w4a16,
)
from specdec.kernels.w4a16.choice import measure
from specdec.kernels.w4a16.weight import pack_codes


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_survive_packing(group_size: int) -> None:
    codes = torch.randint(0, 16, (3, 384), dtype=torch.uint8)
    scales = torch.ones(3, 384 // group_size)
    weight = Int4Weight(pack_codes(codes, group_size), scales, torch.zeros_like(scales))
    assert torch.equal(weight.unpack(), codes)
    assert (weight.num_outputs, weight.num_inputs, weight.group_size) == (3, 384, group_size)
    assert weight.num_bytes == 3 * 192 + 2 * 4 * scales.numel()


def test_the_place_of_each_code() -> None:
    codes = torch.arange(64).remainder(13).view(1, 64)
    packed = pack_codes(codes, 32)[0].tolist()
    for g in range(2):
        for j in range(16):
            assert packed[16 * g + j] == int(codes[0, 32 * g + j]) + 16 * int(codes[0, 32 * g + 16 + j])


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding_a_dense_weight_is_off_by_half_a_step(group_size: int, zero_points: bool) -> None:
    dense = torch.randn(5, 256) + (0.0 if zero_points else 3.0)
    weight = from_dense(dense, group_size, zero_points)
    assert weight.has_zero_points is zero_points
    step = weight.scales.float().repeat_interleave(group_size, 1)
    # Scales and minima are rounded to float16 (2^-11 of up to 15 steps), zero points to a step.
    slack = 0.51 if zero_points else 0.02
    minima = weight.minima().abs().repeat_interleave(group_size, 1)
    assert bool(((weight.dequantize() - dense).abs() <= (0.5 + slack) * step + 2**-11 * minima).all())


def test_zero_stays_zero_with_zero_points() -> None:
    dense = torch.randn(4, 128)
    dense[:, ::7] = 0.0
    assert bool((from_dense(dense).dequantize()[:, ::7] == 0.0).all())
    constant = from_dense(torch.zeros(2, 128))
    assert torch.equal(constant.dequantize(), torch.zeros(2, 128))


def words(columns: list[int]) -> int:
    """Eight 4-bit fields, the lowest first, as a signed 32-bit number."""
    word = sum(field << 4 * i for i, field in enumerate(columns))
    return word - (1 << 32) if word >> 31 else word


def checkpoint(group: int, largest_zero: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes ``[256, 16]``, zero points and scales ``[256 / G, 16]``; the dense weight ``[16, 256]`` they stand for."""
    codes = torch.randint(0, 16, (256, 16))
    zeros = torch.randint(1, largest_zero + 1, (256 // group, 16))
    scales = torch.rand(256 // group, 16).half()
    spread_zeros, spread_scales = (t.repeat_interleave(group, 0) for t in (zeros, scales.double()))
    return codes, zeros, scales, ((codes - spread_zeros) * spread_scales).t()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("less_one", [True, False])
def test_gptq(less_one: bool, group: int) -> None:
    codes, zeros, scales, dense = checkpoint(group, 16 if less_one else 15)
    stored = zeros - int(less_one)
    qweight = torch.tensor(
        [[words(codes[8 * r : 8 * r + 8, n].tolist()) for n in range(16)] for r in range(32)], dtype=torch.int32
    )
    qzeros = torch.tensor([[words(row[8 * c : 8 * c + 8].tolist()) for c in range(2)] for row in stored]).int()
    weight = from_gptq(qweight, qzeros, scales, torch.arange(256) // group, less_one)
    assert torch.equal(weight.dequantize(torch.float64), dense)
    with pytest.raises(ValueError, match="desc_act"):
        from_gptq(qweight, qzeros, scales, torch.arange(256).flip(0) // group, less_one)


def test_awq() -> None:
    codes, zeros, scales, dense = checkpoint(128, 15)

    def pack(rows: Tensor) -> Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return torch.tensor([[words([int(row[8 * c + i]) for i in order]) for c in range(2)] for row in rows]).int()

    weight = from_awq(pack(codes), pack(zeros), scales)
    assert torch.equal(weight.dequantize(torch.float64), dense)


def test_q4_1_is_what_gguf_says() -> None:
    numbers = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32) + 1.0
    blocks = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_1)
    weight = from_q4_1(torch.from_numpy(blocks))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    assert weight.group_size == 32
    assert not weight.has_zero_points
    assert torch.equal(weight.dequantize(), expected)


def tolerance(case: Any, implementation: str) -> Tensor:
    """What rounding explains, from below: operands to the inputs' type, K additions in float32, the result.

    With "int4" the scale and the offset of code 8 are rounded, which moves a weight by up to half an ulp of each.
    """
    weight, inputs = case.weight, case.inputs.double().abs()
    eps, eps32 = torch.finfo(case.inputs.dtype).eps, torch.finfo(torch.float32).eps
    scales = weight.scales.double()
    middle = weight.minima(torch.float64) + 8.0 * scales
    if implementation == "int4":
        moved = (8.0 * scales + middle.abs()).repeat_interleave(weight.group_size, 1)
    else:
        moved = weight.dequantize(torch.float64).abs()
    size = (8.0 * scales + middle.abs()).repeat_interleave(weight.group_size, 1)
    return (
        eps * (inputs @ moved.t())  # weights: half an ulp of scale and offset each
        + 3.0 * weight.num_inputs * eps32 * (inputs @ size.t())
        + eps * case.exact.abs()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_points", [True, False], ids=["zero points", "minima"])
@pytest.mark.parametrize("implementation", cpu.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "num_inputs", "group_size"),
    [(1, 1, 128, 128), (7, 63, 640, 128), (33, 50, 160, 32), (5, 64, 192, 64), (0, 16, 128, 128)],
)
def test_products_on_the_cpu(
    num_rows: int, num_outputs: int, num_inputs: int, group_size: int, implementation: str, zero_points: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    case = make_product(num_rows, num_outputs, num_inputs, group_size, zero_points, dtype)
    for _ in range(2):  # made, then kept
        out = w4a16(case.inputs, case.weight, implementation=implementation)
        assert out.shape == (num_rows, num_outputs)
        assert out.dtype == dtype
        assert bool(((out.double() - case.exact).abs() <= tolerance(case, implementation)).all())


def test_without_a_choice_the_number_of_rows_decides() -> None:
    case = make_product(64, 20, 256, dtype=torch.bfloat16)
    for rows in (1, cpu.INT4_ROWS, cpu.INT4_ROWS + 1, 64):
        name = "int4" if rows <= cpu.INT4_ROWS else "packed"
        expected = w4a16(case.inputs[:rows], case.weight, implementation=name)
        assert torch.equal(w4a16(case.inputs[:rows], case.weight), expected)


def test_leading_dimensions_are_kept() -> None:
    case = make_product(6, 20, 128, dtype=torch.float32)
    out = w4a16(case.inputs.reshape(2, 3, 128), case.weight)
    assert torch.equal(out, w4a16(case.inputs, case.weight).view(2, 3, 20))


def test_float64_is_exact() -> None:
    case = make_product(3, 20, 128, dtype=torch.float64)
    assert torch.equal(w4a16(case.inputs, case.weight), case.exact)
    assert torch.equal(reference.w4a16(case.inputs, case.weight), case.exact)


class Clock:
    """Calls that take as long as told, whoever makes them."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times = times
        self.name = ""

    def run(self, inputs: Tensor, weight: Int4Weight, name: str) -> Tensor:
        if name == "broken":
            raise RuntimeError("out of shared memory")
        self.name = name
        return inputs

    def seconds(self, call: Any) -> float:
        call()
        return self.times[self.name].pop()


def test_the_fastest_median_is_chosen_and_what_fails_is_left_out() -> None:
    times = {"steady": [3.0] * 6, "hiccup": [9.0, 1.0, 1.0, 1.0, 9.0, 1.0], "lucky": [0.1, 5.0, 5.0, 5.0, 5.0, 5.0]}
    clock = Clock(times)
    names = ["broken", "steady", "hiccup", "lucky"]
    weight = make_product(1, 4, 32, 32).weight
    found = measure(weight, torch.float32, clock.run, lambda _: names, (1, 2), rounds=3, seconds=clock.seconds)
    assert found == {1: "hiccup", 2: "hiccup"}  # by means it would be steady, by the best sample lucky
    with pytest.raises(RuntimeError, match="no implementation of w4a16 runs 1 rows"):
        measure(weight, torch.float32, clock.run, lambda _: ["broken"], (1,), rounds=1, seconds=clock.seconds)


def test_choices_by_rows_and_shape(tmp_path: Path) -> None:
    weight, other = (make_product(1, size, 64, 32).weight for size in (4, 8))
    table = ChoiceTable("a device")
    assert table.best(weight, torch.float32, 1) is None
    table.add(weight, torch.float32, {64: "packed", 1: "int4", 8: "dequantize"})
    names = [table.best(weight, torch.float32, rows) for rows in (1, 2, 8, 9, 64, 1000)]
    assert names == ["int4", "dequantize", "dequantize", "packed", "packed", "packed"]
    assert table.best(other, torch.float32, 1) is None
    assert table.best(weight, torch.bfloat16, 1) is None


def test_choices_are_kept_on_disk_by_device(tmp_path: Path) -> None:
    case = make_product(6, 20, 64, 32, dtype=torch.float32)
    table = ChoiceTable.load(torch.device("cpu"), tmp_path)
    assert table.entries == {}
    measure_choices(case.weight, torch.float32, table, rows=(1, 6), rounds=1)
    path = table.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert ChoiceTable.load(torch.device("cpu"), tmp_path) == table
    assert set(table.entries["float32 20x64 group 32 zeros"].values()) <= set(cpu.IMPLEMENTATIONS)
    table.add(case.weight, torch.float32, {6: "dequantize"})
    out = w4a16(case.inputs, case.weight, table)
    assert torch.equal(out, w4a16(case.inputs, case.weight, implementation="dequantize"))

    document = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps(document | {"device": "another"}), json.dumps(document | {"entries": 3})):
        path.write_text(damaged)
        assert ChoiceTable.load(torch.device("cpu"), tmp_path).entries == {}


CODES = torch.zeros(2, 64, dtype=torch.uint8)
ONES = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((CODES.int(), ONES, ONES), "torch.int32"),
        ((CODES, ONES, torch.ones(2, 2)), r"must be \[2, K / G\]"),
        ((CODES, torch.ones(3, 1), torch.ones(3, 1)), r"must be \[2, K / G\]"),
        ((CODES, ONES.int(), ONES), "torch.int32"),
        ((CODES, ONES, ONES.half()), "torch.float16"),
        ((CODES, torch.ones(2, 8), torch.ones(2, 8)), "128 inputs in 8 groups"),
        ((CODES, torch.ones(2, 3), torch.ones(2, 3)), "128 inputs in 3 groups"),
    ],
)
def test_parts_that_make_no_weight_are_named(parts: tuple[Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4Weight(*parts)


def test_bad_input_is_named() -> None:
    case = make_product(2, 20, 64, 32)
    with pytest.raises(ValueError, match=r"\[..., 64\], got \(2, 63\)"):
        w4a16(case.inputs[:, 1:], case.weight)
    with pytest.raises(ValueError, match=r"torch.int64"):
        w4a16(torch.ones(2, 64, dtype=torch.int64), case.weight)
    with pytest.raises(ValueError, match="on meta, the weight on cpu"):
        w4a16(case.inputs.to("meta"), case.weight)
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        w4a16(case.inputs, case.weight, implementation="fast")
    with pytest.raises(ValueError, match="groups of 48"):
        from_dense(torch.randn(2, 96), 48)
    with pytest.raises(ValueError, match="groups of 128"):
        from_dense(torch.randn(2, 96))
    with pytest.raises(ValueError, match="K / 32"):
        from_q4_1(torch.zeros(2, 21, dtype=torch.uint8))
    with pytest.raises(ValueError, match="int32"):
        from_awq(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="do not fit"):
        from_gptq(torch.zeros(4, 8).int(), torch.zeros(1, 2).int(), torch.ones(1, 8))
    with pytest.raises(ValueError, match="groups of 8 inputs"):
        from_gptq(torch.zeros(1, 8).int(), torch.zeros(1, 1).int(), torch.ones(1, 8))
