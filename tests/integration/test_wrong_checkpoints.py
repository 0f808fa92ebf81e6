"""What is said of checkpoints that cannot be loaded: what is wrong with them, and a library where one is missing."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from integration.architectures import ARCHITECTURES, tiny_model
from integration.checkpoints import save_bitsandbytes, save_blocks, save_compressed, with_config
from specdec.mismatched_weights import find_mismatch, find_wrong_size
from specdec.models import load_model

VOCAB = 96
FORMATS = ("dense", "gptq", "awq", "nf4", "int8", "compressed-tensors")
LIBRARIES = ("optimum", "gptqmodel", "bitsandbytes", "compressed_tensors", "torchao")
GPT2 = AutoConfig.for_model("gpt2", n_embd=128, n_layer=2, n_head=4, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0)

OTHER_ARCHITECTURE = GPT2.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
LACKS = r"lacks \d+ of the model's weights, '"
NAMES = r"files have layers named .*proj.*, GPT2LMHeadModel has attn\.c_attn, .*: they are of another architecture"
SIZES = r"(\[128, 128\]|\[256, 128\]|32768 weights) in the files, (\[384, 128\]|49152 weights) in the model"
HEADS = r"k_proj.* (\[64, 128\]|8192 weights) in the files, (\[128, 128\]|16384 weights) in the model"
VOCABULARY = r"embed_tokens\.weight is \[96, 128\] in the files, \[128, 128\] in the model"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=128, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def make(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint in a format, written once."""
    dense = tmp_path_factory.mktemp("dense")
    model.save_pretrained(dense)
    made = {"dense": dense}

    def written(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            if kind in ("gptq", "awq"):
                save_blocks(model, out, kind, 32)
            elif kind == "compressed-tensors":
                save_compressed(dense, out)
            else:
                save_bitsandbytes(dense, out, kind)
            made[kind] = out
        return made[kind]

    return written


def refusal(path: Path) -> str:
    """The message, which must not send anybody to install what is there or of no use."""
    with pytest.raises(ValueError, match=str(path)) as caught:
        load_model(str(path), device="cpu", dtype="fp32")
    return str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (OTHER_ARCHITECTURE, f"{LACKS}|{NAMES}"),
        ({"num_hidden_layers": 3}, f"{LACKS}|files have 2 layers in model.layers, its configuration asks for 3"),
        ({"intermediate_size": 384}, SIZES),
        ({"num_key_value_heads": 4}, HEADS),
        ({"vocab_size": 128}, VOCABULARY),
    ],
    ids=["architecture", "layers", "sizes", "heads", "vocabulary"],
)
def test_files_of_another_model_are_refused_with_what_differs(
    make: Callable[[str], Path], tmp_path: Path, kind: str, changes: dict[str, Any], expected: str
) -> None:
    text = refusal(with_config(make(kind), tmp_path / "changed", **changes))
    assert re.search(expected, text)
    assert "pip install" not in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dense", "nf4", "int8", "compressed-tensors"])
def test_files_of_more_layers_are_refused_rather_than_cut_short(
    make: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    text = refusal(with_config(make(kind), tmp_path / "changed", num_hidden_layers=1))
    assert "files have 2 layers in model.layers, its configuration asks for 1" in text


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"gemma4_text"}))  # names layers one by one
def test_no_architecture_loads_without_its_last_layer(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    count, kinds = model.config.num_hidden_layers, getattr(model.config, "layer_types", None)
    fewer = {"n_layer" if architecture == "gpt2" else "num_hidden_layers": count - 1}
    fewer |= {} if kinds is None else {"layer_types": kinds[:-1]}
    text = refusal(with_config(tmp_path, tmp_path / "fewer", **fewer))
    assert re.search(rf"files have {count} layers in \S+, its configuration asks for {count - 1}", text)


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors") | tensors
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.norm.bias",
        "lm_head.bias",
    ],
)  # fmt: skip
def test_a_weight_without_a_place_in_the_models_parts_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, name: str
) -> None:
    model.save_pretrained(tmp_path)
    add_tensors(tmp_path, **{name: torch.ones(128)})
    text = refusal(tmp_path)
    assert f"hold 1 weights that LlamaForCausalLM has no place for under its configuration, '{name}' first" in text
    assert "put the config.json there" in text
    assert "of an adapter, which has to be merged first" in text


