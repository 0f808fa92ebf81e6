"""Packed linear layers: the same numbers as dense ones, whoever asks for them in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from specdec.group_panels import Group4PanelWeight, Group8PanelWeight, GroupW8A8PanelWeight, W4A8PanelWeight
from specdec.kernels.decoder_layer import find_kernels
from specdec.kernels.w4a16 import Int4Weight, from_dense
from specdec.kernels.w4a16.weight import halves_suffice
from specdec.packing import FusedPart, PackedLinear, PackedWeight, can_pack, pack_linears
from specdec.panels import Int8PanelWeight, PanelWeight, W8A8PanelWeight, panels_run
from specdec.quantization import SCHEMES
from specdec.stored_weights import Int8Blocks, StoredInt4, run_int4


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(48, 32, bias=bias)
        self.k_proj = nn.Linear(48, 16, bias=bias)
        self.v_proj = nn.Linear(48, 16, bias=bias)
        self.o_proj = nn.Linear(32, 64, bias=bias)
        self.gate_proj = nn.Linear(48, 96)
        self.up_proj = nn.Linear(40, 96)  # reads another input: no sibling

    def projections(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)]


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def blocks(request: pytest.FixtureRequest) -> tuple[Block, Block]:
    """A block, and the same one packed."""
    torch.manual_seed(0)
    dense = Block(request.param).to(torch.bfloat16).requires_grad_(False)
    if not can_pack(dense):
        pytest.skip("this CPU does not compute in bfloat16")
    packed = Block(request.param).to(torch.bfloat16).requires_grad_(False)
    packed.load_state_dict(dense.state_dict())
    assert pack_linears(packed) == 6
    return dense, packed


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order of a float32 sum and the rounding to bfloat16, which is half of 2**-8 of a value."""
    return bool(((got - expected).abs() <= 2**-7 * expected.abs() + 2**-12).all())


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_outputs_are_those_of_the_dense_layers(blocks: tuple[Block, Block], rows: int) -> None:
    dense, packed = blocks
    inputs = torch.randn(2, rows, 48, dtype=torch.bfloat16)
    for got, expected in zip(packed.projections(inputs), dense.projections(inputs), strict=True):
        assert close(got, expected)
    assert isinstance(packed.q_proj, FusedPart)
    assert isinstance(packed.o_proj, PackedLinear)
    wide = torch.randn(2, rows, 40, dtype=torch.bfloat16)
    assert close(packed.up_proj(wide), dense.up_proj(wide))


def test_siblings_may_be_asked_in_any_order_again_and_for_other_inputs(blocks: tuple[Block, Block]) -> None:
    dense, packed = blocks
    first, second = torch.randn(2, 1, 3, 48, dtype=torch.bfloat16).unbind()
    asked = [("v_proj", first), ("q_proj", second), ("v_proj", first), ("v_proj", first), ("k_proj", first)]
    for name, inputs in asked:
        assert close(getattr(packed, name)(inputs), getattr(dense, name)(inputs)), name


def test_a_changed_input_is_not_answered_with_the_old_ones_output(blocks: tuple[Block, Block]) -> None:
    dense, packed = blocks
    inputs = torch.randn(1, 3, 48, dtype=torch.bfloat16)
    packed.q_proj(inputs)
    inputs += 1
    assert close(packed.k_proj(inputs), dense.k_proj(inputs))


def test_a_row_does_not_depend_on_the_rows_beside_it(blocks: tuple[Block, Block]) -> None:
    _, packed = blocks
    inputs = torch.randn(1, 32, 48, dtype=torch.bfloat16)
    whole = packed.projections(inputs)
    for rows in (1, 2, 7, 16, 31):
        for part, got in zip(whole, packed.projections(inputs[:, :rows].clone()), strict=True):
            assert torch.equal(part[:, :rows], got), rows


def test_the_dense_weight_comes_back(blocks: tuple[Block, Block]) -> None:
    dense, packed = blocks
    assert isinstance(packed.o_proj, PackedLinear)
    assert torch.equal(packed.o_proj.weight, dense.o_proj.weight)


