"""The peers that `specdec bench peers` knows, by name, and whether their engines are there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from specdec.benchmarks.peers.base import EngineSpec, PeerMissing, PeerSpec
from specdec.registry import unknown

__all__ = ["DEFAULT_PEERS", "ENGINES", "PEERS", "availability", "engine_python", "get_engine", "get_peer", "peer_names"]

PROBE_TIMEOUT_S = 60.0

_ENGINES = (
    EngineSpec("transformers", "transformers", "transformers"),
    EngineSpec("llamacpp", "llama_cpp", "llama.cpp"),
    EngineSpec("openvino", "openvino_genai", "OpenVINO GenAI"),
    EngineSpec("vllm", "vllm", "vLLM"),
)
ENGINES: Mapping[str, EngineSpec] = MappingProxyType({engine.name: engine for engine in _ENGINES})


def _peer(
    engine: str,
    precision: str,
    speculation: str = "none",
    *,
    weights: str = "hf",
    draft_len: int = 0,
    max_ngram: int = 0,
) -> PeerSpec:
    name = f"{engine}-{precision}" if speculation == "none" else f"{engine}-{precision}-{speculation}"
    return PeerSpec(name, ENGINES[engine], precision, speculation, weights, draft_len, max_ngram)


def _all_peers() -> list[PeerSpec]:
    """Every peer. Lookup settings are the fastest of a few tried on a CPU with a small model, engine by engine."""
    peers = [
        _peer("transformers", "fp32"),
        _peer("transformers", "fp32", "lookup", draft_len=5, max_ngram=3),
        _peer("transformers", "bf16"),
        _peer("transformers", "bf16", "lookup", draft_len=5, max_ngram=3),
        _peer("transformers", "bf16", "assisted"),
    ]
    for precision in ("fp32", "bf16", "f16", "q8_0", "q4_1"):
        peers.append(_peer("llamacpp", precision, weights=f"gguf-{precision}"))
        peers.append(_peer("llamacpp", precision, "lookup", weights=f"gguf-{precision}", draft_len=4, max_ngram=4))
    for precision in ("fp32", "bf16", "int8", "int4"):
        weights = "openvino-fp32" if precision == "bf16" else f"openvino-{precision}"
        peers.append(_peer("openvino", precision, weights=weights))
        peers.append(_peer("openvino", precision, "lookup", weights=weights, draft_len=5, max_ngram=3))
    for precision in ("fp32", "bf16"):
        peers.append(_peer("vllm", precision))
        peers.append(_peer("vllm", precision, "lookup", draft_len=4, max_ngram=4))
    return peers


PEERS: Mapping[str, PeerSpec] = MappingProxyType({peer.name: peer for peer in _all_peers()})
DEFAULT_PEERS = tuple(name for name, peer in PEERS.items() if peer.precision not in ("fp32", "f16"))
"""What users would pick for speed: fp32 is for checking texts, and bf16 stands for 16 bits."""


def peer_names() -> list[str]:
    """The names of all peers, engine by engine."""
    return list(PEERS)


def get_peer(name: str) -> PeerSpec:
    """The peer of a name.

    Raises:
        ValueError: there is none; the sentence gives the nearest names.
    """
    try:
        return PEERS[name]
    except KeyError:
        raise ValueError(unknown("peer", name, PEERS)) from None


def get_engine(name: str) -> EngineSpec:
    """The engine of a name.

    Raises:
        ValueError: there is none; the sentence gives the nearest names.
    """
    try:
        return ENGINES[name]
    except KeyError:
        raise ValueError(unknown("engine", name, ENGINES)) from None


def engine_python(engine: EngineSpec, peers_dir: Path | None = None) -> Path:
    """The interpreter that an engine's worker runs in.

    It is the one of the engine's environment in `peers_dir` where that exists, else this very interpreter.

    Args:
        engine: the engine.
        peers_dir: the folder that `install` filled; None to look in this interpreter alone.

    Raises:
        PeerMissing: the engine is in neither; the message is the sentence that says how to install it.
    """
    if peers_dir is not None:
        python = environment_python(peers_dir / engine.name)
        if python.exists() and _has_module(python, engine.module):
            return python
    own = Path(sys.executable)
    if _has_module(own, engine.module):
        return own
    raise PeerMissing(engine.install_sentence)


def availability(spec: PeerSpec, peers_dir: Path | None = None) -> str | None:
    """None where a peer's engine is installed, else the one sentence that says how to install it."""
    try:
        engine_python(spec.engine, peers_dir)
    except PeerMissing as missing:
        return str(missing)
    return None


def environment_python(folder: Path) -> Path:
    """The interpreter of a virtual environment, whether it exists or not."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _has_module(python: Path, module: str) -> bool:
    """Whether an interpreter finds a module, without importing it. -E -s as for the workers."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    command = [str(python), "-E", "-s", "-c", probe, module]
    try:
        return subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
