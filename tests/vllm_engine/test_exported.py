"""What ``specdec export vllm`` writes, loaded by vLLM itself, beside the same weights through the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from prompts import make_prompts
from run_vllm import ENVIRONMENT, Job, K, Outcome, engine_options, plugin, run_jobs

from specdec.cli import main
from specdec.target import HFTarget

STEPS = 20
"""All requests are cancelled before this step: vLLM's own drafters go on past a request's end, ours do not."""
LAYOUTS = {"medusa": ("medusa", "medusa"), "eagle3": ("eagle", "eagle3"), "speculators": ("eagle", "eagle3")}
"""Format -> our drafter, vLLM's method."""
SPECULATORS = """
import sys
from safetensors.torch import load_file
from speculators import SpeculatorModel
loaded = SpeculatorModel.from_pretrained(sys.argv[1])
assert loaded.config.speculators_model_type == "eagle3", loaded.config
found, stored = loaded.state_dict(), load_file(sys.argv[1] + "/model.safetensors")
differing = [name for name, tensor in stored.items() if name not in found or not found[name].equal(tensor)]
assert not differing, differing
targets_own = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
assert found.keys() - stored.keys() == targets_own, found.keys() - stored.keys()
print("PASSED")
"""


def weights_of(folder: Path, layout: str) -> Path:
    """The weights that are exported in a format."""
    return folder / ("plain-medusa" if layout == "medusa" else "plain-eagle3")


@pytest.fixture(scope="module")
def exported(folder: Path, tiny_target: HFTarget) -> dict[str, dict[str, Any]]:
    """By format the ``speculative_config`` that the command prints for what it has written."""
    tiny.make_drafter(tiny_target, "medusa", folder / "plain-medusa")
    tiny.make_drafter(tiny_target, "eagle3", folder / "plain-eagle3", vocab_size=450)
    said = {}
    for layout in LAYOUTS:
        arguments = ["export", "vllm", "--format", layout, "--model", str(folder / "model"), "-k", str(K)]
        arguments += ["--weights", str(weights_of(folder, layout)), "--out", str(folder / f"exported-{layout}")]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        said[layout] = json.loads(done.stdout.partition(" = ")[2])
    return said


@pytest.fixture(scope="module")
def served(folder: Path, exported: Mapping[str, dict[str, Any]]) -> dict[str, Outcome]:
    """Each layout natively and through the plugin, and plain decoding."""
    prompts = make_prompts()

    def job(speculation: dict[str, Any] | None) -> Job:
        engine = engine_options(folder / "model", speculation)
        return Job(engine, prompts, max_tokens=100, abort=list(range(len(prompts))), abort_at=STEPS)

    jobs = {"plain": job(None)}
    for layout, (drafter, method) in LAYOUTS.items():
        assert (exported[layout]["method"], exported[layout]["num_speculative_tokens"]) == (method, K)
        jobs[f"{layout} native"] = job({"speculative_config": exported[layout]})
        jobs[layout] = job(plugin(drafter, {"weights": str(weights_of(folder, layout))}))
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


def test_the_speculators_library_loads_its_folder_to_the_last_weight(
    exported: Mapping[str, dict[str, Any]],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPECULATORS, exported["speculators"]["model"]],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PASSED" in done.stdout