def test_packed_weights_are_counted_as_bytes_a_pass_reads(blocks: tuple[Block, Block]) -> None:
    dense, packed = blocks

    def num_bytes(module: nn.Module) -> int:
        return sum(tensor.numel() * 2 for tensor in (*module.parameters(), *module.buffers()))

    assert num_bytes(packed) == num_bytes(dense)


def test_tied_weights_stay_in_the_embedding() -> None:
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(64, 48), nn.Linear(48, 64, bias=False)
    model.head.weight = model.embedding.weight
    model.to(torch.bfloat16).requires_grad_(False)
    if not can_pack(model):
        pytest.skip("this CPU does not compute in bfloat16")
    pack_linears(model)
    states = torch.randn(1, 2, 48, dtype=torch.bfloat16)
    assert close(model.head(states), states @ model.embedding.weight.T)


def test_float32_is_left_alone() -> None:
    assert not can_pack(nn.Linear(4, 4))


@pytest.mark.parametrize("kind", [PackedWeight, PanelWeight, Int8PanelWeight, W8A8PanelWeight])
@pytest.mark.parametrize("shape", [(576, 1536), (100, 48)])
def test_sums_of_one_row_are_those_among_many(
    shape: tuple[int, int], kind: Callable[[torch.Tensor, torch.Tensor], Any]
) -> None:
    """For one row and a wide input oneDNN takes another kernel, whose sums have another order."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(torch.bfloat16).requires_grad_(False)
    if not can_pack(layer) or (kind is not PackedWeight and not panels_run()):
        pytest.skip("this CPU does not compute in bfloat16")
    packed = kind(layer.weight, layer.bias)
    inputs = torch.randn(40, shape[1], dtype=torch.bfloat16)
    # Nearly all cancels against the rounded value: what is left are the last bits of the float32 sums.
    rounded = -packed(inputs)
    expected = packed.add_to(rounded, inputs)
    for rows in range(1, 41):
        assert torch.equal(packed(inputs[:rows].clone()), -rounded[:rows]), rows
        assert torch.equal(packed.add_to(rounded[:rows].clone(), inputs[:rows].clone()), expected[:rows]), rows
    assert packed(inputs[:1].view(1, 1, -1)).shape == (1, 1, shape[0])


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40])
@pytest.mark.parametrize("shape", [(64, 32), (33, 16), (100, 1536)])
def test_panels_give_the_product_in_float64(shape: tuple[int, int], rows: int) -> None:
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
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
    kernels = find_kernels()
    assert kernels is not None
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
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
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
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
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
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
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
    inputs: int, group: int, zero_points: bool, outputs: int, rows: int
) -> None:
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
    torch.manual_seed(0)
    bias, states = torch.randn(outputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    residual = torch.randn(rows, outputs).bfloat16()
    stored, blocks = random_groups((outputs, inputs), group, zero_points)
    kernels = find_kernels()
    assert kernels is not None
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
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
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


def test_factors_that_float16_lacks_are_left_to_other_kernels() -> None:
    stored = from_dense(torch.randn(16, 64), 32, zero_points=False)
    wide = Int4Weight(stored.codes, stored.scales.float() * 1e6, stored.offsets.float())
    assert Group4PanelWeight.takes(stored)
    assert not Group4PanelWeight.takes(wide)
    assert isinstance(run_int4(wide, None, torch.bfloat16), StoredInt4)
    with pytest.raises(ValueError, match=r"activations in 8 bit by groups need .* got cpu and torch\.float32"):
        run_int4(stored, None, torch.float32, in_8_bit=True)


def test_what_the_kernels_point_at_stays_where_it_is() -> None:
    """``model.to`` would make other numbers of the scales, at another address."""
    if not panels_run():
        pytest.skip("this CPU does not compute in bfloat16 by instructions of its own")
    panels = Int8PanelWeight(torch.randn(32, 64).bfloat16(), None)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in panels.named_buffers()}
    nn.Sequential(panels).to(torch.bfloat16).float()
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in panels.named_buffers()} == before


def test_weights_whose_scales_float16_rounds_away_are_left_to_another_kernel() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert halves_suffice(weight, 32)
    assert not halves_suffice(weight * 1e-5, 32)
    assert halves_suffice(torch.zeros(32, 64), 32)
    assert not isinstance(SCHEMES["int4"].cpu(weight * 1e-5, None), Group4PanelWeight)
