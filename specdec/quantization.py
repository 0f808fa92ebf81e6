"""Targets whose linear layers compute with 8- or 4-bit weights, made at load from a model's own weights.

On a CPU they run by kernels of ours or PyTorch's, packed as ``specdec.packing`` packs 16-bit ones; elsewhere torchao
does it, and NF4 is bitsandbytes' everywhere. Every layer on the CPU computes a row without regard to its neighbours, so
a pass over a tree says what a pass over one node says: speculation gives the quantized model's own text.

``int8``   weights with a scale per output channel; activations stay as they are.
``w8a8``   int8 x int8: activations get a scale per row as they come (LLM.int8, Dettmers et al. 2022, section 2.1, there
           called vector-wise). Sums of integers are exact.
``int4``   weights with a scale and a minimum per 32 input channels.
``int4-g128`` the same per 128 input channels, or as many of 64 and 32 as divide them: what GPTQ's and AWQ's files have.
``w4a8``   the weights of ``int4``; activations in int8 with a scale for every 32 of a row's, as they come.
``nf4``    the 16 quantiles of a normal distribution, blocks of 64, their scales quantized too (QLoRA, Dettmers et al.
           2023, section 3).
``fp6``    floating point of 1 + 3 + 2 bits, a scale per output channel (FP6-LLM, Xia et al. 2024), decoded in each
           call: less memory than int8, finer than int4, but slow; libraries no longer have it.
``gguf``   the Q4_1 and Q8_0 blocks of a GGUF file as they are stored.
``gguf-a8`` the same blocks; activations as in ``w4a8``: llama.cpp's scheme.

Weight-only kernels read less, which pays for few rows. Ours then cost what 16-bit ones do, PyTorch's more per row.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels.decoder_layer import Numbers
from specdec.kernels.w4a16 import from_dense
from specdec.kernels.w4a16.weight import GROUP_SIZES, halves_suffice
from specdec.packing import WeightFactory, pack_linears
from specdec.panels import Int8PanelWeight, PanelWeight, W8A8PanelWeight
from specdec.precisions import BY_GROUPS_IN_8_BIT, STORED_NAMES
from specdec.quantized_weight import SMALLEST, Fp6Weight, QuantizedWeight, round_rows
from specdec.registry import unknown
from specdec.stored_weights import check_in_8_bit, own_kernels_multiply, run_int4

GROUP = 32
"""Input channels that share a scale in ``int4``."""

_OUTPUTS = 16
"""What PyTorch's int4 kernel wants the output channels to be a multiple of."""
_BLOCK = 64
"""Input channels of a block in ``nf4``; bitsandbytes' CPU kernels want whole ones."""
_ZERO_POINT = 128
"""Of activations in ``w8a8``: oneDNN is fast with unsigned ones."""


class Int8Weight(QuantizedWeight):
    """int8 weights, a scale per output channel."""

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        whole, scales = round_rows(weight)
        return {"weight": whole, "scales": scales.to(weight.dtype)}

    def product(self, inputs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(inputs, self.weight, self.scales)  # type: ignore[no-any-return]


class W8A8Weight(QuantizedWeight):
    """int8 weights times activations in 8 bit, each row of them with its own scale."""

    zero_points: Tensor

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        whole, scales = round_rows(weight)
        packed = torch.ops.onednn.qlinear_prepack(whole, None)
        return {"weight": packed, "scales": scales, "zero_points": torch.zeros_like(scales, dtype=torch.int32)}

    def product(self, inputs: Tensor) -> Tensor:
        exact = inputs.float()
        scale = exact.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST).mul_(1 / 127)  # NaN stays, and fails the row
        rows = exact.div_(scale) if exact is not inputs else exact / scale
        shifted = rows.round_().add_(_ZERO_POINT).nan_to_num_(0.0).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, _ZERO_POINT, self.weight, self.scales, self.zero_points, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return out.mul_(scale).to(inputs.dtype)


def _int8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Our own kernels where they run, else PyTorch's."""
    kind = Int8PanelWeight if Int8PanelWeight.serves(weight) else Int8Weight
    return kind(weight, bias)


