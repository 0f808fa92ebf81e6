"""The GPU benchmark: its arithmetic, its refusals, and the whole of it on a CPU with tiny weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from specdec import SpecDecoder
from specdec.benchmarks import gpu as gpu_bench
from specdec.benchmarks.gpu import Rehearsed, busy_time, compare, gpu, load, make_decoder
from specdec.target import HFTarget, TargetOutput

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(load("llama-8b", CPU, tiny=True))


def test_overlapping_work_counts_once() -> None:
    found = busy_time([(4000.0, 6000.0), (0.0, 2000.0), (1000.0, 3000.0), (1500.0, 1700.0)])
    assert (found.span_ms, found.busy_ms, found.pieces) == (6.0, 5.0, 4)
    assert found.idle == pytest.approx(1 / 6)


def test_without_work_nothing_is_idle() -> None:
    found = busy_time([])
    assert (found.span_ms, found.busy_ms, found.idle) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("accepted", [0.0, 1.0])
def test_rehearsed_drafts_are_right_as_often_as_asked(target: HFTarget, accepted: float) -> None:
    prompt = [5, 6, 7]
    text = make_decoder(target, None).generate(prompt, max_new_tokens=40, ignore_eos=True).token_ids
    drafter = Rehearsed([[*prompt, *text]], accepted, depth=4)
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
    found = decoder.generate(prompt, max_new_tokens=30, ignore_eos=True)
    assert found.token_ids == text[:30]
    assert found.stats.passes == (6 if accepted else 30)


def test_other_logits_are_refused_before_anything_is_timed(target: HFTarget) -> None:
    class Off(HFTarget):
        def forward(self, *args: Any, **kwargs: Any) -> TargetOutput:
            out = super().forward(*args, **kwargs)
            return TargetOutput(out.logits * 1.01, out.features)

    assert all(row["difference"] <= row["bound"] for row in compare(target, HFTarget(target.model)))
    with pytest.raises(RuntimeError, match=r"a captured pass over 1 nodes gives logits .* off the eager one's"):
        compare(target, Off(target.model))


@pytest.mark.parametrize("arguments", [[], ["--tiny"], ["--device", "cpu"]])
def test_without_cuda_it_says_so(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu, arguments)
    assert result.exit_code == 2
    assert "torch sees no CUDA device; --device cpu --tiny" in " ".join(result.output.split())


def test_it_runs_on_a_cpu_with_tiny_weights(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "-m", "llama-8b", "--tokens", "12", "--repeats", "1", "--seconds", "0"]
    result = CliRunner().invoke(gpu, [*arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert gpu_bench.CPU_NOTE in result.output
    document = json.loads(out.read_text())
    assert document["publishable"] is False
    (found,) = document["models"]
    assert found["fallback"].startswith("graphs need a CUDA device")
    assert set(found["tokens_per_s"]) == {"eager, plain", "eager, drafts", "graphs, plain", "graphs, drafts"}
    assert set(found["latency_ms"]["eager"]) == {"1", "4", "8", "16", "32", "64"}


def test_a_failed_comparison_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("logits 3 off")

    monkeypatch.setattr(gpu_bench, "compare", fail)
    result = CliRunner().invoke(gpu, ["--device", "cpu", "--tiny"])
    assert result.exit_code == 1
    assert "logits 3 off" in result.output
