"""Peers: the engines that users would pick instead of specdec, on the same weights, prompts and threads.

From a name to a reply, with `spec = get_peer(name)`:

    python = engine_python(spec.engine, peers_dir)          # PeerMissing says how to install it
    weights = prepare_weights(spec, cache_dir, model_folder=folder, gguf_file=file, python=python)
    command = worker_command(spec, weights, python=python, threads=2)
    peer = PeerProcess(command, name=spec.name, log_path=log)
    hello = peer.start()
    reply = peer.generate(prompt_ids, 128, eos_ids)
    peer.close()
"""

from __future__ import annotations

from specdec.benchmarks.peers.base import (
    EngineSpec,
    PeerDied,
    PeerError,
    PeerFailed,
    PeerHello,
    PeerMissing,
    PeerReply,
    PeerSpec,
    PeerTimeout,
)
from specdec.benchmarks.peers.prepare import prepare_weights
from specdec.benchmarks.peers.process import PeerProcess, worker_command
from specdec.benchmarks.peers.registry import (
    DEFAULT_PEERS,
    ENGINES,
    PEERS,
    availability,
    engine_python,
    get_engine,
    get_peer,
    peer_names,
)

__all__ = [
    "DEFAULT_PEERS",
    "ENGINES",
    "PEERS",
    "EngineSpec",
    "PeerDied",
    "PeerError",
    "PeerFailed",
    "PeerHello",
    "PeerMissing",
    "PeerProcess",
    "PeerReply",
    "PeerSpec",
    "PeerTimeout",
    "availability",
    "engine_python",
    "get_engine",
    "get_peer",
    "peer_names",
    "prepare_weights",
    "worker_command",
]
