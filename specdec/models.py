"""From a name to a loaded model and tokenizer: an alias, a folder, a GGUF file or an id on the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from specdec.embedded import find_wheel_gguf, read_gguf
from specdec.lean import KNOWN, widths_fit
from specdec.lean_stack import make_lean
from specdec.mismatched_weights import find_left_out, find_mismatch, find_wrong_size
from specdec.model_files import ALIASES, check_folder, find_files, quiet
from specdec.packing import can_pack, cpu_takes_bfloat16, onednn_takes_bfloat16, pack_linears
from specdec.panels import panels_run
from specdec.precisions import DECODED, STORED_IN_8_BIT, STORED_NAMES
from specdec.quantization import check_runs, check_scheme, is_quantized, isolate_rows, quantize_linears
from specdec.quantized_checkpoints import find_blocks, keep_blocks, missing_library, read_4bit

if TYPE_CHECKING:
    from specdec.drafters.base import Drafter
    from specdec.load_plan import LoadPlan

_NOT_LOADED = (ImportError, OSError, ValueError, RuntimeError, KeyError)
"""What loading raises."""

_LACKING = (NameError, AttributeError, TypeError)
"""And what quantizers do that lack a part, or are of another version."""

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64, "fp64": torch.float64,
}  # fmt: skip
"""Names of weights' dtypes."""

_TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")


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
    drafter: Drafter | str | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: an alias, a folder, a ``.gguf`` file or a hub id; a folder may also hold a draft model made to order,
            whose target is loaded with it.
        dtype: of the weights; "auto" is the checkpoint's own. On the CPU it is float32, but for checkpoints in
            bfloat16 and aliases that are ``packed`` and of an architecture whose rows do not depend on each other in
            bfloat16: Llama, Mistral, Qwen2 and Qwen3.
        device: where the model goes; "auto" is CUDA where there is one.
        allow_pickle: accept weights in pickle files, which can run code as they load.
        trust_remote_code: run modelling code that the checkpoint brings along.
        packed: lay linear layers out for decoding where that helps (see ``specdec.packing``); such a model generates
            as before, but cannot be trained or saved. What is quantized already is left as it is. A draft model made
            to order is then what drafts beside its target, loaded in the same way: its layers are in 8 bit.
        quantize: precision of the linear layers' weights, one of ``specdec.quantization``'s names; the rest is then
            bfloat16 where dtype is "auto" and the CPU computes in it. Of a draft model made to order it is that of its
            target, whose output head it may share.
        cache_dir: where converted weights are kept, ``~/.cache/specdec/models`` if None.
        progress: told in a few words what takes long.
        memory_budget: bytes in all; None is what is free. A model that does not fit, or would leave no room for a short
            text of one row, is refused before it is read.
        drafter: drafts for it, as created or by name; what it will take counts too.

    Raises:
        ModelNotFoundError: when no model goes by the name.
        ValueError: when its files are missing, damaged, not allowed or not those of the model that its configuration
            describes, dtype, device or quantization is unknown, or a library is missing that quantized weights need.
    """
    where, what = _find_place(dtype, device, quantize)
    found = _made_to_order(name, what, where, allow_pickle, trust_remote_code, packed, quantize, cache_dir, progress)
    if found is not None:
        return found
    folder = find_files(
        name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, cache_dir=cache_dir, progress=progress
    )
    what = _own_dtype(name, folder, what, where, packed)
    blocks = None
    if quantize in STORED_NAMES:
        blocks = find_blocks(name, find_wheel_gguf() if name in ALIASES else folder, quantize)
    with quiet():
        plan = _plan(folder, what, where, packed, quantize, trust_remote_code)
        _check_memory(plan, where, memory_budget, drafter)
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


def plan_model(
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
) -> LoadPlan | None:
    """What ``load_model`` would take, with its arguments; no weight is read, but a hub's files are fetched.

    Returns:
        None where no headers say it: of a ``.gguf`` file, pickled weights, a checkpoint that is quantized already, and
        a draft model made to order.

    Raises:
        ValueError: as ``load_model`` does, as far as that shows.
    """
    from specdec.drafters.pruned import read_pruned

    where, what = _find_place(dtype, device, quantize)
    if read_pruned(name) is not None:
        return None
    folder = find_files(
        name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, cache_dir=cache_dir, progress=progress
    )
    with quiet():
        what = _own_dtype(name, folder, what, where, packed)
        return _plan(folder, what, where, packed, quantize, trust_remote_code)


def _find_place(
    dtype: torch.dtype | str, device: torch.device | str, quantize: str | None
) -> tuple[torch.device, torch.dtype | str]:
    """Where a model goes, and its dtype as far as that does not depend on its files."""
    where, what = find_device(device), find_dtype(dtype)
    if quantize is not None:
        check_scheme(quantize)
        takes = onednn_takes_bfloat16() if quantize in DECODED else cpu_takes_bfloat16()
        if dtype == "auto" and where.type == "cpu" and takes:
            what = torch.bfloat16
        check_runs(quantize, where, what)
    return where, what


def _own_dtype(
    name: str, folder: Path, dtype: torch.dtype | str, device: torch.device, packed: bool
) -> torch.dtype | str:
    """The dtype that "auto" is on a CPU; any other as it is."""
    if dtype != "auto" or device.type != "cpu":
        return dtype
    own = name in ALIASES or _is_for_bfloat16(folder)
    return torch.bfloat16 if own and packed and panels_run() else torch.float32


def _plan(
    folder: Path,
    dtype: torch.dtype | str,
    device: torch.device,
    packed: bool,
    quantize: str | None,
    trust_remote_code: bool,
) -> LoadPlan | None:
    """What loading these files will take, by their headers; None where those do not say it."""
    from specdec.load_plan import plan_load

    if folder.is_dir():
        check_folder(folder, allow_pickle=True)
    in_bfloat16 = device.type == "cpu" and dtype == torch.bfloat16
    lays_out = packed and in_bfloat16 and cpu_takes_bfloat16()
    in_panels = in_bfloat16 and panels_run() and (lays_out if quantize is None else quantize not in DECODED)
    return plan_load(
        folder, dtype, lays_out=lays_out, quantize=quantize, trust_remote_code=trust_remote_code, in_panels=in_panels
    )


def _check_memory(
    plan: LoadPlan | None, device: torch.device, memory_budget: int | None, drafter: Drafter | str | None
) -> None:
    """Refuse a model that cannot be loaded, or not decode a short text, in the memory there is."""
    from specdec.drafter_plan import plan_drafter, resolve_planned
    from specdec.load_plan import check_load
    from specdec.memory import free_bytes

    if plan is not None:
        beside = 0 if drafter is None else plan_drafter(resolve_planned(drafter, plan), plan).num_bytes
        check_load(plan, free_bytes(device) if memory_budget is None else memory_budget, beside)


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
    target = load_model(
        str(weights.facts.get("target", "")), dtype=dtype, device=device, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code, packed=packed, quantize=quantize, cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip
    return LoadedModel(build_pruned(weights, HFTarget(target.model), packed=packed), target.tokenizer, name)


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
    try:
        wrong = None if trust_remote_code else find_wrong_size(folder)
        if wrong is not None:
            raise ValueError(wrong)
        found = None if trust_remote_code else read_4bit(folder, dtype)
        if found is None:
            found = _load_by_transformers(folder, dtype, allow_pickle, trust_remote_code)
    except (*_NOT_LOADED, *_LACKING) as error:
        wrong = None if trust_remote_code else find_mismatch(folder)
        if wrong is not None:
            raise ValueError(f"{folder} cannot be loaded: {wrong}") from error
        hint = missing_library(folder, error)
        if not hint and isinstance(error, _LACKING):
            raise
        raise ValueError(f"{folder} cannot be loaded: {error}{hint}") from error
    return found[0], _load_tokenizer(folder, trust_remote_code), found[1]


def _load_by_transformers(
    folder: Path, dtype: torch.dtype | str, allow_pickle: bool, trust_remote_code: bool
) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=dtype, use_safetensors=None if allow_pickle else True, local_files_only=True,
        trust_remote_code=trust_remote_code, output_loading_info=True,
    )  # fmt: skip
    wrong = find_left_out(model, info["unexpected_keys"], folder)
    if wrong is not None:
        raise ValueError(wrong)
    return model, sorted(info["missing_keys"])


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any | None:
    from transformers import AutoTokenizer

    if not any(path.name.startswith(_TOKENIZER_FILES) for path in folder.iterdir()):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except _NOT_LOADED as error:
        raise ValueError(f"{folder} has a tokenizer that cannot be loaded: {error}") from error


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


def _is_for_bfloat16(folder: Path) -> bool:
    """Whether a folder says that its weights are bfloat16, and its model one whose layers are compiled."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") or []
        known = any(f"{str(name).removesuffix('ForCausalLM')}DecoderLayer" in KNOWN for name in names)
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        fits = widths_fit(config["hidden_size"], config["intermediate_size"], head)
        return known and fits and (config.get("dtype") or config.get("torch_dtype")) == "bfloat16"
    except (OSError, ValueError, AttributeError, TypeError, LookupError, ZeroDivisionError):
        return False  # loading it says what is wrong


def find_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """The dtype that is meant; the string "auto" stays."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} (choices: auto, {', '.join(DTYPES)})")
    return DTYPES[dtype]
