"""Texts and counts of our drafters in a real vLLM, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from own_engine import OwnEngine
from prompts import make_prompts
from run_vllm import OFF, Job, K, Outcome, Run, engine_options, plugin, run_jobs

from specdec.target import HFTarget

DRAFTERS = ["ngram", "suffix", "medusa", "clover"]
ALL = [*DRAFTERS, "eagle", "model", "recycling"]
ALONE = {"recycling": {"max_num_seqs": 1}}
"""It learns from all texts at once: our own engine's counts are those of one after the other."""
ABORTED = [1, 6]
CHUNK = 24
BLOCKS = 10
"""Of 32 tokens: more prompts find room than texts."""
LONG = 60
"""Tokens of texts that outgrow the cache whenever which request arrives: processes do not wait for one another."""

DISTURBANCES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": CHUNK, "enable_chunked_prefill": True},
    "aborted": {},
    "preempted": {"num_gpu_blocks_override": BLOCKS, "block_size": 32},
}


@pytest.fixture(scope="module")
def job(folder: Path, tiny_options: dict[str, Any]) -> Callable[..., Job]:
    """A job with a drafter, or none, and disturbances."""

    def make(drafter: str | None, disturbances: Sequence[str] = (), max_tokens: int = 24) -> Job:
        speculation = None if drafter is None else plugin(drafter, tiny_options[drafter])
        changes = {name: value for kind in disturbances for name, value in DISTURBANCES[kind].items()}
        engine = engine_options(folder / "model", speculation, **ALONE.get(drafter, {}), **changes)
        aborted = "aborted" in disturbances
        abort = ABORTED if aborted else ()
        return Job(engine, make_prompts(), max_tokens, abort, abort_at=6 if aborted else -1)

    return make


@pytest.fixture(scope="module")
def run_apart(folder: Path, job: Callable[..., Job]) -> Iterator[Run]:
    """Engines in processes of their own: with all disturbances at a time, and compiled, as vLLM is by default."""
    jobs = {name: job(name, list(DISTURBANCES), LONG) for name in DRAFTERS}
    undisturbed = job("clover")
    jobs["compiled"] = replace(undisturbed, engine={**undisturbed.engine, "enforce_eager": False})
    run = Run(jobs, folder / "multi-process", True)
    yield run
    run.stop()


@pytest.fixture(scope="module")
def served(folder: Path, job: Callable[..., Job], run_apart: Run) -> dict[str, Outcome]:
    """All that runs with the engine in one process with its client, while the others run."""
    jobs = {"plain": job(None), "plain, long": job(None, max_tokens=LONG), **{name: job(name) for name in ALL}}
    jobs["ngram, two deep"] = Job(engine_options(folder / "model", plugin("ngram", {"depth": "2"})), make_prompts())
    for name in DRAFTERS:
        alone = job(name)
        engine = {**alone.engine, "enable_prefix_caching": True, "block_size": 32}
        jobs[f"{name} cached"] = replace(alone, engine=engine, prompts=[*alone.prompts, *alone.prompts])
    jobs |= {f"{name} {kind}": job(name, [kind]) for name in DRAFTERS for kind in DISTURBANCES}
    return run_jobs(jobs, folder / "in-process", multiprocess=False)


@pytest.fixture(scope="module")
def served_apart(run_apart: Run) -> dict[str, Outcome]:
    return run_apart.outcomes()


def check_text(outcome: Outcome, plain: Outcome, aborted: bool = False) -> None:
    """Texts are those without speculation; those of cancelled requests begin like them."""
    for index, (mine, other) in enumerate(zip(outcome.tokens, plain.tokens, strict=True)):
        if aborted and index in ABORTED:
            assert len(mine) < len(other)
            assert mine == other[: len(mine)]
        else:
            assert mine == other


@pytest.mark.parametrize("name", ALL)
def test_texts_are_those_without_speculation(served: dict[str, Outcome], name: str) -> None:
    check_text(served[name], served["plain"])
    assert all(len(tokens) == 24 for tokens in served[name].tokens)
    assert served[name].proposer is not None
    assert served[name].proposer["off"] is None
    assert served[name].proposer["name"] == name
    assert served[name].drafted > 0


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_are_accepted(served: dict[str, Outcome], name: str) -> None:
    assert 0 < served[name].accepted <= served[name].drafted
    assert served[name].drafted <= K * served[name].drafts


@pytest.mark.parametrize("name", ALL)
def test_drafts_are_accepted_as_often_as_by_our_own_engine(
    served: dict[str, Outcome], tiny_target: HFTarget, tiny_options: dict[str, Any], name: str
) -> None:
    own = OwnEngine(tiny_target, name, tiny_options[name])
    assert own.accepted(make_prompts(), served[name].tokens) == served[name].accepted


@pytest.mark.parametrize("kind", DISTURBANCES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_disturbances_change_no_text(served: dict[str, Outcome], name: str, kind: str) -> None:
    outcome = served[f"{name} {kind}"]
    check_text(outcome, served["plain"], aborted=kind == "aborted")
    assert outcome.proposer is not None
    assert outcome.proposer["off"] is None
    assert outcome.accepted > 0
    assert (outcome.preemptions > 0) == (kind == "preempted")


@pytest.mark.parametrize("name", DRAFTERS)
def test_chunks_of_a_prompt_change_no_count(served: dict[str, Outcome], name: str) -> None:
    assert served[f"{name} chunked"].accepted == served[name].accepted


@pytest.mark.parametrize("name", DRAFTERS)
def test_nothing_is_kept_of_requests_that_are_over(served: dict[str, Outcome], name: str) -> None:
    for outcome in (served[name], *(served[f"{name} {kind}"] for kind in DISTURBANCES)):
        assert outcome.proposer is not None
        assert outcome.proposer["requests"] == 1  # the one that is asked last


@pytest.mark.parametrize("name", DRAFTERS)
def test_prompts_that_vllm_finds_in_its_cache_change_no_text(served: dict[str, Outcome], name: str) -> None:
    """Eight and the same again, of whose longer ones a beginning is not computed: its hidden states are never seen."""
    outcome = served[f"{name} cached"]
    assert outcome.cached > 0
    assert outcome.tokens == served["plain"].tokens * 2
    assert outcome.proposer is not None
    assert outcome.proposer["off"] is None
    assert outcome.accepted > 0


def test_options_reach_the_drafter(served: dict[str, Outcome]) -> None:
    """As ``specdec vllm-config -o depth=2`` writes them down."""
    deep, shallow = served["ngram"], served["ngram, two deep"]
    assert shallow.tokens == served["plain"].tokens
    assert shallow.drafts < shallow.drafted <= 2 * shallow.drafts
    assert 2 * deep.drafts < deep.drafted


@pytest.mark.parametrize("name", DRAFTERS)
def test_an_engine_in_a_process_of_its_own_writes_the_same(
    served: dict[str, Outcome], served_apart: dict[str, Outcome], run_apart: Run, name: str
) -> None:
    outcome = served_apart[name]
    check_text(outcome, served["plain, long"], aborted=True)
    assert outcome.accepted > 0
    assert outcome.preemptions > 0
    assert f"specdec drafts with {name}, " in run_apart.log()
    assert OFF not in run_apart.log()


def test_a_compiled_model_hands_out_the_states_that_drafts_are_made_from(
    served: dict[str, Outcome], served_apart: dict[str, Outcome]
) -> None:
    assert served_apart["compiled"].tokens == served["plain"].tokens
    assert served_apart["compiled"].accepted == served["clover"].accepted