def _w8a8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The same, else oneDNN's; int8 where neither multiplies."""
    if W8A8PanelWeight.serves(weight):
        return W8A8PanelWeight(weight, bias)
    return W8A8Weight(weight, bias) if torch.cpu._is_vnni_supported() else _int8(weight, bias)


class Int4Weight(QuantizedWeight):
    """4-bit weights, a scale and a zero point per group of input channels."""

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.float().view(weight.shape[0], -1, GROUP)  # [out, groups, GROUP]
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).clamp(min=SMALLEST)
        levels = ((groups - low.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp(0, 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.view_as(weight), 1)
        both = torch.stack([scales, low + 8 * scales], -1).transpose(0, 1).contiguous()  # [groups, out, 2]
        return {"weight": packed, "scales": both.to(weight.dtype)}

    def product(self, inputs: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, self.weight, GROUP, self.scales)
        return out


def _int4_where_it_fits(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """int8 where the shape leaves no whole groups."""
    if weight.shape[1] % GROUP:
        return _int8(weight, bias)
    if own_kernels_multiply(weight.device, weight.dtype) and halves_suffice(weight, GROUP):
        return run_int4(from_dense(weight, GROUP, zero_points=False), bias, weight.dtype)
    return Int4Weight(weight, bias) if weight.shape[0] % _OUTPUTS == 0 else _int8(weight, bias)


def _int4_in_large_groups(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Rounded by each group's range, without calibration; int8 where no group size divides the inputs."""
    sizes = [size for size in GROUP_SIZES if weight.shape[1] % size == 0]
    if not sizes:
        return _int8(weight, bias)
    return run_int4(from_dense(weight, max(sizes), zero_points=False), bias, weight.dtype)


def _w4a8_where_it_fits(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """``w8a8`` where the shape leaves no whole groups, or float16 cannot hold their scales."""
    if weight.shape[1] % GROUP or not halves_suffice(weight, GROUP):
        return _w8a8(weight, bias)
    return run_int4(from_dense(weight, GROUP, zero_points=False), bias, weight.dtype, in_8_bit=True)


def _fp6_where_it_fits(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """int8 where codes would leave part of a byte."""
    return Fp6Weight(weight, bias) if Fp6Weight.fits(weight) else _int8(weight, bias)


def _on_the_spot(model: nn.Module, pack: WeightFactory) -> None:
    """By our own modules, which run on every device."""
    pack_linears(model, pack)


def _only_on_a_cpu(model: nn.Module) -> None:
    raise ValueError(f"quantize='w4a8' runs on a CPU alone, {type(model).__name__} is on another device: use 'int4'")


def _with_bitsandbytes(model: nn.Module) -> None:
    """NF4 with double quantization; the output head stays, as QLoRA leaves it, and so do rows of no whole blocks."""
    library = _bitsandbytes()
    output: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    for module in list(model.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is nn.Linear and linear is not output and linear.in_features % _BLOCK == 0:
                layer = library.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype,
                    quant_type="nf4", compress_statistics=True, device="meta",
                )  # fmt: skip
                layer.weight = library.Params4bit(
                    linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                layer.bias = linear.bias
                setattr(module, name, layer.to(linear.weight.device).eval())


def _bitsandbytes() -> ModuleType:
    return _library("bitsandbytes", "bitsandbytes.nn", "Linear4bit", "Params4bit")


def isolate_rows(model: nn.Module) -> int:
    """Make bitsandbytes' LLM.int8 layers, in place, compute a row without regard to its neighbours.

    LLM.int8 keeps the input channels in 16 bit that hold a large activation, in whichever row of the pass. So a draft
    beside a token would change what the model says of it. Here a row's own large activations are taken out, as the
    library does where the row is alone, and multiplied with the dequantized weight.

    Returns:
        How many layers were changed.
    """
    count = 0
    for module in model.modules():
        state: Any = getattr(module, "state", None)
        if type(module).__name__ == "Linear8bitLt" and state.threshold > 0:
            module.forward = _OwnOutliers(module, state.threshold)
            state.threshold = 0.0
            count += 1
    return count


class _OwnOutliers:
    """``forward`` of an LLM.int8 layer, a row's outliers being its own."""

    def __init__(self, layer: Any, threshold: float) -> None:
        self._layer, self._forward, self._threshold = layer, layer.forward, threshold

    def __call__(self, inputs: Tensor) -> Tensor:
        large = inputs.abs() >= self._threshold
        out: Tensor = self._forward(inputs.masked_fill(large, 0))
        if bool(large.any()):
            state = self._layer.state
            dense = (state.CB * (state.SCB.unsqueeze(1) / 127)).to(inputs.dtype)  # [out, in]
            out = out + nn.functional.linear(inputs.where(large, 0), dense)
        return out


def _library(name: str, module: str, *wanted: str) -> ModuleType:
    """A module with what is wanted of it; raises ValueError, with the extra to install, where that is not there."""
    try:
        library = importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} is needed and cannot be imported ({error}): pip install 'specdec[{name}]'") from error
    missing = [each for each in wanted if not hasattr(library, each)]
    if missing:
        raise ValueError(f"{name} is too old, it has no {missing[0]}: pip install -U 'specdec[{name}]'")
    return library


@dataclass(frozen=True)
class Scheme:
    """How a precision is made.

    Attributes:
        cpu: what a weight becomes on the CPU; None where ``other`` does it there too.
        other: does it on other devices, in place.
        check: raises ValueError where ``other`` cannot in a dtype, for want of a library.
    """

    cpu: WeightFactory | None
    other: Callable[[nn.Module], None]
    check: Callable[[torch.dtype | str], object] = lambda _: None


def _by_torchao(cpu: WeightFactory, config: str, *through: str, **options: Any) -> Scheme:
    """On other devices by a configuration of torchao's; through one of these libraries, which know bfloat16 alone."""

    def check(dtype: torch.dtype | str) -> ModuleType:
        library = _library("torchao", "torchao.quantization", config)
        if through and all(importlib.util.find_spec(name) is None for name in through):
            raise ValueError(f"torchao's {config} needs {' or '.join(through)}, which is missing: use 'int4-g128'")
        if through and dtype != torch.bfloat16:
            raise ValueError(f"torchao's {config} is for bfloat16, got {dtype}: use dtype='bf16' or 'int4-g128'")
        return library

    def apply(model: nn.Module) -> None:
        library = _library("torchao", "torchao.quantization", config)
        try:
            library.quantize_(model, getattr(library, config)(**options))
        except ImportError as error:
            raise ValueError(f"torchao cannot run {config} here: {error}") from error

    return Scheme(cpu, apply, check)


SCHEMES: Mapping[str, Scheme] = {
    "int8": _by_torchao(_int8, "Int8WeightOnlyConfig"),
    "w8a8": _by_torchao(_w8a8, "Int8DynamicActivationInt8WeightConfig"),
    "int4": _by_torchao(_int4_where_it_fits, "Int4WeightOnlyConfig", "mslk", "fbgemm_gpu", group_size=128),
    "int4-g128": Scheme(_int4_in_large_groups, lambda model: _on_the_spot(model, _int4_in_large_groups)),
    "w4a8": Scheme(_w4a8_where_it_fits, _only_on_a_cpu),
    "nf4": Scheme(None, _with_bitsandbytes, lambda _: _bitsandbytes()),
    "fp6": Scheme(_fp6_where_it_fits, lambda model: _on_the_spot(model, _fp6_where_it_fits)),
}
"""Names ``quantize=`` takes, those of ``SCHEME_NAMES``; beside them ``STORED_NAMES``."""


def check_scheme(name: str) -> None:
    """Raise ValueError, with the nearest names, where ``quantize=`` does not take this one."""
    if name not in SCHEMES and name not in STORED_NAMES:
        raise ValueError(unknown("quantization", name, [*SCHEMES, *STORED_NAMES]))


def check_runs(name: str, device: torch.device, dtype: torch.dtype | str) -> None:
    """See that a precision can be made and computed with, before anything is loaded.

    Args:
        name: what ``quantize=`` is to be.
        device: where the model goes.
        dtype: of the rest; "auto" is bfloat16.

    Raises:
        ValueError: for an unknown name; an instruction, a kernel or a library that is missing, or one that is too old.
    """
    check_scheme(name)
    what = torch.bfloat16 if dtype == "auto" else dtype
    if name in BY_GROUPS_IN_8_BIT:
        check_in_8_bit(device, what)
    if name in STORED_NAMES:
        return
    scheme = SCHEMES[name]
    if scheme.cpu is None or device.type != "cpu":
        scheme.check(what)
    elif scheme.cpu is _w8a8:
        _check_w8a8(what)


def _check_w8a8(dtype: torch.dtype | str) -> None:
    if not (torch.cpu._is_vnni_supported() or own_kernels_multiply(torch.device("cpu"), dtype)):
        # Without VNNI's instructions oneDNN adds products of 8 bit in 16, where they overflow.
        raise ValueError(
            f"quantize='w8a8' needs a CPU with AVX-512 VNNI, or bfloat16 and a C compiler, got {dtype}: use 'int8'"
        )


def usable(device: torch.device, dtype: torch.dtype | str) -> list[str]:
    """Names of the schemes that a device, the dtype of the rest and what is installed allow (``check_runs``)."""
    found = []
    for name in SCHEMES:
        with contextlib.suppress(ValueError):
            check_runs(name, device, dtype)
            found.append(name)
    return found


def is_quantized(model: Any) -> bool:
    """Whether a quantizer of transformers' or of ours made the model what it is."""
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    return any(
        isinstance(module, QuantizedWeight)
        or (isinstance(module, PanelWeight) and module.kind is not Numbers.IN_16_BIT)
        for module in model.modules()
    )


_FLAT = (Numbers.WEIGHTS_IN_8_BIT, Numbers.BOTH_IN_8_BIT, Numbers.GROUPS_IN_8_BIT, Numbers.GROUPS_IN_4_BIT)


def passes_stay_flat(model: Any) -> bool:
    """Whether passes of a quantized model over a few nodes take little longer than over one, as they do in 16 bits.

    Those of our own CPU kernels do, but for codes in groups times activations in 8 bits.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return False
    kinds = {module.kind for module in model.modules() if isinstance(module, PanelWeight)} - {Numbers.IN_16_BIT}
    others = any(isinstance(module, QuantizedWeight) for module in model.modules())
    return bool(kinds) and not others and kinds <= {*_FLAT}


def quantize_linears(model: nn.Module, name: str) -> None:
    """Quantize a model's linear layers in place, the output head included; embeddings and norms stay.

    Args:
        model: a loaded model, on the device it runs on.
        name: one of ``SCHEMES``.

    Raises:
        ValueError: for an unknown name, a model that is quantized already or has no linear layers of PyTorch's, a
            library that is missing or too old, or a CPU without the instructions.
    """
    check_scheme(name)
    if name in STORED_NAMES:
        raise ValueError(f"quantize={name!r} goes with a .gguf file to load; choose from {', '.join(SCHEMES)}")
    scheme = SCHEMES[name]
    if is_quantized(model):
        raise ValueError(f"quantize={name!r}: {type(model).__name__} is quantized already; leave quantize out")
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layers that quantize={name!r} knows")
    places = {linear.weight.device for linear in linears}
    if len(places) > 1:
        names = " and ".join(sorted(map(str, places)))
        raise ValueError(f"quantize={name!r}: {type(model).__name__} has its layers on {names}: load it on one device")
    if scheme.cpu is None or places != {torch.device("cpu")}:
        scheme.other(model)
        return
    if scheme.cpu is _w8a8:
        _check_w8a8(linears[0].weight.dtype)
    if scheme.cpu is _w4a8_where_it_fits:
        for linear in linears:
            check_in_8_bit(linear.weight.device, linear.weight.dtype)
    pack_linears(model, scheme.cpu)
