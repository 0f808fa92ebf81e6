"""Where a checkpoint's files and its configuration are of different models: names, numbers of layers, sizes.

Loading such files fails with whatever comes first, a library that is missing or an operation that does not exist, and
bitsandbytes' layers load in any size. What is wrong is read from the files' headers.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdec.load_plan import read_headers

_Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_ADVICE = "put the config.json there that they were saved with"
_SHOWN = 3
"""Names of layers that a message gives of either side."""
_IN_STACK = re.compile(r"(.+?)\.(\d+)\.(.+)")
"""A layer's stack, its place there, and its name within."""


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """What a folder's configuration says of how its weights are quantized; None where that is nothing."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of a configuration, its linear layers plain and its weights without memory."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    accelerate: Any = importlib.import_module("accelerate")  # without types
    with accelerate.init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=dtype)


def find_mismatch(folder: Path) -> str | None:
    """What the files have that the configuration's model has not, or the other way round.

    Args:
        folder: a checkpoint in safetensors, quantized or not.

    Returns:
        Half a sentence with names or numbers of both, and what to do; None where nothing of the kind is found, or
        headers or configuration cannot be read.
    """
    found = _read(folder)
    if found is None:
        return None
    model, headers = found
    return _other_names(model, headers) or _other_layers(model, headers) or _other_sizes(model, headers, folder)


def find_wrong_size(folder: Path) -> str | None:
    """The same of sizes of quantized linear layers alone: a library may load them in any."""
    settings = read_quantization(folder)
    found = None if settings is None else _read(folder)
    if settings is None or found is None:
        return None
    return _first_wrong(_quantized_sizes(*found, settings, folder))


def find_left_out(model: Any, unexpected: Iterable[str], folder: Path) -> str | None:
    """What a checkpoint holds of the model's own parts that loading it left out, such as layers beyond the model's.

    Args:
        model: as loaded.
        unexpected: names of the files' tensors that transformers found no place for, without those that it ignores for
            this architecture.
        folder: the checkpoint.

    Returns:
        Half a sentence with the number and the first name, and what to do. None where all is of parts that the model
        has not at all (heads for drafting, a vision tower), or of layers that its configuration names for predicting
        further tokens; or stands beside a layer's weights and is a quantizer's or what the model computes; or is a
        single number or a table of rotary embeddings.
    """
    unexpected = sorted(unexpected)
    if not unexpected:
        return None
    prefix = f"{model.base_model_prefix}."
    children = {name for part in (model, model.base_model) for name, _ in part.named_children()}
    modules = {name.removeprefix(prefix) for name, _ in model.named_modules()}
    computed = {name.removeprefix(prefix) for name, _ in model.named_buffers()}
    headers = read_headers(folder)
    plain = read_quantization(folder) is None
    dense = {name for name, (dtype, _) in headers.items() if plain and dtype.is_floating_point}
    constants = {name for name, (_, shape) in headers.items() if math.prod(shape) == 1}

    def is_left_out(name: str) -> bool:
        own = name.removeprefix(prefix)
        layer = _IN_STACK.fullmatch(own)
        if own.partition(".")[0] not in children or (layer and int(layer[2]) in _further_layers(model)):
            return False
        if name in constants or ".rotary_emb." in f".{own}":
            return False
        return _owner(own) not in modules or (name in dense and own not in computed)

    found = list(filter(is_left_out, unexpected))
    if not found:
        return None
    return (
        f"its files hold {len(found)} weights that {type(model).__name__} has no place for under its configuration, "
        f"{found[0]!r} first: they are another model's, {_ADVICE}; or they are of an adapter, which has to be merged "
        "first; or they are of no use, then take them out of the files"
    )


def _further_layers(model: Any) -> range:
    """Places in a stack, behind the model's own, of layers that predict further tokens."""
    first = getattr(model.config, "num_hidden_layers", None) or 0
    return range(first, first + (getattr(model.config, "num_nextn_predict_layers", None) or 0))


def _read(folder: Path) -> tuple[Any, _Headers] | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        headers = read_headers(folder)
        return (empty_model(config), headers) if headers else None
    except Exception:  # whatever a damaged configuration makes of a model: loading it said so already, or will
        return None


def _owner(name: str) -> str:
    """The layer that a tensor of a file belongs to; bitsandbytes puts words behind ``.weight``, others beside it."""
    layer, *words = re.split(r"\.weight(?=[._]|$)", name, maxsplit=1)
    return layer if words else name.rpartition(".")[0]


def _other_names(model: Any, headers: _Headers) -> str | None:
    """Half of the layers' names or more are unknown to the model.

    Less may be what transformers renames or merges on the way in, such as experts: their numbers are left out.
    """
    stored = _matrices({_owner(name) for name, (_, shape) in headers.items() if len(shape) > 1})
    own = _matrices({_owner(name) for name, parameter in model.named_parameters() if parameter.ndim > 1})
    unknown = stored - own
    if not own or not unknown or 2 * len(unknown) < len(stored):
        return None
    return (
        f"its files have layers named {_listed(unknown)}, {type(model).__name__} has {_listed(own)}: they are of "
        f"another architecture, {_ADVICE}"
    )


