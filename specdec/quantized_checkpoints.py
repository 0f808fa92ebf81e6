"""Checkpoints whose weights a file has in blocks: GPTQ's and AWQ's 4 bits, and GGUF's Q4_1 and Q8_0.

Their codes are computed with as they are stored (``specdec.stored_weights``). Everything else, other numbers of bits or
groups of inputs that are not neighbours, is left to transformers and the libraries it asks for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.architecture import configs_by_layer
from specdec.kernels.w4a16 import Int4Weight, from_awq, from_gptq, from_q4_1
from specdec.kernels.w4a16.weight import GROUP_SIZES
from specdec.mismatched_weights import empty_model, read_quantization
from specdec.stored_weights import Int8Blocks, StoredWeight, from_q8_0, install

_WORDS = ("qweight", "qzeros", "scales", "g_idx")
"""What stands for a quantized linear layer's weight in a GPTQ or AWQ file."""


def read_4bit(folder: Path, dtype: torch.dtype | str) -> tuple[Any, list[str]] | None:
    """Load a GPTQ or AWQ checkpoint whose layout ``specdec.kernels.w4a16`` has.

    Args:
        folder: its files, safetensors, in which layers have the sizes of the model's (``find_wrong_size``).
        dtype: of what is not quantized, and of activations; "auto" is the checkpoint's own.

    Returns:
        The model, on the CPU, and the names of weights the files lack; None where the checkpoint is another one.
    """
    settings = _settings(folder)
    if settings is None:
        return None
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    what = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None) or torch.float16
    model = empty_model(config, what)
    layers, rest = _sorted(folder)
    modules = dict(model.named_modules())
    if not layers or not all(type(modules.get(name)) is nn.Linear for name in layers):
        return None
    try:
        stored = {name: _weight(words, settings) for name, words in layers.items()}
    except (ValueError, KeyError):
        return None
    state = {name: value.to(what) if value.is_floating_point() else value for name, value in rest.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    replaced = {f"{name}.weight" for name in stored}
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta and name not in replaced)
    if missing:
        return model, missing
    install(model, stored, what)
    if (folder / "generation_config.json").is_file():
        settings_of: Any = GenerationConfig
        model.generation_config = settings_of.from_pretrained(folder, local_files_only=True)
    return model, []


def missing_library(folder: Path, error: Exception) -> str:
    """What to add to an error in loading a folder: the library that its quantized weights need and how to install it.

    Returns:
        Nothing where that library is there, and the error none that a version too old would raise; nor for errors that
        do not come from a library: of files, settings and values.
    """
    settings = read_quantization(folder)
    if settings is None or not isinstance(error, _OF_LIBRARIES):
        return ""
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    needed = _LIBRARIES.get(method, ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    start = f". Its weights are quantized ({method}): "
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{start}{' and '.join(missing)} {verb} missing, pip install 'specdec[quantized]'"
    if needed and not isinstance(error, RuntimeError):
        return f"{start}{' or '.join(needed)} may be too old, pip install -U 'specdec[quantized]'"
    return ""


_OF_LIBRARIES = (ImportError, RuntimeError, NameError, AttributeError, TypeError)
"""What transformers' quantizers raise without their library or with another version of it. GPTQ's RuntimeError says
that a GPU is required, where it is gptqmodel that is missing."""

_LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",), "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",), "torchao": ("torchao",),
}  # fmt: skip
"""Modules that transformers loads a method's checkpoints with; the extra ``quantized`` brings them."""


def _settings(folder: Path) -> Mapping[str, Any] | None:
    """A configuration's entry on quantization where it says 4 bits in GPTQ's or AWQ's usual layout."""
    found = read_quantization(folder)
    if found is None or found.get("quant_method") not in ("gptq", "awq"):
        return None
    bits = found.get("bits", found.get("w_bit"))
    group = found.get("group_size", found.get("q_group_size"))
    layout = str(found.get("version") or found.get("format") or "gemm").lower()
    known = layout == "gemm" if found["quant_method"] == "awq" else True
    return found if bits == 4 and group in GROUP_SIZES and known else None


