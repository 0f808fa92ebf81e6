"""Quantized targets, ours and those that transformers' own quantizers make: speculation gives their own text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from integration.checkpoints import save_bitsandbytes, save_compressed, save_quantized
from specdec.cli import main
from specdec.decoder import SpecDecoder
from specdec.models import load_model
from specdec.packing import cpu_takes_bfloat16
from specdec.panels import panels_run
from specdec.quantization import is_quantized

VOCAB = 96
PROMPTS = [[5, 9, 13, 5, 9, 13, 5, 9], [60, 2, 60, 2, 60]]
NEW_TOKENS = 24
needs_panels = pytest.mark.skipif(not panels_run(), reason="this CPU has none of our own kernels")
EVERY = [
    "int8",
    pytest.param("w8a8", marks=needs_panels),
    "int4",
    "int4-g128",
    "fp6",
    pytest.param(
        "nf4",
        marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model whose greedy text varies."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, initializer_range=0.3, max_position_embeddings=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def texts(target: Any, drafter: str, **options: Any) -> list[list[int]]:
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise", **options)
    results = decoder.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    return [result.token_ids for result in results]


@pytest.mark.parametrize("name", [*EVERY, pytest.param("w4a8", marks=needs_panels)])
def test_speculation_and_batches_give_the_quantized_models_own_text(folder: Path, name: str) -> None:
    decoder = SpecDecoder(str(folder), "none", dtype="bf16" if name in ("w4a8", "w8a8") else "fp32", quantize=name)
    assert is_quantized(decoder.target.model) or name == "nf4"
    plain = [decoder.generate(prompt, max_new_tokens=NEW_TOKENS).token_ids for prompt in PROMPTS]
    assert len({tuple(text) for text in plain}) == len(PROMPTS)
    for drafter in ("ngram", "suffix", "recycling"):
        assert texts(decoder.target, drafter) == plain, drafter


def test_quantized_text_is_not_that_of_the_dense_model(folder: Path) -> None:
    """Else the tests above would show nothing."""
    dense = texts(str(folder), "none", dtype="fp32")
    assert texts(str(folder), "none", dtype="fp32", quantize="int4") != dense


def test_the_rest_of_a_quantized_model_is_16_bit_where_the_cpu_computes_in_it(folder: Path) -> None:
    if not cpu_takes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    assert load_model(str(folder), device="cpu", quantize="int8").model.dtype == torch.bfloat16
    assert load_model(str(folder), device="cpu", quantize="int8", dtype="fp32").model.dtype == torch.float32


def test_bad_requests_are_refused_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(ValueError, match="activations in 8 bit by groups need"):
        SpecDecoder("no such model", quantize="w4a8", dtype="fp32", device="cpu")
    with pytest.raises(ValueError, match="unknown quantization 'int3'"):
        SpecDecoder("no such model", quantize="int3")
    loaded = load_model(str(folder))
    with pytest.raises(ValueError, match="loaded already"):
        SpecDecoder(loaded.model, quantize="int8")


def test_the_command_line_takes_the_precision(folder: Path) -> None:
    found = CliRunner().invoke(main, ["generate", "-m", str(folder), "--quantize", "int9", "text"])
    assert found.exit_code == 2
    assert "unknown quantization 'int9'" in found.stderr


# --- checkpoints of transformers' quantizers


def check(path: Path) -> None:
    """The checkpoint loads, is left as it is, and drafts do not change its text."""
    loaded = load_model(str(path), device="cpu", packed=True, dtype="fp32")
    assert is_quantized(loaded.model)
    plain = texts(loaded.model, "none")
    assert len({token for text in plain for token in text}) > 8  # a text that repeats itself would show little
    assert texts(loaded.model, "ngram") == plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes(folder: Path, tmp_path: Path, kind: str) -> None:
    check(save_bitsandbytes(folder, tmp_path, kind))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [
        "Int8WeightOnlyConfig",
        "Float8WeightOnlyConfig",
        pytest.param(
            "Int4WeightOnlyConfig",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("mslk") is None, reason="torchao computes in int4 on GPUs alone, through mslk"
            ),
        ),
    ],
)
def test_torchao(folder: Path, tmp_path: Path, kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    check(save_quantized(folder, tmp_path, TorchAoConfig(getattr(torchao, kind)())))


@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors(folder: Path, tmp_path: Path) -> None:
    check(save_compressed(folder, tmp_path))