def _matrices(layers: Set[str]) -> set[str]:
    """Names within a layer of the stack, without those that have numbers of their own."""
    found = {match[3] for match in map(_IN_STACK.fullmatch, layers) if match}
    return {name for name in found if not any(part.isdigit() for part in name.split("."))} or found


def _listed(names: Set[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def _other_layers(model: Any, headers: _Headers) -> str | None:
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())  # such as layers for drafts
    names = [name for name in headers if not any(re.search(pattern, name) for pattern in ignored)]
    stored, own = _depths(names), _depths(name for name, _ in model.named_parameters())
    for stack in sorted(stored.keys() & own.keys()):
        if stored[stack] != own[stack] and stored[stack] - 1 not in _further_layers(model):
            return (
                f"its files have {stored[stack]} layers in {stack}, its configuration asks for {own[stack]}: they are "
                f"another model's, {_ADVICE}"
            )
    return None


def _depths(names: Any) -> dict[str, int]:
    """Layers by the name of their stack."""
    found: dict[str, int] = {}
    for match in map(_IN_STACK.fullmatch, names):
        if match:
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _other_sizes(model: Any, headers: _Headers, folder: Path) -> str | None:
    quantized = _first_wrong(_quantized_sizes(model, headers, read_quantization(folder) or {}, folder))
    return quantized or _first_wrong(_plain_sizes(model, headers))


_Sizes = Iterator[tuple[str, str, str]]
"""A name, its size in the files, and in the model."""


def _first_wrong(sizes: _Sizes) -> str | None:
    for name, stored, own in sizes:
        if stored != own:
            return f"{name} is {stored} in the files, {own} in the model: they are of another architecture, {_ADVICE}"
    return None


def _plain_sizes(model: Any, headers: _Headers) -> _Sizes:
    """Of tensors that are stored as the model has them."""
    for name, parameter in model.named_parameters():
        dtype, stored = headers.get(name, (torch.uint8, ()))
        if dtype.is_floating_point and not any(key.startswith(f"{name}.") for key in headers):
            yield name, str([*stored]), str([*parameter.shape])


def _quantized_sizes(model: Any, headers: _Headers, settings: Mapping[str, Any], folder: Path) -> _Sizes:
    """Of linear layers in the formats whose sizes can be told."""
    size_of = {
        "gptq": _gptq_size, "awq": _awq_size, "bitsandbytes": _bitsandbytes_size,
        "compressed-tensors": _compressed_size,
    }.get(str(settings.get("quant_method")))  # fmt: skip
    if size_of is None:
        return
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            found = size_of(name, headers, settings, folder)
            own, count = [module.out_features, module.in_features], module.weight.numel()
            if isinstance(found, int):
                yield name, f"{found} weights", f"{count + count % 2} weights"
            elif found is not None:
                yield name, str(found), str(own)


def _gptq_size(name: str, headers: _Headers, settings: Mapping[str, Any], folder: Path) -> list[int] | None:
    dtype, shape = headers.get(f"{name}.qweight", (torch.int32, ()))
    bits = settings.get("bits")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    usual = layout in ("gptq", "gptq_v2") and not settings.get("dynamic")  # dynamic: bits by layer
    if len(shape) != 2 or not isinstance(bits, int) or bits < 1 or not usual:
        return None
    return [shape[1], shape[0] * 8 * dtype.itemsize // bits]


def _awq_size(name: str, headers: _Headers, settings: Mapping[str, Any], folder: Path) -> list[int] | None:
    shape = headers[f"{name}.qweight"][1] if f"{name}.qweight" in headers else ()
    bits = settings.get("bits", settings.get("w_bit"))
    usual = str(settings.get("version") or settings.get("format") or "gemm").lower() == "gemm"
    return [shape[1] * 8, shape[0]] if len(shape) == 2 and bits == 4 and usual else None


def _bitsandbytes_size(
    name: str, headers: _Headers, settings: Mapping[str, Any], folder: Path
) -> list[int] | int | None:
    """Of 4 bits the number of weights alone is known, two a byte, the last one perhaps alone."""
    dtype, shape = headers.get(f"{name}.weight", (torch.uint8, ()))
    if f"{name}.SCB" in headers and len(shape) == 2:
        return [*shape]
    packed = any(key.startswith(f"{name}.weight.quant_state.") for key in headers)
    return 2 * math.prod(shape) * dtype.itemsize if packed else None


def _compressed_size(name: str, headers: _Headers, settings: Mapping[str, Any], folder: Path) -> list[int] | None:
    if f"{name}.weight_shape" in headers:
        return _read_numbers(folder, f"{name}.weight_shape")
    dtype, shape = headers.get(f"{name}.weight", (torch.uint8, ()))
    return [*shape] if dtype.itemsize == 1 and dtype != torch.uint8 and len(shape) == 2 else None


def _read_numbers(folder: Path, name: str) -> list[int] | None:
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  # the file is no mapping
                return [int(number) for number in file.get_tensor(name)]
    return None
