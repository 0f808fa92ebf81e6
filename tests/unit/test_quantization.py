"""Quantized linear layers: near the dense ones by what rounding allows, each row on its own."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import load_plan
from specdec.group_panels import W4A8PanelWeight
from specdec.latency import LatencyKey
from specdec.packing import PackedLinear
from specdec.panels import W8A8PanelWeight, panels_run
from specdec.precisions import SCHEME_NAMES, STORED_NAMES
from specdec.quantization import (
    GROUP,
    SCHEMES,
    Int4Weight,
    Int8Weight,
    W8A8Weight,
    check_scheme,
    is_quantized,
    quantize_linears,
)
from specdec.quantized_weight import FP6_MAX, Fp6Weight, fp6_codes
from specdec.target import HFTarget

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no AVX-512 VNNI")
needs_panels = pytest.mark.skipif(not panels_run(), reason="this CPU has none of our own kernels")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
ON_CPU = [
    pytest.param("int8", Int8Weight, id="int8"),
    pytest.param("w8a8", W8A8Weight, marks=needs_vnni, id="w8a8"),
    pytest.param("int4", Int4Weight, id="int4"),
    pytest.param("fp6", Fp6Weight, id="fp6"),
]
EVERY = [
    "int8", pytest.param("w8a8", marks=needs_vnni), "int4", "int4-g128", "fp6",
    pytest.param("nf4", marks=needs_bitsandbytes),
]  # fmt: skip
IN_BF16 = [
    "int8", "int4", "int4-g128", "fp6", pytest.param("nf4", marks=needs_bitsandbytes),
    pytest.param("w8a8", marks=needs_panels), pytest.param("w4a8", marks=needs_panels),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def step(name: str, weight: Tensor) -> Tensor:
    """``[out, in]``: half of what one level of a weight is worth, the most that rounding moves it."""
    if name == "int4":
        groups = weight.view(weight.shape[0], -1, GROUP)
        return ((groups.amax(-1) - groups.amin(-1)) / 30).repeat_interleave(GROUP, dim=1)
    if name == "fp6":  # two bits of fraction; below the least normal number, steps of its quarter
        return torch.maximum(weight.abs() / 8, weight.abs().amax(-1, keepdim=True) / FP6_MAX / 32)
    return (weight.abs().amax(-1, keepdim=True) / 254).expand_as(weight)


def fp6_numbers() -> Tensor:
    """What each of the 64 codes of e3m2 stands for, by the format's definition."""
    values = []
    for code in range(64):
        exponent, fraction = code >> 2 & 7, code & 3
        size = (1 + fraction / 4) * 2.0 ** (exponent - 3) if exponent else fraction / 4 * 2.0**-2
        values.append(-size if code & 32 else size)
    return torch.tensor(values)


def test_fp6_takes_the_nearest_number() -> None:
    numbers = fp6_numbers()
    assert numbers.max() == FP6_MAX
    wanted = torch.cat([numbers, (torch.rand(2000) * 2 - 1) * FP6_MAX, (numbers[1:32] + numbers[:31]) / 2])
    got = numbers[fp6_codes(wanted).long()]
    assert torch.equal((wanted - got).abs(), (wanted.unsqueeze(1) - numbers).abs().amin(1))


def test_fp6_takes_six_bits_and_decodes_to_its_numbers() -> None:
    weight = torch.randn(32, 64)
    layer = Fp6Weight(weight, None)
    assert layer.weight.nbytes + layer.fractions.nbytes == weight.numel() * 6 // 8
    scales = weight.abs().amax(-1, keepdim=True) / FP6_MAX
    torch.testing.assert_close(layer.dense(), fp6_numbers()[fp6_codes(weight / scales).long()] * scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), ON_CPU)
def test_weights_move_by_half_a_level_at_most(name: str, kind: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    weight = torch.randn(48, 64).to(dtype)
    weight[3] = 0  # a channel without a scale of its own
    got = kind(weight, None).dense()
    # Scales and zero points are rounded to the dtype, and so are results; w8a8's units take a rounded scale as well.
    slack = 4 * torch.finfo(dtype).eps * weight.abs().amax().float() + 1e-6
    assert bool(((got.float() - weight.float()).abs() <= step(name, weight.float()) + slack).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), ON_CPU)
def test_outputs_are_those_of_the_rounded_weights(
    name: str, kind: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    layer = kind(torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype))
    inputs = torch.randn(2, 5, 64).to(dtype)
    exact = inputs.double() @ layer.dense().double().T + layer.bias.double()  # type: ignore[operator]
    size = inputs.double().abs() @ layer.dense().double().abs().T + layer.bias.double().abs()  # type: ignore[operator]
    bound = 4 * torch.finfo(dtype).eps * size
    if name == "w8a8":  # an activation moves by half a level of its row
        largest = inputs.double().abs().amax(-1, keepdim=True)
        bound = bound + largest / 254 * 1.01 * layer.dense().double().abs().sum(1)
    got = layer(inputs)
    assert got.shape == (2, 5, 48)
    assert got.dtype == dtype
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "kind"), ON_CPU)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    name: str, kind: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    layer = kind(torch.randn(80, 64).to(dtype), None)
    inputs = torch.randn(1, 64, 64).to(dtype) * torch.logspace(-2, 2, 64).view(1, 64, 1).to(dtype)
    whole = layer(inputs)
    for rows in (1, 2, 3, 7, 16, 17, 32, 33, 63):
        assert torch.equal(layer(inputs[:, -rows:]), whole[:, -rows:]), rows