def test_files_of_a_model_without_its_head_are_not_cut_short_either(tmp_path: Path) -> None:
    tiny_model("starcoder2").base_model.save_pretrained(tmp_path)  # tied: the head is not missed
    assert load_model(str(tmp_path), device="cpu").model.config.num_hidden_layers == 2
    text = refusal(with_config(tmp_path, tmp_path / "fewer", num_hidden_layers=1))
    assert "has no place for under its configuration, 'layers.1." in text


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("medusa_head.0.linear.weight", torch.ones(8, 8)),
        ("mtp.layers.0.eh_proj.weight", torch.ones(8, 8)),
        ("model.vision_tower.layers.0.q_proj.weight", torch.ones(8, 8)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(16)),
        ("model.layers.0.self_attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        ("model.layers.0.self_attn.masked_bias", torch.tensor(-1e9)),
        ("model.layers.0.self_attn.attn.k_scale", torch.tensor(0.5)),
        ("model.layers.0.self_attn.k_proj.k_scale", torch.ones(1)),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", torch.ones(8, 16)),
        ("model.version", torch.ones(1)),
    ],
)
def test_what_no_part_of_the_model_needs_is_left_out_as_before(
    model: LlamaForCausalLM, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    model.save_pretrained(tmp_path)
    add_tensors(tmp_path, **{name: tensor})
    loaded = load_model(str(tmp_path), device="cpu").model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_layers_for_further_tokens_are_no_layers_too_many(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    further = with_config(tmp_path, tmp_path / "further", num_hidden_layers=1, num_nextn_predict_layers=1)
    assert load_model(str(further), device="cpu").model.config.num_hidden_layers == 1
    assert find_mismatch(further) is None


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_blocks_of_more_layers_are_refused_where_no_library_loads_them(
    make: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is there, and leaves out layers that the model has not")
    text = refusal(with_config(make(kind), tmp_path / "changed", num_hidden_layers=1))
    assert "files have 2 layers in model.layers, its configuration asks for 1" in text
    assert "pip install" not in text


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_nothing_is_found_where_nothing_is_wrong(architecture: str, tmp_path: Path) -> None:
    """Nor in names that transformers turns into others, such as experts', or in those of a model without its head."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    assert find_mismatch(tmp_path) is None
    model.base_model.save_pretrained(tmp_path / "headless")
    assert find_mismatch(tmp_path / "headless") is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_found_in_quantized_files_either(make: Callable[[str], Path], kind: str) -> None:
    path = make(kind)
    assert find_mismatch(path) is None
    assert find_wrong_size(path) is None


@pytest.mark.parametrize(
    "changes",
    [{"dynamic": {"-:.*down.*": {}}}, {"checkpoint_format": "marlin"}, {"quant_method": "awq", "version": "gemv"}],
)
def test_sizes_are_compared_in_known_layouts_alone(
    model: LlamaForCausalLM, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_blocks(model, tmp_path, "gptq", 32)
    wrong = with_config(tmp_path, tmp_path / "wrong", intermediate_size=384)
    assert find_wrong_size(wrong) is not None
    save_blocks(model, tmp_path, "gptq", 32, **changes)
    assert find_wrong_size(with_config(tmp_path, tmp_path / "other", intermediate_size=384)) is None


# --- libraries


def pretend(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    """Have the quantizers' libraries found, or not."""
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        return (object() if installed else None) if name in LIBRARIES else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_gptq_and_awq_need_a_library_that_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is there: nothing is missing")
    for method in ("gptq", "awq"):
        save_blocks(model, tmp_path / method, method, 32, group_size=16)  # for which there is no kernel of ours
        text = refusal(tmp_path / method)
        assert f"Its weights are quantized ({method}): " in text
        assert "gptqmodel" in text
        assert text.endswith("missing, pip install 'specdec[quantized]'")


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, NameError, TypeError])
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("gptq", "optimum and gptqmodel are"), ("awq", "gptqmodel is"), ("bitsandbytes", "bitsandbytes is"),
        ("compressed-tensors", "compressed_tensors is"), ("torchao", "torchao is"),
    ],
)  # fmt: skip
def test_whatever_a_quantizer_raises_comes_with_the_library_that_is_missing(
    make: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], method: str,
    names: str,
) -> None:  # fmt: skip
    """GPTQ's says that a GPU is required, or that a name is not defined, where it is gptqmodel that is missing."""
    fail(monkeypatch, kind("GPU is required"))
    pretend(monkeypatch, installed=False)
    path = with_config(make("dense"), tmp_path / "quantized", quantization_config={"quant_method": method, "bits": 3})
    assert refusal(path).endswith(
        f"GPU is required. Its weights are quantized ({method}): {names} missing, pip install 'specdec[quantized]'"
    )


@pytest.mark.parametrize("kind", [ImportError, NameError, TypeError, AttributeError])
def test_a_library_that_lacks_something_may_be_too_old(
    make: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    fail(monkeypatch, kind("no such part"))
    pretend(monkeypatch, installed=True)
    settings = {"quant_method": "compressed-tensors"}
    path = with_config(make("dense"), tmp_path / "quantized", quantization_config=settings)
    assert refusal(path).endswith("compressed_tensors may be too old, pip install -U 'specdec[quantized]'")


@pytest.mark.parametrize(
    ("error", "settings", "installed"),
    [
        (RuntimeError("out of memory"), {"quant_method": "bitsandbytes", "load_in_4bit": True}, True),
        (ValueError("group_size must be positive"), {"quant_method": "gptq", "bits": 3}, False),
        (OSError("disk failure"), {"quant_method": "torchao"}, False),
        (ImportError("requires aqlm"), {"quant_method": "aqlm"}, False),
        (RuntimeError("out of memory"), None, False),
        (ImportError("requires flash_attn"), None, False),
    ],
)
def test_no_library_is_named_that_would_not_help(
    make: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception,
    settings: dict[str, Any] | None, installed: bool,
) -> None:  # fmt: skip
    fail(monkeypatch, error)
    pretend(monkeypatch, installed=installed)
    changes = {} if settings is None else {"quantization_config": settings}
    assert refusal(with_config(make("dense"), tmp_path / "quantized", **changes)).endswith(f"cannot be loaded: {error}")


@pytest.mark.parametrize("kind", [NameError, TypeError])
def test_a_mistake_in_a_models_code_is_not_hidden(
    make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    fail(monkeypatch, kind("GPU is required"))
    with pytest.raises(kind, match=r"^GPU is required$"):
        load_model(str(make("dense")), device="cpu")


def test_a_damaged_tokenizer_is_not_taken_for_a_missing_library(
    make: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, installed=False)
    path = with_config(make("gptq"), tmp_path / "damaged")
    (path / "tokenizer.json").write_text("{")
    text = refusal(path)
    assert "has a tokenizer that cannot be loaded" in text
    assert "pip install" not in text
