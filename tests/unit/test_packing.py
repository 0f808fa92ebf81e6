"""Packed linear layers: the same numbers as dense ones, whoever asks for them in whatever order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unit.rows_alone import assert_rows_are_alone

from specdec.group_panels import Group4PanelWeight
from specdec.kernels.w4a16 import Int4Weight, from_dense
from specdec.kernels.w4a16.weight import halves_suffice
from specdec.packing import (
    FusedPart,
    PackedLinear,
    PackedWeight,
    PlainWeight,
    can_pack,
    onednn_takes_bfloat16,
    pack_linears,
    pack_weight,
)
from specdec.quantization import SCHEMES
from specdec.stored_weights import StoredInt4, run_int4


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


@pytest.mark.parametrize("shape", [(576, 1536), (100, 48)])
def test_sums_of_one_row_are_those_among_many(shape: tuple[int, int]) -> None:
    """For one row and a wide input oneDNN takes another kernel, whose sums have another order."""
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(torch.bfloat16).requires_grad_(False)
    if not onednn_takes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16 by oneDNN")
    assert_rows_are_alone(PackedWeight(layer.weight, layer.bias), shape)


def test_factors_that_float16_lacks_are_left_to_other_kernels() -> None:
    stored = from_dense(torch.randn(16, 64), 32, zero_points=False)
    wide = Int4Weight(stored.codes, stored.scales.float() * 1e6, stored.offsets.float())
    assert Group4PanelWeight.takes(stored)
    assert not Group4PanelWeight.takes(wide)
    assert isinstance(run_int4(wide, None, torch.bfloat16), StoredInt4)
    with pytest.raises(ValueError, match=r"activations in 8 bit by groups need .* got cpu and torch\.float32"):
        run_int4(stored, None, torch.float32, in_8_bit=True)


def test_weights_whose_scales_float16_rounds_away_are_left_to_another_kernel() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert halves_suffice(weight, 32)
    assert not halves_suffice(weight * 1e-5, 32)
    assert halves_suffice(torch.zeros(32, 64), 32)
    assert not isinstance(SCHEMES["int4"].cpu(weight * 1e-5, None), Group4PanelWeight)


def test_a_weight_that_no_kernel_takes_is_multiplied_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.packing.onednn_takes_bfloat16", lambda: False)
    weight, bias = torch.randn(8, 5).bfloat16(), torch.randn(8).bfloat16()
    inputs, residual = torch.randn(3, 5).bfloat16(), torch.randn(3, 8).bfloat16()
    plain = pack_weight(weight, bias)
    assert isinstance(plain, PlainWeight)
    assert torch.equal(plain(inputs), nn.functional.linear(inputs, weight, bias))
    assert torch.equal(plain.add_to(residual, inputs), residual + plain(inputs))
    assert torch.equal(plain.dense(), weight)
