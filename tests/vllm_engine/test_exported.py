"""What ``specdec export vllm`` writes, loaded by vLLM itself, beside the same weights through the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from prompts import make_prompts
from run_vllm import Job, K, Outcome, engine_options, plugin, run_jobs

from specdec.drafters.weights import load_weights
from specdec.integrations.vllm.export import export_weights
from specdec.target import HFTarget

STEPS = 20
"""All requests are cancelled before this step: vLLM's own drafters go on past a request's end, ours do not."""
LAYOUTS = {"medusa": ("medusa", "medusa"), "eagle3": ("eagle", "eagle3"), "speculators": ("eagle", "eagle3")}
"""Format -> our drafter, vLLM's method."""


@pytest.fixture(scope="module")
def served(folder: Path, tiny_target: HFTarget) -> dict[str, Outcome]:
    """Each layout natively and through the plugin, and plain decoding."""
    tiny.make_drafter(tiny_target, "medusa", folder / "plain-medusa")
    tiny.make_drafter(tiny_target, "eagle3", folder / "plain-eagle3", vocab_size=450)
    sources = {"medusa": "plain-medusa", "eagle3": "plain-eagle3", "speculators": "plain-eagle3"}
    prompts = make_prompts()

    def job(speculation: dict[str, Any] | None) -> Job:
        engine = engine_options(folder / "model", speculation)
        return Job(engine, prompts, max_tokens=100, abort=list(range(len(prompts))), abort_at=STEPS)

    jobs = {"plain": job(None)}
    for layout, (drafter, method) in LAYOUTS.items():
        exported = folder / f"exported-{layout}"
        weights = load_weights(folder / sources[layout])
        export_weights(weights, tiny_target, str(folder / "model"), layout, exported, K)
        native = {"method": method, "model": str(exported), "num_speculative_tokens": K}
        jobs[f"{layout} native"] = job({"speculative_config": native})
        jobs[layout] = job(plugin(drafter, {"weights": str(folder / sources[layout])}))
    return run_jobs(jobs, folder / "exported", multiprocess=False)


def check_beginnings(outcome: Outcome, plain: Outcome) -> None:
    for mine, other in zip(outcome.tokens, plain.tokens, strict=True):
        length = min(len(mine), len(other))
        assert length > 0
        assert mine[:length] == other[:length]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_drafts_from_the_checkpoint_what_the_plugin_does(served: dict[str, Outcome], layout: str) -> None:
    native, ours = served[f"{layout} native"], served[layout]
    check_beginnings(native, served["plain"])
    check_beginnings(ours, served["plain"])
    assert ours.proposer is not None
    assert ours.proposer["off"] is None
    assert ours.tokens == native.tokens
    assert (ours.drafts, ours.drafted, ours.accepted) == (native.drafts, native.drafted, native.accepted)
    assert ours.accepted > 0
