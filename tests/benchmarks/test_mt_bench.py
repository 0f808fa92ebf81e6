"""The benchmark as a whole: interleaving, resuming after a kill, refusing wrong text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from specdec import SamplingParams, SpecDecoder, registry
from specdec.batch import Batch
from specdec.benchmarks.agreement import AgreementError
from specdec.benchmarks.mt_bench import Progress, make_prompt, run_key, run_mt_bench
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.schema import BenchResult, Run
from specdec.benchmarks.settings import DrafterSpec, Settings
from specdec.cli import main
from specdec.drafters.ngram import NgramDrafter
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import TreeWalk, Verdict, Verifier
from specdec.verifiers.match import CoupledVerifier

ECHO = "row row row row your boat row row row row your boat row row"
QUESTIONS = QuestionSet(
    "tiny", "test", "ab" * 32,
    (
        Question(1, "math", (ECHO, "and then?")),
        Question(2, "math", (f"{ECHO} gently", "and then?")),
        Question(3, "coding", (f"{ECHO} down", "and then?")),
        Question(4, "coding", (f"{ECHO} the stream",)),
    ),
)  # fmt: skip
NGRAM = DrafterSpec("ngram", "ngram")
SUFFIX = DrafterSpec("suffix", "suffix")


def settings(*drafters: DrafterSpec, **fields: Any) -> Settings:
    values = {"model": "tiny", "dtype": "float32", "device": "cpu", "max_new_tokens": 12, "adaptive": False} | fields
    return Settings(drafters=drafters or (NGRAM,), **values)


class FirstChildVerifier(CoupledVerifier):
    """Planted: says it is lossless, and accepts the first drafted token whatever the target thinks."""

    name = "planted"

    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        walk = TreeWalk(tree, logits, batch)
        if tree.num_nodes > 1:
            walk.choose(tree.tokens[:, 1])
        while walk.active:
            walk.choose(walk.scores().argmax(-1))
        return walk.verdict()


class MeddlingDrafter(NgramDrafter):
    """Planted: writes into what it may only read, once a text has eight tokens more than its prompt."""

    name = "meddling"

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        super().observe(batch, tree, output, verdict)
        for row, tokens in zip(batch.rows, verdict.tokens, strict=True):
            if len(row.emitted) >= 8:
                tokens[-1] = (tokens[-1] + 1) % batch.vocab_size


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong drafter and the wrong policy, by name."""
    module = types.ModuleType("planted_by_test")
    module.FirstChildVerifier = FirstChildVerifier  # type: ignore[attr-defined]
    module.MeddlingDrafter = MeddlingDrafter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted_by_test", module)
    monkeypatch.setitem(registry._BUILT_IN["specdec.verifiers"], "planted", "planted_by_test:FirstChildVerifier")
    monkeypatch.setitem(registry._BUILT_IN["specdec.drafters"], "meddling", "planted_by_test:MeddlingDrafter")


def test_everything_runs_once_per_repeat_in_rotated_order(target: HFTarget, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    seen: list[Progress] = []
    wanted = settings(NGRAM, SUFFIX, repeat=2, max_new_tokens=8)
    result = run_mt_bench(target, tokenizer, wanted, QUESTIONS, out=out, progress=seen.append, command=["specdec"])
    expected = [
        (repeat, (question.question_id,), turn, label)
        for repeat in range(2)
        for question in QUESTIONS.questions
        for turn in range(1, len(question.turns) + 1)
        for label in ("none", "ngram", "suffix")
    ]
    assert sorted(map(run_key, result.runs)) == sorted(expected)
    first = [[run.drafter for run in result.runs[start : start + 3]] for start in (0, 6, 12)]
    assert first == [["none", "ngram", "suffix"], ["ngram", "suffix", "none"], ["suffix", "none", "ngram"]]
    assert [len(progress.latest) for progress in seen] == [3] * 14
    assert all(progress.total == 42 for progress in seen)
    assert all(run.equal is (None if run.drafter == "none" else True) for run in result.runs)
    hashes = {run_key(run)[:3]: run.token_sha256 for run in result.runs}
    assert all(hashes[run_key(run)[:3]] == run.token_sha256 for run in result.runs)
    assert all(run.emitted == 8 and 0 < run.first_token_ms <= run.wall_ms for run in result.runs)
    assert all(run.decode_ms < run.wall_ms for run in result.runs)
    assert result.summary.overall["ngram"].tau > 1.0
    assert BenchResult.from_json(json.loads(out.read_text())) == result
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_drafters_forget_between_repeats(target: HFTarget, tokenizer: Any) -> None:
    result = run_mt_bench(target, tokenizer, settings(SUFFIX, repeat=2, turns=1), QUESTIONS)
    passes = [[run.passes for run in result.runs if run.drafter == "suffix" and run.repeat == r] for r in (0, 1)]
    assert passes[0] == passes[1]


def test_batch_makes_one_run_of_a_categorys_questions(target: HFTarget, tokenizer: Any) -> None:
    result = run_mt_bench(target, tokenizer, settings(batch_size=2, temperature=0.8), QUESTIONS)
    ngram = {(run.question_ids, run.turn): run for run in result.runs if run.drafter == "ngram"}
    assert list(ngram) == [((1, 2), 1), ((1, 2), 2), ((3, 4), 1), ((3,), 2)]
    both = ngram[(1, 2), 1]
    assert both.emitted == 24
    assert both.steps <= both.passes <= 2 * both.steps
    assert all(run.equal for run in ngram.values())


def test_questions_of_a_queue_join_as_rows_end(target: HFTarget, tokenizer: Any) -> None:
    result = run_mt_bench(target, tokenizer, settings(batch_size=2, queue=4, turns=1), QUESTIONS)
    (ngram,) = [run for run in result.runs if run.drafter == "ngram"]
    assert ngram.question_ids == (1, 2, 3, 4)
    assert (ngram.category, ngram.equal, ngram.emitted) == ("mixed", True, 48)
    assert ngram.passes <= 2 * ngram.steps  # two rows at a time


def test_queue_no_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="queue must be above batch_size, 4, got 4"):
        settings(batch_size=4, queue=4)


