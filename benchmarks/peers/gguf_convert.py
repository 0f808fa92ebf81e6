"""One GGUF file in another tensor type, metadata kept: llama.cpp runs the very weights that the other engines run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType

__all__ = ["GGUF_TYPES", "convert_gguf", "main_tensor_type"]

# Precision of a peer -> tensor type that its matrices are stored in, and the file type that says so.
GGUF_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "fp32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
# Fields that describe the container, or that the writer sets itself.
_OWN_FIELDS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def main_tensor_type(path: Path) -> str:
    """The tensor type that holds most of a GGUF file's weights, as a peer's precision names it ("q4_1", "fp32")."""
    sizes: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    if not sizes:
        raise ValueError(f"{path} holds no tensors")
    name = sizes.most_common(1)[0][0].lower()
    return "fp32" if name == "f32" else name


def convert_gguf(source: Path, target: Path, precision: str) -> None:
    """Write `source` to `target` with its matrices dequantised and stored in another type.

    Vectors (norms, biases) become fp32, as llama.cpp's own tools have it. A matrix whose rows do not fill the type's
    blocks is kept in f16.

    Args:
        source: a GGUF file of any tensor types that the `gguf` package can dequantise.
        target: the file to write; overwritten where it exists.
        precision: a key of `GGUF_TYPES`.

    Raises:
        ValueError: `precision` is none of these.
    """
    if precision not in GGUF_TYPES:
        raise ValueError(f"precision must be one of {', '.join(GGUF_TYPES)}, got {precision!r}")
    matrix_type, file_type = GGUF_TYPES[precision]
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture")
    if architecture is None:
        raise ValueError(f"{source} does not say its architecture")
    writer = gguf.GGUFWriter(target, architecture.contents())
    for field in reader.fields.values():
        if field.name.startswith(_OWN_FIELDS):
            continue
        item_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item_type)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    plan = [(tensor, _stored_type(tensor, matrix_type)) for tensor in reader.tensors]
    for tensor, stored in plan:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        size = int(np.prod(shape)) * gguf.GGML_QUANT_SIZES[stored][1] // gguf.GGML_QUANT_SIZES[stored][0]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, stored)
        writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, stored in plan:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(gguf.quantize(values, stored).view(np.uint8))
    writer.close()


def _stored_type(tensor: gguf.ReaderTensor, matrix_type: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) < 2:
        return GGMLQuantizationType.F32
    block_len = gguf.GGML_QUANT_SIZES[matrix_type][0]
    return matrix_type if int(tensor.shape[0]) % block_len == 0 else GGMLQuantizationType.F16
