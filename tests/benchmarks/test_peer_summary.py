"""Figures of the comparison with peers, who computes meanwhile, and what no published result may say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specdec.benchmarks.masking import masked, masked_arguments
from specdec.benchmarks.peer_schema import Entrant, PeerFigures, PeerRun
from specdec.benchmarks.peer_summary import fastest_of_ours, summarise_peers
from specdec.benchmarks.peers import quiet


def make_run(name: str, question_id: int, decode_ms: float = 100.0, **fields: Any) -> PeerRun:
    """11 tokens, the first of them after 50 ms, the others in 5 passes."""
    values: dict[str, Any] = {
        "question_id": question_id, "category": "math", "name": name, "prompt_tokens": 20, "new_tokens": 11,
        "first_tokens": 1, "prefill_ms": 50.0, "decode_ms": decode_ms, "passes": 5, "drafted": None, "accepted": None,
        "token_sha256": f"text {question_id}",
    }  # fmt: skip
    return PeerRun(**values | fields)


OURS = Entrant(name="specdec-bf16", engine="specdec", precision="bf16", speculation="none", ours=True)
OUR_DRAFTER = dataclasses.replace(OURS, name="specdec-bf16-suffix", speculation="suffix")
PLAIN_PEER = Entrant(name="vllm-bf16", engine="vLLM", precision="bf16", speculation="none")
LOOKUP_PEER = dataclasses.replace(PLAIN_PEER, name="vllm-bf16-lookup", speculation="lookup")
QUANTISED = Entrant(name="llamacpp-q4_1", engine="llama.cpp", precision="q4_1", speculation="none")
MISSING = Entrant(name="openvino-int8", engine="OpenVINO", precision="int8", speculation="none", skipped="Not there.")


def summarise(runs: list[PeerRun], reference: str | None = "specdec-bf16-suffix") -> dict[str, PeerFigures]:
    entrants = [OURS, OUR_DRAFTER, PLAIN_PEER, LOOKUP_PEER, QUANTISED, MISSING]
    return {found.name: found for found in summarise_peers(entrants, runs, reference)}


def test_speeds_are_sums_over_all_questions() -> None:
    found = summarise([make_run("vllm-bf16", 1, 100.0), make_run("vllm-bf16", 2, 300.0, passes=15)])["vllm-bf16"]
    assert found.decode_tokens_per_s == 1000 * 20 / 400
    assert found.end_to_end_tokens_per_s == 1000 * 22 / 500
    assert found.prefill_tokens_per_s == 1000 * 40 / 100
    assert found.tau == 20 / 20
    assert found.num_runs == 2


def test_tau_is_unknown_where_an_engine_does_not_tell_its_passes() -> None:
    runs = [make_run("vllm-bf16", 1), make_run("vllm-bf16", 2, passes=None)]
    assert summarise(runs)["vllm-bf16"].tau is None


def test_relative_speed_is_the_median_of_ratios_of_the_same_question() -> None:
    runs = [make_run("specdec-bf16-suffix", number, 100.0 * number) for number in (1, 2, 3, 4)]
    # Twice, half and four times as slow as we; question 4 it did not answer, and question 9 we did not.
    runs += [make_run("vllm-bf16", 1, 200.0), make_run("vllm-bf16", 2, 100.0), make_run("vllm-bf16", 3, 1200.0)]
    runs += [make_run("vllm-bf16", 9, 7.0)]
    figures = summarise(runs)
    found = figures["vllm-bf16"].relative
    assert found is not None
    assert found.median == pytest.approx(2.0)
    assert [found.low, found.high] == pytest.approx([0.5, 4.0])
    end_to_end = figures["vllm-bf16"].end_to_end_relative
    assert end_to_end is not None
    assert end_to_end.median == pytest.approx(250 / 150)
    assert figures["specdec-bf16-suffix"].relative is None


def test_an_answer_of_one_token_has_no_decode_speed_to_compare() -> None:
    single = {"new_tokens": 1, "decode_ms": 0.0, "passes": 0}
    found = summarise([make_run("specdec-bf16-suffix", 1), make_run("vllm-bf16", 1, **single)])["vllm-bf16"]
    assert (found.decode_tokens_per_s, found.relative, found.tau) == (None, None, None)
    assert found.end_to_end_relative is not None


def test_texts_are_compared_within_a_precision_alone() -> None:
    names = ("specdec-bf16", "specdec-bf16-suffix", "vllm-bf16", "vllm-bf16-lookup", "llamacpp-q4_1")
    runs = [make_run(name, number) for name in names for number in (1, 2)]
    runs[6] = dataclasses.replace(runs[6], token_sha256="another")  # vllm-bf16-lookup's first
    figures = summarise(runs)
    assert [figures[name].equal_to_plain for name in names] == [None, 2, 2, 1, None]
    assert [figures[name].equal_to_own_plain for name in names] == [None, 2, None, 1, None]
    assert figures["vllm-bf16-lookup"].own_plain_runs == 2
    without_plain = summarise([run for run in runs if run.name not in ("specdec-bf16", "vllm-bf16")])
    assert without_plain["vllm-bf16-lookup"].equal_to_plain is None
    assert without_plain["vllm-bf16-lookup"].equal_to_own_plain is None


def test_runs_with_company_are_counted() -> None:
    runs = [make_run("vllm-bf16", 1, busy=("x",)), make_run("vllm-bf16", 2, foreign_cpus=0.9)]
    found = summarise([*runs, make_run("vllm-bf16", 3, foreign_cpus=0.1)])["vllm-bf16"]
    assert (found.unsettled_runs, found.disturbed_runs) == (1, 1)


def test_the_reference_is_the_fastest_row_of_ours() -> None:
    runs = [make_run("specdec-bf16", 1), make_run("specdec-bf16-suffix", 1, 50.0), make_run("llamacpp-q4_1", 1, 10.0)]
    assert fastest_of_ours([OURS, OUR_DRAFTER, QUANTISED], runs) == "specdec-bf16-suffix"
    assert fastest_of_ours([OURS, OUR_DRAFTER, QUANTISED], []) is None


def test_paths_of_the_machine_are_cut_to_their_last_part() -> None:
    text = "log /a/b c.log and ~/x/y.py, see https://host/a/b or d/e; 5 tok/s (in '/opt/q/') C:\\u\\z.txt </b>"
    assert masked({"key": [text, 1, None]}) == {
        "key": ["log b c.log and y.py, see https://host/a/b or d/e; 5 tok/s (in 'q') z.txt </b>", 1, None]
    }
    arguments = ["bench", "--peers-dir", "/opt/my peers", "--gguf=/a/b.gguf", "-o", "model.name=/m/n", "out/x.json"]
    assert masked_arguments(arguments) == [
        "bench", "--peers-dir", "my peers", "--gguf=b.gguf", "-o", "model.name=n", "out/x.json"
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_a_process_that_computes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "WINDOW_S", 0.1)
    spinning = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    sleeping = [sys.executable, "-c", "print(flush=True)\nimport time; time.sleep(60)"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) for command in (spinning, sleeping)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        meter = quiet.Meter(quiet.OWN)
        busy, idle = (process.pid for process in processes)
        assert quiet.settle([busy, idle, quiet.OWN], limit_s=0.3) == {busy}
        assert quiet.settle([idle], limit_s=5.0) == set()
        foreign = meter.foreign_cpus()
        assert foreign is not None
        assert foreign > 0.0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
