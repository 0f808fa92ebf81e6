"""Runs jobs in a real vLLM, in a process of its own: ``python engine_worker.py JOBS.json RESULTS.json``.

A job is an engine and its requests; see ``run_vllm.Job``. Nothing of the tests' own process is imported, so that what
vLLM does to a process (threads, logging, process groups) stays here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One engine from its making to its end."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(**job["engine"])
    try:
        return _serve(llm, job)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def _serve(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    names = [f"request-{index}" for index in range(len(job["prompts"]))]
    for name, prompt in zip(names, job["prompts"], strict=True):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=job["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    tokens: dict[str, list[int]] = {name: [] for name in names}
    step = 0
    while engine.has_unfinished_requests():
        if step == job["abort_at"]:
            engine.abort_request([names[index] for index in job["abort"]])
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    metrics = {metric.name: metric for metric in llm.get_metrics()}

    def value(name: str) -> int:
        return int(metrics[name].value) if name in metrics else 0

    return {
        "tokens": [tokens[name] for name in names],
        "drafts": value("vllm:spec_decode_num_drafts"),
        "drafted": value("vllm:spec_decode_num_draft_tokens"),
        "accepted": value("vllm:spec_decode_num_accepted_tokens"),
        "preemptions": value("vllm:num_preemptions"),
        "cached": value("vllm:prefix_cache_hits"),
        "proposer": _proposer(engine, job["prompts"][0]),
    }


def _proposer(engine: Any, prompt: list[int]) -> dict[str, Any] | None:
    """What became of our proposer, where the engine runs in this process and has one.

    Its requests are counted in the first step of one more: vLLM says in the step before that all others have ended, and
    asks for no drafts in it.
    """
    from vllm import SamplingParams

    core = getattr(engine.engine_core, "engine_core", None)
    if core is None:
        return None
    worker = core.model_executor.driver_worker
    drafter = getattr(getattr(worker, "worker", worker).model_runner, "drafter", None)
    if not getattr(drafter, "sees_steps", False):
        return None
    engine.step()
    engine.add_request("last", {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=4))
    engine.step()
    kept = drafter.num_requests
    while engine.has_unfinished_requests():
        engine.step()
    return {"off": drafter.off, "name": drafter.drafter_name, "requests": kept}


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in jobs]))