def test_second_turn_continues_with_the_first_answer() -> None:
    question = Question(1, "math", ("a", "b"))
    assert make_prompt(question, [], chat=False) == "a\n"
    assert make_prompt(question, ["x"], chat=False) == "a\nx\nb\n"
    assert make_prompt(question, ["x"], chat=True) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]


def test_texts_that_need_not_be_equal_are_not_compared(target: HFTarget, tokenizer: Any) -> None:
    wanted = settings(temperature=0.8, turns=1)
    for verifier in ("rejection", "typical"):
        runs = run_mt_bench(target, tokenizer, replace(wanted, verifier=verifier), QUESTIONS.limit(1)).runs
        assert [run.equal for run in runs] == [None, None]


@pytest.mark.usefixtures("planted")
def test_wrong_policy_is_refused_saying_where(target: HFTarget, tokenizer: Any, tmp_path: Path) -> None:
    wanted = settings(verifier="planted", temperature=0.8)
    with pytest.raises(AgreementError, match=r"drafter 'ngram', question 1, turn 1, new token \d+: plain decoding has"):
        run_mt_bench(target, tokenizer, wanted, QUESTIONS, out=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_wrong_drafter_is_refused(target: HFTarget, tokenizer: Any, batch_size: int) -> None:
    wanted = settings(DrafterSpec("meddling", "meddling"), batch_size=batch_size)
    with pytest.raises(AgreementError, match="drafter 'meddling', question"):
        run_mt_bench(target, tokenizer, wanted, QUESTIONS)


def test_difference_of_rounding_size_goes_on_and_is_recorded(
    target: HFTarget, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens' scores differ by less than rounding; a policy that takes the other of them is no error."""
    head = target.model.lm_head.weight
    with torch.no_grad():
        head[1::2] = head[0::2] * (1 - 1e-7)

    class OtherTwin(FirstChildVerifier):
        def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
            walk = TreeWalk(tree, logits, batch)
            while walk.active:
                walk.choose(walk.scores().argmax(-1) ^ 1)
            return walk.verdict()

    pick = SpecDecoder._pick_verifier

    def pick_by_drafter(decoder: SpecDecoder, params: SamplingParams) -> Verifier:
        return OtherTwin() if decoder.drafter.name == "ngram" else pick(decoder, params)

    monkeypatch.setattr(SpecDecoder, "_pick_verifier", pick_by_drafter)
    result = run_mt_bench(target, tokenizer, settings(), QUESTIONS.limit(1))
    first, second = [run for run in result.runs if run.drafter == "ngram"]
    assert first.equal is False
    assert first.difference is not None
    assert first.difference.rounding
    assert first.difference.position == 0
    assert second.equal is None  # its prompt has the first answer in it, which differs
    assert result.summary.overall["ngram"].differing_runs == 1


KILLED = """
import sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.path.insert(0, {here!r})
import test_mt_bench as t
folder, out = sys.argv[1:]
def progress(now):
    if len(now.runs) == 6:
        print("ready", flush=True)
        time.sleep(600)
target = t.HFTarget(AutoModelForCausalLM.from_pretrained(folder))
t.run_mt_bench(target, AutoTokenizer.from_pretrained(folder), t.settings(threads=1), t.QUESTIONS, out=Path(out),
               progress=progress)
"""


def test_run_goes_on_after_kill_9(target: HFTarget, tokenizer: Any, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    partial = tmp_path / "out.json.partial.jsonl"
    script = KILLED.format(here=str(Path(__file__).parent))
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(model_folder), str(out)], stdout=subprocess.PIPE, cwd=root, text=True
    ) as process:
        assert process.stdout is not None
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    lines = partial.read_text().splitlines()
    assert len(lines) == 1 + 6
    # As if killed within a write: the sixth run is torn, so the unit it belongs to runs again.
    partial.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][: len(lines[-1]) // 2])

    wanted = settings(threads=1)
    with pytest.raises(ValueError, match="holds an interrupted run"):
        run_mt_bench(target, tokenizer, wanted, QUESTIONS, out=out)
    with pytest.raises(ValueError, match=r"settings\.max_new_tokens: 12 before, 13 now"):
        run_mt_bench(target, tokenizer, replace(wanted, max_new_tokens=13), QUESTIONS, out=out, resume=True)
    with pytest.raises(ValueError, match=r"questions\.sha256"):
        run_mt_bench(target, tokenizer, wanted, replace(QUESTIONS, sha256="cd"), out=out, resume=True)

    resumed = run_mt_bench(target, tokenizer, wanted, QUESTIONS, out=out, resume=True)
    whole = run_mt_bench(target, tokenizer, wanted, QUESTIONS)

    def content(run: Run) -> tuple[Any, ...]:
        return (*run_key(run), run.emitted, run.token_sha256, run.equal)

    assert list(map(content, resumed.runs)) == list(map(content, whole.runs))
    kept = [Run.from_json(json.loads(line)["run"]) for line in lines[1:5]]
    assert resumed.runs[:4] == kept
    assert resumed.resumed_after == [4]
    assert not partial.exists()
    assert BenchResult.from_json(json.loads(out.read_text())) == resumed


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="turns must be 1 or 2, got 3"):
        settings(turns=3)
    with pytest.raises(ValueError, match="'ngram' is there twice"):
        settings(NGRAM, NGRAM)
    with pytest.raises(ValueError, match="repeat must be at least 1"):
        settings(repeat=0)