def _sorted(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Quantized linear layers by name, each with its ``_WORDS``; and all other tensors."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    quantized = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in quantized}
    rest = {}
    for name, value in tensors.items():
        layer, _, word = name.rpartition(".")
        if layer in quantized and word in _WORDS:
            layers[layer][word] = value
        else:
            rest[name] = value
    return layers, rest


def _weight(words: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Int4Weight:
    if settings["quant_method"] == "awq":
        return from_awq(words["qweight"], words["qzeros"], words["scales"])
    less_one = str(settings.get("checkpoint_format", "gptq")) != "gptq_v2"
    return from_gptq(words["qweight"], words["qzeros"], words["scales"], words.get("g_idx"), less_one)


def _shape(stored: StoredWeight) -> tuple[int, int]:
    if isinstance(stored, Int4Weight):
        return stored.num_outputs, stored.num_inputs
    return stored.codes.shape[0], stored.codes.shape[1]


def find_blocks(name: str, path: Path | None, quantize: str) -> Path:
    """The GGUF file that a model is read from; raises ValueError where it is read from something else."""
    if path is None or path.suffix != ".gguf":
        raise ValueError(f"quantize={quantize!r} keeps the blocks of a .gguf file, {name!r} is none: choose another")
    return path


def keep_blocks(model: Any, path: Path, *, in_8_bit: bool = False) -> int:
    """Give a model's linear layers the Q4_1 and Q8_0 blocks of the GGUF file it came from, in place.

    A layer takes its blocks where they are, decoded, the very numbers it has: as they lie, or with rows of heads put
    in transformers' order. Others stay.

    Args:
        model: loaded from the file, dense.
        path: the file.
        in_8_bit: whether their activations are.

    Returns:
        How many layers were replaced.

    Raises:
        ValueError: where none could be, or for activations in 8 bit that this processor has no kernels for.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(str(path))
    readers: dict[Any, Callable[[Tensor], StoredWeight]] = {
        GGMLQuantizationType.Q4_1: from_q4_1, GGMLQuantizationType.Q8_0: from_q8_0,
    }  # fmt: skip
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(reader, int(model.config.num_hidden_layers))
    tied = "output.weight" not in tensors
    stored: dict[str, StoredWeight] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        base = names(f"{name}.weight")
        if tied and module is model.get_output_embeddings():
            base = "token_embd.weight"
        tensor = tensors.get(base or "")
        read = None if tensor is None else readers.get(tensor.tensor_type)
        if tensor is None or read is None:
            continue
        found = _matching(read(torch.from_numpy(tensor.data.copy())), module.weight, model.config)
        if found is not None:
            stored[name] = found
    if not stored:
        raise ValueError(f"{path} has no linear layer in Q4_1 or Q8_0: load it without quantize")
    return install(model, stored, model.dtype, in_8_bit=in_8_bit)


def _names(reader: Any, layers: int) -> Callable[[str], str | None]:
    """From transformers' names of weights to the file's."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = str(reader.get_field("general.architecture").contents())
    found = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    if not found:
        raise ValueError(f"the gguf package does not know the architecture {architecture!r}: pip install -U gguf")
    table = get_tensor_name_map(found[0], layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight",))


def _matching(blocks: StoredWeight, weight: Tensor, config: Any) -> StoredWeight | None:
    """The blocks in the order in which they are the weight, or None."""
    if _shape(blocks) != tuple(weight.shape):
        return None
    for order in _orders(len(weight), config):
        if torch.equal(blocks.dequantize(torch.float32).to(weight.dtype)[order], weight.cpu()):
            parts = {name: getattr(blocks, name)[order].contiguous() for name in _PARTS[type(blocks)]}
            made: Any = type(blocks)(**{name: part.to(weight.device) for name, part in parts.items()})
            return made  # type: ignore[no-any-return]
    return None


def _orders(rows: int, config: Any) -> list[Tensor]:
    """Orders that rows of a projection may be in: as in the file, or halves of a head's rotary pairs apart."""
    heads: set[int] = set()
    for layer in configs_by_layer(config):
        heads |= {layer.num_attention_heads, getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads}
    plain = torch.arange(rows)
    turned = [
        plain.view(count, rows // count // 2, 2).transpose(1, 2).flatten()
        for count in sorted(heads)
        if rows % (2 * count) == 0
    ]
    return [plain, *turned]


_PARTS: Mapping[type, tuple[str, ...]] = {Int4Weight: ("codes", "scales", "offsets"), Int8Blocks: ("codes", "scales")}
