"""Quantized targets, ours and those that transformers' own quantizers make: speculation gives their own text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


def quantized_checkpoint(folder: Path, out: Path, settings: Any) -> Path:
    """The model quantized by transformers on the way in, and saved."""
    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(folder, quantization_config=settings, dtype=torch.float32, device_map="cpu").save_pretrained(
        out
    )
    return out


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
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "int8": {"load_in_8bit": True},
    }[kind]
    check(quantized_checkpoint(folder, tmp_path, BitsAndBytesConfig(**settings)))


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

    check(quantized_checkpoint(folder, tmp_path, TorchAoConfig(getattr(torchao, kind)())))


@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors(folder: Path, tmp_path: Path) -> None:
    """Weights in 8 bit with a scale per channel, written as the library writes them."""
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
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    check(tmp_path)


def test_gptq_and_awq_need_a_library_that_is_named(folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is there: nothing is missing")
    for method in ("gptq", "awq"):
        settings = {"quant_method": method, "bits": 4, "group_size": 32}
        path = with_config(folder, tmp_path / method, quantization_config=settings)
        with pytest.raises(ValueError, match=r"specdec\[quantized\]"):
            load_model(str(path), device="cpu")


@pytest.mark.parametrize("kind", [RuntimeError, NameError, TypeError])
def test_whatever_a_quantizer_raises_comes_with_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """GPTQ's says that a GPU is required, or that a name is not defined, where it is gptqmodel that is missing."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise kind("GPU is required")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    settings = {"quant_method": "gptq", "bits": 3, "group_size": 32}
    path = with_config(folder, tmp_path / "gptq", quantization_config=settings)
    with pytest.raises(
        ValueError, match=r"GPU is required. Its weights are quantized \(gptq\): .*specdec\[quantized\]"
    ):
        load_model(str(path), device="cpu")
    ours = ValueError if kind is RuntimeError else kind  # a mistake in a model's code is not to be hidden
    with pytest.raises(ours, match=r"GPU is required$"):
        load_model(str(folder), device="cpu")


def test_a_checkpoint_of_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    other = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=VOCAB).to_dict()
    path = with_config(folder, tmp_path / "other", **(other | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ValueError, match=r"lacks .* of the model's weights"):
        load_model(str(path), device="cpu", quantize="int8")


def with_config(folder: Path, out: Path, **changes: Any) -> Path:
    """The model's weights below a configuration that differs."""
    out.mkdir()
    settings = json.loads((folder / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(settings))
    (out / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return out