@pytest.mark.parametrize(("name", "kind"), ON_CPU)
def test_a_row_of_nan_stays_nan_and_alone(name: str, kind: Callable[..., nn.Module]) -> None:
    layer = kind(torch.randn(48, 64), None)
    inputs = torch.randn(3, 64)
    expected = layer(inputs)
    inputs[1, 5] = torch.nan
    got = layer(inputs)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@torch.inference_mode()
@pytest.mark.parametrize("name", EVERY)
def test_every_width_of_a_pass_gives_the_same_logits(name: str) -> None:
    model = tiny_model()
    quantize_linears(model, name)
    target = HFTarget(model)
    tokens = torch.randint(0, 96, (8,)).tolist()
    together = target.extend([tokens] * 3, target.new_cache(3, 8)).logits
    cache = target.new_cache(1, 8)
    for token in tokens:
        alone = target.extend([[token]], cache).logits
    difference = float((together[2] - alone[0]).abs().max())
    # Attention's sums run in another order.
    assert difference <= 2**-16 * float(alone.abs().max())


def test_int4_takes_int8_where_groups_do_not_come_out_even() -> None:
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(64, 24), nn.Linear(64, 32))
    quantize_linears(model, "int4")
    assert [type(layer.packed) for layer in model] == [Int8Weight, Int8Weight, Int4Weight]  # type: ignore[union-attr]


def test_projections_that_read_the_same_input_are_fused_and_the_head_gives_its_weight_back() -> None:
    model = tiny_model()
    quantize_linears(model, "int8")
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.product is attention.v_proj.product
    head = model.get_output_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.weight.shape == (96, 64)
    assert is_quantized(model)
    assert not is_quantized(tiny_model())


@pytest.mark.parametrize("name", IN_BF16)
def test_weights_get_smaller(name: str) -> None:
    dense = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
    before = 2 * 512 * 512
    quantize_linears(dense, name)
    after = sum(t.numel() * t.element_size() for t in (*dense.parameters(), *dense.buffers()))
    # Scales: 4 bytes of 512 at most a row; int4 has 4 bytes a group of 32.
    most = {"int8": 0.51, "w8a8": 0.51, "int4": 0.32, "w4a8": 0.32, "int4-g128": 0.28, "nf4": 0.26, "fp6": 0.38}
    assert after <= before * most[name]


@pytest.mark.parametrize("name", IN_BF16)
def test_the_planner_measures_each_precision_on_its_own(name: str) -> None:
    model = tiny_model(torch.bfloat16)
    before = LatencyKey.of(HFTarget(model))
    quantize_linears(model, name)
    after = LatencyKey.of(HFTarget(model))
    assert after != before
    assert after.fingerprint == before.fingerprint  # drafters trained for the model still fit


def test_w4a8_takes_w8a8_where_groups_do_not_come_out_even_and_wants_bfloat16() -> None:
    if not panels_run():
        pytest.skip("our own kernels do not run here")
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(64, 24)).bfloat16()
    quantize_linears(model, "w4a8")
    assert [type(layer.packed) for layer in model] == [W8A8PanelWeight, W4A8PanelWeight]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="need a CPU, bfloat16 and a C compiler"):
        quantize_linears(tiny_model(), "w4a8")


def test_no_two_precisions_share_a_key() -> None:
    keys = []
    for name in [name for name in SCHEMES if name not in ("nf4", "w8a8") and (name != "w4a8" or panels_run())]:
        model = tiny_model(torch.bfloat16)
        quantize_linears(model, name)
        keys.append(LatencyKey.of(HFTarget(model)).path())
    assert len({*keys}) == len(keys) >= 4


def test_quantizers_that_leave_the_class_of_a_layer_change_the_planners_key_too() -> None:
    before, model = LatencyKey.of(HFTarget(tiny_model())), tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.register_buffer("weight_scale", torch.ones(96, dtype=torch.bfloat16))
    assert LatencyKey.of(HFTarget(model)) != before


def test_every_precision_is_named_where_names_are_listed() -> None:
    assert tuple(SCHEMES) == SCHEME_NAMES
    assert {*load_plan._BITS} == {*SCHEME_NAMES, *STORED_NAMES}
    for name in (*SCHEMES, *STORED_NAMES):
        check_scheme(name)


def test_names_are_checked_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown quantization 'int5'; did you mean"):
        quantize_linears(tiny_model(), "int5")


def test_a_model_is_quantized_once_and_only_where_it_has_linear_layers() -> None:
    model = tiny_model()
    quantize_linears(model, "int8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_linears(model, "int4")
    with pytest.raises(ValueError, match="no linear layers"):
        quantize_linears(nn.Sequential(nn.Embedding(4, 4)), "int8")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(ValueError, match=r"specdec\[bitsandbytes\]"):
        quantize_linears(tiny_model(), "nf4")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"specdec\[torchao\]"):
        SCHEMES["int8"].other(tiny_model())


@pytest.mark.parametrize(
    ("module", "extra", "name", "wanted"),
    [
        ("bitsandbytes", "bitsandbytes", "nf4", "Linear4bit"),
        ("torchao", "torchao", "int8", "Int8WeightOnlyConfig"),
        ("torchao", "torchao", "int4", "Int4WeightOnlyConfig"),
    ],
)
def test_a_library_that_is_too_old_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str, name: str, wanted: str
) -> None:
    for part in (module, f"{module}.nn", f"{module}.quantization"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    with pytest.raises(ValueError, match=rf"{module} is too old, it has no {wanted}: .*specdec\[{extra}\]"):
        SCHEMES[name].other(tiny_model())


def test_a_model_on_several_devices_is_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="layers on cpu and meta"):
        quantize_linears(model, "int8")
    with pytest.raises(ValueError, match="weights on cpu and meta"):
        HFTarget(model)


def test_a_cpu_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="VNNI"):
        quantize_linears(tiny_model(), "w8a8")
