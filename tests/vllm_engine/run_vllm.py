"""What the tests ask of a real vLLM, and what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdec.integrations.vllm import PROPOSER

WORKER = Path(__file__).parent / "engine_worker.py"
K = 4
"""Tokens drafted per step."""
TIMEOUT_S = 600
OFF = "going on without drafts"
"""What the proposer says when it switches its drafter off."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Threads that vLLM binds to processors come to a standstill where something else computes there.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Job:
    """An engine and its requests.

    Attributes:
        engine: arguments of ``vllm.LLM``.
        prompts: token ids, all asked at once.
        max_tokens: of each text.
        abort: indices of requests that are cancelled.
        abort_at: the step before which they are; -1 for never.
    """

    engine: Mapping[str, Any]
    prompts: Sequence[Sequence[int]]
    max_tokens: int = 24
    abort: Sequence[int] = field(default_factory=tuple)
    abort_at: int = -1


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        tokens: by request; those of a cancelled one as far as it came.
        drafts: requests' steps that had drafts.
        drafted: tokens drafted.
        accepted: of them.
        preemptions: requests thrown out of the cache.
        cached: tokens of prompts that were not computed, as an earlier request's had been.
        proposer: ours, its ``off``, name and the number of requests it knows once all are over and one more has begun;
            None for others and in other processes.
    """

    tokens: list[list[int]]
    drafts: int
    drafted: int
    accepted: int
    preemptions: int
    cached: int
    proposer: dict[str, Any] | None


def engine_options(model: str | Path, speculation: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for a small engine in float32, where the width of a pass changes no token."""
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 192,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "generation_config": "vllm",
        "seed": 0,
        **(speculation or {}),
        **changes,
    }


def plugin(drafter: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The part of the arguments that asks for one of our drafters."""
    return {
        "speculative_config": {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": K},
        "additional_config": {"specdec": {"drafter": drafter, "options": dict(options or {})}},
    }


class Run:
    """Jobs under way, one after the other in a process; two runs at a time keep two processors busy.

    Args:
        jobs: by name.
        folder: for what is asked and answered.
        multiprocess: whether each engine runs in another process than its client.
    """

    def __init__(self, jobs: Mapping[str, Job], folder: Path, multiprocess: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._names, self._answered, self._log = list(jobs), folder / "results.json", folder / "log.txt"
        asked = folder / "jobs.json"
        asked.write_text(json.dumps([asdict(job) for job in jobs.values()]))
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocess)),
            "VLLM_CACHE_ROOT": str(folder / "compiled"),
        }
        with self._log.open("w") as output:
            command = [sys.executable, str(WORKER), str(asked), str(self._answered)]
            self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def outcomes(self) -> dict[str, Outcome]:
        """What became of the jobs, once all are done."""
        try:
            if self._process.wait(timeout=TIMEOUT_S):
                raise RuntimeError(f"vLLM failed:\n{self.log()[-6000:]}")
        finally:
            self.stop()
        results = json.loads(self._answered.read_text())
        return {name: Outcome(**result) for name, result in zip(self._names, results, strict=True)}

    def log(self) -> str:
        """What vLLM has said so far, in all processes."""
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """End it, whatever is under way."""
        self._process.kill()
        self._process.wait()


def run_jobs(jobs: Mapping[str, Job], folder: Path, multiprocess: bool) -> dict[str, Outcome]:
    """What becomes of jobs that are run now; see ``Run``."""
    return Run(jobs, folder, multiprocess).outcomes()
