"""Weights in panels: the product in float64, and rows that are what they are alone, by every build of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from unit.rows_alone import assert_rows_are_alone

from specdec.benchmarks.record import machine
from specdec.group_panels import Group4PanelWeight, Group8PanelWeight, GroupW8A8PanelWeight, W4A8PanelWeight
from specdec.kernels.build import NotBuilt, load_library
from specdec.kernels.decoder_layer import SOURCE, Kernels
from specdec.kernels.w4a16 import Int4Weight, from_dense
from specdec.panels import Int8PanelWeight, PanelWeight, W8A8PanelWeight
from specdec.stored_weights import Int8Blocks

BUILDS = {"avx512_bf16": "-mno-avx512bf16", "avx512f": "-mno-avx512f", "avx2": "-mno-avx2"}
"""What processors have, and what tells the compiler not to use it."""


@cache
def build(without: str | None, folder: Path) -> Kernels:
    try:
        options = [] if without is None else [BUILDS[without]]
        return Kernels(load_library(SOURCE, folder, options))
    except NotBuilt as error:
        pytest.skip(str(error))


PRESENT = sorted({*BUILDS} & {*machine(torch.device("cpu"))["flags"]})


@pytest.fixture(autouse=True, params=[None, *PRESENT], ids=lambda without: f"without {without or 'nothing'}")
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Kernels:
    """As this processor runs them, and as lesser ones would."""
    built = build(request.param, tmp_path_factory.getbasetemp() / "kernels")
    monkeypatch.setattr("specdec.panels.find_kernels", lambda: built)
    return built


@pytest.mark.parametrize("kind", [PanelWeight, Int8PanelWeight, W8A8PanelWeight])
@pytest.mark.parametrize("shape", [(576, 1536), (100, 48)])
def test_sums_of_one_row_are_those_among_many(
    shape: tuple[int, int], kind: Callable[[torch.Tensor, torch.Tensor], Any]
) -> None:
    torch.manual_seed(0)
    assert_rows_are_alone(kind(torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()), shape)


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40])
@pytest.mark.parametrize("shape", [(64, 32), (33, 16), (100, 1536)])
def test_panels_give_the_product_in_float64(kernels: Kernels, shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    inputs, residual = torch.randn(rows, shape[1]).bfloat16(), torch.randn(rows, shape[0]).bfloat16()
    exact = inputs.double() @ weight.double().T + bias.double()
    size = inputs.double().abs() @ weight.double().abs().T + bias.double().abs() + residual.double().abs()
    panels = PanelWeight(weight, bias)
    assert torch.equal(panels.dense(), weight)
    # Half an ulp of rounding, and float32 sums over the width, whose roundings add up to width * 2 ** -24 of all terms.
    for got, expected in ((panels(inputs), exact), (panels.add_to(residual, inputs), exact + residual.double())):
        assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + shape[1] * 2.0**-23 * size).all()
    light = Int8PanelWeight(weight, bias)
    scaled = light._codes().double() * light.scales[: shape[0], None].double()
    exact = inputs.double() @ scaled.T + bias.double()
    size = inputs.double().abs() @ scaled.abs().T + bias.double().abs() + residual.double().abs()
    for got, expected in ((light(inputs), exact), (light.add_to(residual, inputs), exact + residual.double())):
        assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + shape[1] * 2.0**-23 * size).all()
    coarse = W8A8PanelWeight(weight, bias)
    assert torch.equal(light.dense(), coarse.dense())
    bytes_, sizes = kernels.quantize_rows(inputs)  # tested by themselves
    whole = (bytes_.double() - 128) @ coarse._codes().double().T
    exact = whole * coarse.scales[: shape[0]].double() * sizes.double().unsqueeze(1) + bias.double()
    slack = 2.0**-22 * (exact.abs() + bias.double().abs() + residual.double().abs())
    for got, expected in ((coarse(inputs), exact), (coarse.add_to(residual, inputs), exact + residual.double())):
        assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + slack).all()
    step = weight.abs().amax(1, keepdim=True).double() / 127
    off = (coarse.dense().double() - weight.double()).abs()
    assert (off <= step / 2 + 2.0**-8 * (weight.double().abs() + step)).all()


def test_a_row_that_is_not_finite_fails_alone() -> None:
    inputs = torch.ones(3, 32).bfloat16()
    inputs[1, 7] = torch.nan
    stored, blocks = (
        from_dense(torch.ones(32, 32), 32),
        (torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 1).half()),
    )
    layers = [kind(torch.ones(32, 32).bfloat16(), None) for kind in (PanelWeight, Int8PanelWeight, W8A8PanelWeight)]
    for layer in (*layers, W4A8PanelWeight(stored, None), GroupW8A8PanelWeight(*blocks, None)):
        out = layer(inputs)
        assert out.isnan().all(1).tolist() == [False, True, False]
        assert not out[[0, 2]].isnan().any()


def random_groups(shape: tuple[int, int], group: int, zero_points: bool) -> tuple[Int4Weight, Int8Blocks]:
    """Weights in codes of 4 and of 8 bits."""
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    blocks = Int8Blocks(codes, torch.rand(shape[0], shape[1] // 32).half())
    return from_dense(torch.randn(shape), group, zero_points), blocks


@pytest.mark.parametrize("rows", [1, 5, 13, 16, 40, 70])
@pytest.mark.parametrize("outputs", [64, 33])
@pytest.mark.parametrize(("inputs", "group", "zero_points"), [(96, 32, False), (128, 64, True), (2304, 128, False)])
def test_groups_of_codes_give_what_their_dense_weight_gives_in_bfloat16(
    inputs: int, group: int, zero_points: bool, outputs: int, rows: int
) -> None:
    """To the bit: the kernels make the same bfloat16 numbers of them, and add in the same order."""
    torch.manual_seed(0)
    bias, states = torch.randn(outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    stored, blocks = random_groups((outputs, inputs), group, zero_points)
    weights = [
        (Group4PanelWeight(stored, bias), stored.dequantize(torch.bfloat16)),
        (Group8PanelWeight(blocks.codes, blocks.scales, bias), blocks.dequantize(torch.bfloat16)),
    ]
    for panels, dense in weights:
        assert torch.equal(panels.dense(), dense)
        assert torch.equal(panels(states), PanelWeight(dense, bias)(states))


def test_a_weight_rounded_to_8_bit_in_groups_is_half_a_step_off_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, 96).bfloat16()
    weight[5, 40] = 300.0  # its neighbours lose what the others keep
    weight[7, :32] = 0.0
    groups = weight.float().view(33, 3, 32)
    step = groups.abs().amax(-1, keepdim=True) / 127
    found = Group8PanelWeight.of(weight, None).dense().float().view(33, 3, 32)
    # The scale is a half, 2^-11 of it off over 127 codes, and the product a bfloat16.
    assert ((found - groups).abs() <= (0.5 + 127 * 2.0**-11) * step + 2.0**-8 * groups.abs()).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 40, 300])
@pytest.mark.parametrize("outputs", [64, 33])
@pytest.mark.parametrize(("inputs", "group", "zero_points"), [(96, 32, False), (128, 64, True), (2304, 128, False)])
def test_groups_of_codes_times_bytes_give_the_product_in_float64(
    kernels: Kernels, inputs: int, group: int, zero_points: bool, outputs: int, rows: int
) -> None:
    torch.manual_seed(0)
    bias, states = torch.randn(outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    residual = torch.randn(rows, outputs).bfloat16()
    stored, blocks = random_groups((outputs, inputs), group, zero_points)
    alone = [kernels.quantize_groups(row) for row in states.split(1)]  # tested by itself
    levels = torch.stack([bytes_[:inputs].view(-1, 32) for bytes_, _ in alone]).double()
    sizes = torch.stack([factors[: inputs // 16].view(-1, 2)[:, :1] for _, factors in alone]).double()
    read = (levels * sizes).flatten(1)
    weights = [
        (W4A8PanelWeight(stored, bias), Group4PanelWeight(stored, bias), stored.dequantize(torch.float64)),
        (GroupW8A8PanelWeight(blocks.codes, blocks.scales, bias), Group8PanelWeight(blocks.codes, blocks.scales, bias),
         blocks.dequantize(torch.float64)),
    ]  # fmt: skip
    for panels, wide, dense in weights:
        assert torch.equal(panels.dense(), wide.dense())
        exact = read @ dense.T + bias.double()
        # A group's sum and its minimum's part are rounded, and may cancel: they are 255 steps of a code at most.
        size = read.abs() @ dense.abs().T + bias.double().abs() + residual.double().abs()
        lost = 2.0**-22 * (size + 256 * read.abs() @ panels._of_channels(_scales(panels)).double().T)
        for got, expected in ((panels(states), exact), (panels.add_to(residual, states), exact + residual.double())):
            assert ((got.double() - expected).abs() <= 2.0**-8 * expected.abs() + inputs / 32 * lost).all()
        for first in (0, rows // 2):
            assert torch.equal(panels(states[first : first + 1].clone())[0], panels(states)[first])


@pytest.mark.parametrize(("inputs", "group"), [(1440, 32), (1408, 128)])
def test_groups_of_codes_times_bytes_are_the_same_whatever_rows_there_are(inputs: int, group: int) -> None:
    """Few rows are multiplied by vectors, more by tiles of 16 where the processor has them."""
    torch.manual_seed(0)
    stored, blocks = random_groups((70, inputs), group, False)
    scales = blocks.scales[:, :: group // 32]
    states = torch.randn(300, inputs).bfloat16()
    for panels in (W4A8PanelWeight(stored, None), GroupW8A8PanelWeight(blocks.codes, scales, None)):
        alone = torch.cat([panels(row.clone()) for row in states.split(1)])
        for rows in (*range(2, 40), 256, 257, 300):
            assert torch.equal(panels(states[:rows].clone()), alone[:rows])


def _scales(panels: Any) -> torch.Tensor:
    return panels.scales[:, :, 0] if isinstance(panels, W4A8PanelWeight) else panels.scales  # type: ignore[no-any-return]


def test_what_the_kernels_point_at_stays_where_it_is() -> None:
    """``model.to`` would make other numbers of the scales, at another address."""
    panels = Int8PanelWeight(torch.randn(32, 64).bfloat16(), None)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in panels.named_buffers()}
    nn.Sequential(panels).to(torch.bfloat16).float()
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in panels.named_buffers()} == before


def test_weights_elsewhere_than_on_the_cpu_are_left_to_other_kernels() -> None:
    assert PanelWeight.serves(torch.randn(32, 32).bfloat16())
    assert not Int8PanelWeight.serves(torch.randn(32, 32, device="meta").bfloat16())


@pytest.mark.parametrize("scale", [torch.inf, torch.nan, 2.0**-24])
def test_a_scale_of_a_group_is_what_float16_says(scale: float) -> None:
    """Infinite ones and NaN show, and the smallest one is a number."""
    codes, scales = torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 2).half()
    scales[3, 1] = scale
    panels = Group8PanelWeight(codes, scales, None)
    inputs = torch.zeros(1, 64).bfloat16()
    inputs[0, 40] = 1.0
    expected = panels.dense().float() @ inputs[0].float()
    assert torch.equal(panels(inputs)[0].float().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