@pytest.fixture
def invoke(target: HFTarget, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``specdec bench mt-bench`` on the tiny model, in this process."""
    import specdec.models

    path = tmp_path / "questions.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"question_id": q.question_id, "category": q.category, "turns": q.turns})
            for q in QUESTIONS.questions
        )
    )
    loaded = SimpleNamespace(model=target.model, tokenizer=tokenizer)
    monkeypatch.setattr(specdec.models, "load_model", lambda *_, **__: loaded)

    def run(*arguments: str) -> Result:
        fixed = ["bench", "mt-bench", "-m", "tiny", "--questions", str(path), "-t", "12"]
        return CliRunner().invoke(main, [*fixed, *arguments])

    return run


def test_command_prints_tables_and_the_question_set(invoke: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    chosen = ("-d", "ngram", "-d", "none", "-o", "ngram.max_nodes=4", "--limit", "2", "--quantize", "int8")
    result = invoke(*chosen, "--json", str(out))
    assert result.exit_code == 0, result.output
    rows = [line.split()[:2] for line in result.stdout.splitlines()[1:7]]
    assert rows == [[c, d] for c in ("math", "coding", "overall") for d in ("none", "ngram")]
    document = json.loads(out.read_text())
    assert document["settings"]["drafters"] == [{"name": "ngram", "label": "ngram", "options": {"max_nodes": "4"}}]
    assert document["settings"]["dtype"] == "int8"
    assert document["questions"]["count"] == 2
    assert f"questions: questions ({tmp_path / 'questions.jsonl'}), 2 of sha256 {document['questions']['sha256']}" in (
        result.stdout
    )
    assert "[2/8] question 1, turn 1: none" in result.stderr


@pytest.mark.usefixtures("planted")
def test_command_refuses_wrong_text_without_a_speedup(invoke: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = invoke("-d", "ngram", "-d", "meddling", "--json", str(out))
    assert result.exit_code == 1
    assert "refused: drafter 'meddling', question " in result.stderr
    assert result.stdout == ""
    assert "speed" not in result.output.lower()
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --json"),
        (["-d", "ngrm"], "unknown drafter 'ngrm'; did you mean 'ngram'"),
        (["-d", "ngram", "-o", "max_nodes=4"], "-o takes DRAFTER.NAME=VALUE"),
        (["-d", "ngram", "-o", "suffix.max_nodes=4"], "unknown drafter of -o 'suffix'"),
        (["-d", "ngram", "-o", "ngram.nodes=4"], "unknown option of drafter 'ngram' 'nodes'"),
        (["-d", "ngram", "--json", "/nowhere/out.json"], "there is no folder '/nowhere'"),
        (["-d", "ngram", "--questions", "/nowhere.jsonl"], "cannot read questions"),
    ],
)
def test_command_names_what_cannot_be_served(invoke: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
