"""Make, once, the form of a model's weights that a peer loads, in a cache folder.

Every form comes from the same tensors: the model's GGUF file, or the Hugging Face folder that was converted from it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from specdec.benchmarks.peers.base import PeerError, PeerMissing, PeerSpec
from specdec.benchmarks.peers.gguf_convert import GGUF_TYPES, convert_gguf, main_tensor_type
from specdec.benchmarks.peers.process import WORKER_FOLDER

__all__ = ["prepare_weights"]

EXPORT_TIMEOUT_S = 3600.0
# Raised when a conversion changes what it writes, so that older results are made anew.
CONVERSION_VERSION = 1


def prepare_weights(
    spec: PeerSpec,
    cache_dir: Path,
    *,
    model_folder: Path | None = None,
    gguf_file: Path | None = None,
    python: Path | None = None,
) -> Path:
    """The file or folder of weights for a peer, made where the cache does not hold it yet.

    A result is written beside its final place and renamed, so that one that exists is whole. Its name depends on the
    source's path, size and time of change.

    Args:
        spec: the peer.
        cache_dir: folder for what is made; made where it is missing.
        model_folder: the model as a Hugging Face folder (config, safetensors, tokenizer).
        gguf_file: the model as a GGUF file, for llama.cpp's peers.
        python: the interpreter of the peer's engine, for engines that bring their own converter.

    Raises:
        PeerMissing: the source that this peer needs was not given, or is not there.
        PeerError: a converter failed.
        ValueError: `spec.weights` is a form that is not known.
    """
    form, _, weight_type = spec.weights.partition("-")
    if form == "hf":
        return _model_folder(spec, model_folder)
    if form == "gguf" and weight_type in GGUF_TYPES:
        source = _gguf_file(spec, gguf_file)
        target = cache_dir / f"{source.stem}-{weight_type}-{_key([source])}.gguf"
        if not target.exists() and main_tensor_type(source) == weight_type:
            return source
        return _make(target, lambda part: convert_gguf(source, part, weight_type))
    if form == "openvino":
        folder = _model_folder(spec, model_folder)
        if python is None:
            raise PeerMissing(spec.engine.install_sentence)
        target = cache_dir / f"{folder.name}-openvino-{weight_type}-{_key(sorted(folder.glob('*.*')))}"
        return _make(target, lambda part: _export_openvino(spec, python, folder, part, weight_type))
    known = ["hf", *(f"gguf-{name}" for name in GGUF_TYPES), "openvino-fp32", "openvino-int8", "openvino-int4"]
    raise ValueError(f"weights must be one of {', '.join(known)}, got {spec.weights!r}")


def _model_folder(spec: PeerSpec, folder: Path | None) -> Path:
    if folder is None:
        raise PeerMissing(f"the peer {spec.name} needs a model folder with config.json and safetensors: give its path")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise PeerMissing(f"the peer {spec.name} needs config.json and safetensors, which {folder} does not hold")
    return folder


def _gguf_file(spec: PeerSpec, path: Path | None) -> Path:
    if path is None:
        raise PeerMissing(f"the peer {spec.name} needs the model as a GGUF file: give its path")
    if not path.is_file():
        raise PeerMissing(f"the peer {spec.name} needs a GGUF file, and {path} is none")
    return path


def _key(sources: Iterable[Path]) -> str:
    """A short name for the sources as they are now."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    return hashlib.sha256(repr((CONVERSION_VERSION, states)).encode()).hexdigest()[:12]


def _make(target: Path, make: Callable[[Path], None]) -> Path:
    """Have `make` write a file or folder to a temporary path, then move it to `target`; what exists is left alone."""
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=".making-", dir=target.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {target.parent}: {error.strerror}; give another cache folder") from error
    try:
        part = workshop / target.name
        make(part)
        try:
            part.rename(target)
        except OSError:
            if not target.exists():  # else another process was first, with the same result
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return target


def _export_openvino(spec: PeerSpec, python: Path, folder: Path, target: Path, weight_type: str) -> None:
    script = WORKER_FOLDER / "openvino_export.py"
    command = [str(python), "-E", "-s", str(script), str(folder.resolve()), str(target), weight_type]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=EXPORT_TIMEOUT_S,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"the converter for the peer {spec.name} did not finish: {error}") from error
    if result.returncode != 0:
        raise PeerError(f"the converter for the peer {spec.name} failed:\n{result.stdout[-3000:]}")
