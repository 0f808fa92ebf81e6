"""Tiny checkpoints with quantized weights, written as the quantizers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from specdec.kernels.w4a16 import Int4Weight, from_dense
from specdec.stored_weights import Int8Blocks, from_q8_0

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def _words(fields: Tensor) -> Tensor:
    """``[a, 8 b]`` numbers of 4 bits to ``[a, b]`` int32, eight a word, the first in the lowest bits."""
    parts = fields.unflatten(1, (-1, 8)).long() << 4 * torch.arange(8)
    whole = parts.sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def _as_gptq(weight: Int4Weight, version: str) -> dict[str, Tensor]:
    codes, zeros = weight.unpack(), weight.offsets.long()
    stored = zeros - 1 if version == "gptq" else zeros
    groups = torch.arange(weight.num_inputs) // weight.group_size
    return {
        "qweight": _words(codes).t().contiguous(), "qzeros": _words((stored & 15).t().contiguous()),
        "scales": weight.scales.t().contiguous(), "g_idx": groups.to(torch.int32),
    }  # fmt: skip


def _as_awq(weight: Int4Weight) -> dict[str, Tensor]:
    def mixed(columns: Tensor) -> Tensor:
        return _words(columns.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1))

    codes, zeros = weight.unpack().t().contiguous(), weight.offsets.t().contiguous()
    return {"qweight": mixed(codes), "qzeros": mixed(zeros), "scales": weight.scales.t().contiguous()}


def save_blocks(model: LlamaForCausalLM, out: Path, method: str, group: int, **changes: Any) -> LlamaForCausalLM:
    """Write the model in a method's layout; the same numbers, dense, are returned."""
    model.save_pretrained(out)
    dense = LlamaForCausalLM(model.config)
    state = load_file(out / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        weight = from_dense(state.pop(name), group)
        if method != "awq":  # 0 is stored as -1, which wraps: published files have none
            offsets = weight.offsets.clamp(min=1)
            weight = Int4Weight(weight.codes, weight.scales, offsets)
        parts = _as_awq(weight) if method == "awq" else _as_gptq(weight, method)
        state |= {name.replace("weight", word): part for word, part in parts.items()}
        dense.get_parameter(name).data = weight.dequantize()
    for name in [name for name in state if dense.state_dict().get(name) is not None]:
        dense.get_parameter(name).data = state[name].clone()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "awq" if method == "awq" else "gptq", "bits": 4, "group_size": group}
    settings |= {"version": "gemm", "zero_point": True} if method == "awq" else {"checkpoint_format": method}
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": settings | changes}
    (out / "config.json").write_text(json.dumps(config))
    return dense.eval()


def _q4_1(weight: Int4Weight) -> np.ndarray:
    head = torch.stack([weight.scales, weight.offsets], -1).view(torch.uint8).view(weight.num_outputs, -1, 4)
    codes = weight.codes.view(weight.num_outputs, -1, 16)
    return np.asarray(torch.cat([head, codes], -1).flatten(1))


def q8_0(dense: Tensor) -> tuple[np.ndarray, Int8Blocks]:
    groups = dense.unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    raw = torch.cat([scales.unsqueeze(-1).view(torch.uint8), codes.view(torch.uint8)], -1).flatten(1)
    return np.asarray(raw), from_q8_0(raw)


def save_gguf(model: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """The model in Q4_1, its head and value projections in Q8_0; the same numbers, dense, are returned."""
    config = model.config
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [chr(0x100 + i) for i in range(config.vocab_size - 1)]
    tokens.append(tokens[0] + tokens[1])
    writer.add_token_list(tokens)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    dense = LlamaForCausalLM(config).eval()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        stored = table.get_name(name, try_suffixes=(".weight",))
        own, target = parameter.detach(), dense.get_parameter(name)
        if own.ndim == 1 or "embed" in name:
            writer.add_tensor(stored, own.numpy())
            target.data = own.clone()
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        rows = torch.arange(len(own))
        if heads is not None:  # the format keeps the two numbers of a rotary pair beside each other
            rows = rows.view(heads, 2, -1).transpose(1, 2).flatten()
        if "v_proj" in name or "lm_head" in name:
            raw, blocks = q8_0(own[rows])
            kind, numbers = gguf.GGMLQuantizationType.Q8_0, blocks.dequantize()
        else:
            weight = from_dense(own[rows], 32, zero_points=False)
            raw, kind, numbers = _q4_1(weight), gguf.GGMLQuantizationType.Q4_1, weight.dequantize()
        writer.add_tensor(stored, raw, raw_dtype=kind)
        target.data = torch.empty_like(numbers)
        target.data[rows] = numbers
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def save_quantized(folder: Path, out: Path, settings: Any) -> Path:
    """A saved model quantized by transformers on the way in, and saved."""
    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(folder, quantization_config=settings, dtype=torch.float32, device_map="cpu").save_pretrained(
        out
    )
    return out


def save_bitsandbytes(folder: Path, out: Path, kind: str) -> Path:
    """The same by bitsandbytes: ``nf4`` or ``int8``."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[kind]
    return save_quantized(folder, out, BitsAndBytesConfig(**settings))


def save_compressed(folder: Path, out: Path) -> Path:
    """The same by compressed-tensors: weights in 8 bit with a scale per channel."""
    compressed = pytest.importorskip("compressed_tensors")
    weights = compressed.quantization.QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    scheme = compressed.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = compressed.quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compressed.quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(-1, keepdim=True) / 127
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.zero_()
            module.quantization_status = compressed.quantization.QuantizationStatus.FROZEN
    compressor = compressed.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    return out


def with_config(folder: Path, out: Path, **changes: Any) -> Path:
    """A checkpoint's weights below a configuration that differs."""
    out.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(settings))
    (out / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return out
