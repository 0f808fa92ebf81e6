"""Files with weights in blocks of 4 or 8 bits: computed with as they are stored, and to the numbers they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from integration.checkpoints import q8_0, save_blocks, save_gguf
from specdec.decoder import SpecDecoder
from specdec.group_panels import GroupW8A8PanelWeight, W4A8PanelWeight
from specdec.memory import stored_bytes
from specdec.models import load_model
from specdec.panels import panels_run
from specdec.quantization import is_quantized
from specdec.quantized_checkpoints import read_4bit
from specdec.stored_weights import StoredInt4, StoredInt8, from_q8_0

VOCAB = 96
PROMPTS = [[5, 9, 13, 5, 9, 13, 5, 9], [60, 2, 60, 2, 60]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, initializer_range=0.3, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(torch.tensor([tokens])).logits[0]
    return out


def check(path: str, dense: Any, **options: Any) -> Any:
    """The file's numbers are computed with, no dense copy is kept, and drafts do not change the text."""
    decoder = SpecDecoder(path, "none", dtype="fp32", device="cpu", **options)
    loaded = decoder.target.model
    assert is_quantized(loaded)
    expected = logits(dense, PROMPTS[0])
    # Sums of float32 in another order.
    torch.testing.assert_close(logits(loaded, PROMPTS[0]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    plain = [decoder.generate(prompt, max_new_tokens=16).token_ids for prompt in PROMPTS]
    assert len({token for text in plain for token in text}) > 8
    for drafter in ("ngram", "suffix"):
        other = SpecDecoder(decoder.target, drafter, adaptive=False, on_drafter_error="raise")
        assert [result.token_ids for result in other.generate(PROMPTS, max_new_tokens=16)] == plain
    return loaded


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq"])
def test_gptq_and_awq_files_are_run_from_their_codes(
    model: LlamaForCausalLM, tmp_path: Path, method: str, group: int
) -> None:
    dense = save_blocks(model, tmp_path, method, group)
    loaded = check(str(tmp_path), dense)
    assert sum(isinstance(module, StoredInt4) for module in loaded.modules()) == 2 * 4  # siblings are one product
    linears = sum(p.numel() for name, p in dense.named_parameters() if "_proj" in name)
    others = 4 * (sum(p.numel() for p in dense.parameters()) - linears)
    # Half a byte each, two float32 factors a group, and small buffers such as rotary frequencies.
    allowed = others + linears // 2 + 8 * linears // group + 4096
    assert stored_bytes([*loaded.parameters(), *loaded.buffers()]) <= allowed


@pytest.mark.parametrize(
    "changes", [{"bits": 8}, {"group_size": 16}, {"group_size": -1}, {"quant_method": "awq", "version": "gemv"}]
)
def test_layouts_the_kernels_have_not_are_left_to_the_library(
    model: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_blocks(model, tmp_path, "gptq", 32, **changes)
    assert read_4bit(tmp_path, torch.float32) is None


def test_groups_of_inputs_that_are_not_neighbours_are_left_to_the_library(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    save_blocks(model, tmp_path, "gptq", 32)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("g_idx"))
    state[name] = state[name].flip(0).contiguous()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_4bit(tmp_path, torch.float32) is None


# --- GGUF


def test_a_gguf_file_is_run_from_its_blocks(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    dense = save_gguf(model, path)
    loaded = check(str(path), dense, quantize="gguf")
    kinds = [type(module) for module in loaded.modules()]
    # Query and key, 4 bits, and value, 8, are not one product; gate and up are.
    assert (kinds.count(StoredInt4), kinds.count(StoredInt8)) == (2 * 5, 2 + 1)
    whole = load_model(str(path), device="cpu", dtype="fp32").model
    sizes = [stored_bytes([*each.parameters(), *each.buffers()]) for each in (loaded, whole)]
    assert sizes[0] < 0.35 * sizes[1]


def test_blocks_times_activations_in_8_bit_give_a_text_of_their_own(model: LlamaForCausalLM, tmp_path: Path) -> None:
    if not panels_run():
        pytest.skip("our own kernels do not run here")
    path = tmp_path / "tiny.gguf"
    save_gguf(model, path)
    decoder = SpecDecoder(str(path), "none", dtype="bf16", device="cpu", quantize="gguf-a8")
    loaded = decoder.target.model
    kinds = [type(module) for module in loaded.modules()]
    assert (kinds.count(W4A8PanelWeight), kinds.count(GroupW8A8PanelWeight)) == (2 * 5, 2 + 1)
    exact = logits(load_model(str(path), device="cpu", dtype="bf16", quantize="gguf").model, PROMPTS[0]).float()
    off = (logits(loaded, PROMPTS[0]).float() - exact).norm() / exact.norm()
    assert 0 < float(off) < 0.1  # a level is 1 / 127 of the largest of 32, ten times in a row
    plain = [decoder.generate(prompt, max_new_tokens=16).token_ids for prompt in PROMPTS]
    for drafter in ("ngram", "suffix"):
        other = SpecDecoder(decoder.target, drafter, adaptive=False, on_drafter_error="raise")
        assert [result.token_ids for result in other.generate(PROMPTS, max_new_tokens=16)] == plain
    with pytest.raises(ValueError, match="activations in 8 bit by groups need"):
        load_model(str(path), device="cpu", dtype="fp32", quantize="gguf-a8")


def test_only_gguf_files_have_blocks_to_keep(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"keeps the blocks of a \.gguf file"):
        load_model(str(tmp_path), device="cpu", quantize="gguf")


def test_blocks_of_8_bits_are_read_as_the_format_says() -> None:
    raw, _ = q8_0(torch.randn(3, 64))
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(np.asarray(from_q8_0(torch.from_numpy(raw)).dequantize()), expected)
    with pytest.raises(ValueError, match="blocks must be"):
        from_q8_0(torch.zeros(3, 33, dtype=torch.uint8))
