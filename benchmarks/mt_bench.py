"""The speed-up on MT-Bench's questions: plain decoding and drafters of one target, interleaved turn by turn."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from specdec.benchmarks import record
from specdec.benchmarks.agreement import AgreementError, compare
from specdec.benchmarks.questions import Question, QuestionSet, group_questions
from specdec.benchmarks.roofline import latency_curve, measure_roofline
from specdec.benchmarks.schema import PLAIN, SCHEMA, BenchResult, Difference, Run
from specdec.benchmarks.settings import DrafterSpec, Settings
from specdec.benchmarks.summary import summarise
from specdec.decoder import SpecDecoder
from specdec.prompts import Prompt, encode_prompt
from specdec.registry import create_drafter
from specdec.result import GenerationResult
from specdec.sampling import SamplingParams
from specdec.stats import DecodeStats
from specdec.target import HFTarget

__all__ = ["DrafterSpec", "Progress", "Settings", "run_mt_bench"]

KIND = "mt-bench"
WARM_UP = "The tide comes in twice a day, and each time it is a little later. The tide comes in twice a day because"
WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Progress:
    """What was done so far: runs finished and checked, and how many there will be."""

    runs: Sequence[Run]
    total: int
    latest: Sequence[Run]


@dataclass
class _Output:
    """A call's results, totals, and times in milliseconds."""

    results: list[GenerationResult]
    stats: DecodeStats
    first_token_ms: float
    wall_ms: float


@dataclass(frozen=True)
class _Unit:
    """A turn of a group of questions in a repeat; every drafter runs it before the next unit begins."""

    repeat: int
    index: int
    turn: int
    questions: tuple[Question, ...]

    @property
    def key(self) -> tuple[int, tuple[int, ...], int]:
        return self.repeat, tuple(question.question_id for question in self.questions), self.turn

    @property
    def category(self) -> str:
        """Of the questions, "mixed" where they differ."""
        found = {question.category for question in self.questions}
        return found.pop() if len(found) == 1 else "mixed"

    def order(self, labels: Sequence[str]) -> list[str]:
        """The labels, rotated by one from question to question."""
        start = (self.repeat + self.index) % len(labels)
        return [*labels[start:], *labels[:start]]


def run_mt_bench(
    target: HFTarget,
    tokenizer: Any,
    settings: Settings,
    questions: QuestionSet,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    command: Sequence[str] = (),
) -> BenchResult:
    """Run the benchmark.

    Args:
        target: the model, shared by all decoders.
        tokenizer: its tokenizer; with a chat template questions are chat messages, else text.
        settings: what to run.
        questions: the questions.
        out: the JSON file to write; finished runs go to ``OUT.partial.jsonl`` meanwhile.
        resume: go on where an interrupted run with the same settings and ``out`` stopped.
        progress: called after every turn of every group of questions, outside the clock.
        command: the command line, for the record.

    Raises:
        AgreementError: when a text differs from plain decoding's by more than rounding explains; nothing is written.
        ValueError: for settings that cannot be served, or a journal that is of another run or was not asked for.
        RuntimeError: when a drafter or the target fails, saying at which question.
    """
    return _Bench(target, tokenizer, settings, questions).run(out, resume, progress, command)


class _Bench:
    def __init__(self, target: HFTarget, tokenizer: Any, settings: Settings, questions: QuestionSet) -> None:
        self._target = target
        self._tokenizer = tokenizer
        self._settings = settings
        self._questions = questions
        self._labels = [PLAIN, *(spec.label for spec in settings.drafters)]
        self._runs: list[Run] = []
        self._texts: dict[tuple[int, int, str], list[str]] = {}  # (repeat, question, label) -> answers so far

    def run(
        self,
        out: Path | None,
        resume: bool,
        progress: Callable[[Progress], None] | None,
        command: Sequence[str],
    ) -> BenchResult:
        """See ``run_mt_bench``."""
        settings, device = self._settings, self._target.device
        date, commit, machine = datetime.now(UTC).isoformat(timespec="seconds"), record.commit(), record.machine(device)
        header = {
            "schema": SCHEMA, "kind": KIND, "commit": commit, "settings": settings.to_json(),
            "questions": self._questions.to_json(),
        }  # fmt: skip
        units = list(self._units())
        journal = None if out is None else record.Journal(out, header)
        resumed_after = self._open(journal, resume, units)
        roofline = measure_roofline(self._target)
        done = {run_key(run)[:3] for run in self._runs}
        total = len(units) * len(self._labels)
        decoders: dict[str, SpecDecoder] = {}
        repeat = -1
        for unit in units:
            if unit.key in done:
                continue
            if unit.repeat != repeat:
                repeat, decoders = unit.repeat, self._make_decoders()
            runs = self._run_unit(unit, decoders)
            self._runs += runs
            if journal is not None:
                journal.append([self._entry(run) for run in runs])
            if progress is not None:
                progress(Progress(self._runs, total, runs))
        summary = replace(
            summarise(self._runs, roofline, settings.seed),
            latency_curve=latency_curve(self._target),
            peak_memory_bytes=record.peak_memory_bytes(device),
        )
        result = BenchResult(
            KIND, date, list(command), commit, machine, record.versions(), settings.to_json(),
            self._questions.to_json(), roofline.bandwidth_gb_s, roofline.weight_bytes, roofline.kv_bytes_per_token,
            self._runs, summary, resumed_after,
        )  # fmt: skip
        if out is not None and journal is not None:
            record.write_json(out, result.to_json())
            journal.remove()
        return result

    def _units(self) -> Iterator[_Unit]:
        settings = self._settings
        groups = group_questions(self._questions.questions, settings.queue or settings.batch_size, not settings.queue)
        for repeat in range(self._settings.repeat):
            for index, group in enumerate(groups):
                for turn in range(1, self._settings.turns + 1):
                    questions = tuple(question for question in group if len(question.turns) >= turn)
                    if questions:
                        yield _Unit(repeat, index, turn, questions)

    def _open(self, journal: record.Journal | None, resume: bool, units: Sequence[_Unit]) -> list[int]:
        """Start the journal, with the complete units of an interrupted run; numbers of runs it broke off after."""
        entries = record.interrupted(journal, resume)
        if journal is None:
            return []
        breaks = [int(entry["resumed_after"]) for entry in entries if "resumed_after" in entry]
        entries = [entry for entry in entries if "resumed_after" not in entry]
        found: dict[tuple[int, tuple[int, ...], int], list[dict[str, Any]]] = {}
        for entry in entries:
            found.setdefault(run_key(Run.from_json(entry["run"]))[:3], []).append(entry)
        kept = [
            entry for unit in units if len(found.get(unit.key, ())) == len(self._labels) for entry in found[unit.key]
        ]
        for entry in kept:
            run = Run.from_json(entry["run"])
            self._runs.append(run)
            for question_id, text in zip(run.question_ids, entry["texts"], strict=True):
                self._texts.setdefault((run.repeat, question_id, run.drafter), []).append(text)
        if kept:
            breaks.append(len(kept))
        journal.start([*kept, *({"resumed_after": number} for number in breaks)])
        return breaks

    def _entry(self, run: Run) -> dict[str, Any]:
        texts = [self._texts[run.repeat, question_id, run.drafter][-1] for question_id in run.question_ids]
        return {"run": run.to_json(), "texts": texts}

    def _make_decoders(self) -> dict[str, SpecDecoder]:
        """New decoders, warmed up: drafters remember earlier texts, and no repeat may know another's."""
        rows = self._settings.batch_size
        decoders = {
            PLAIN: SpecDecoder(
                self._target, "none", tokenizer=self._tokenizer, on_drafter_error="raise", max_rows=rows,
                keep_prefixes=False,
            )
        }  # fmt: skip
        for spec in self._settings.drafters:
            decoders[spec.label] = SpecDecoder(
                self._target,
                create_drafter(spec.name, spec.options),
                verifier=self._settings.verifier,
                tokenizer=self._tokenizer,
                adaptive=self._settings.adaptive,
                on_drafter_error="raise",
                max_rows=rows,
                keep_prefixes=False,  # prompts are computed whole, each time
            )
        prompt = encode_prompt(WARM_UP, self._tokenizer, self._target.vocab_size)
        params = replace(self._settings.params, max_new_tokens=min(WARM_UP_TOKENS, self._settings.max_new_tokens))
        for label, decoder in decoders.items():
            with failing_at(f"drafter {label!r}, warm-up"):
                decoder.generate([prompt] * rows, params)
        return decoders

    def _run_unit(self, unit: _Unit, decoders: Mapping[str, SpecDecoder]) -> list[Run]:
        outputs: dict[str, _Output] = {}
        prompts: dict[str, list[list[int]]] = {}
        order = unit.order(self._labels)
        for label in order:
            prompts[label] = [self._encode(unit, question, label) for question in unit.questions]
            with failing_at(f"drafter {label!r}, question {unit.questions[0].question_id}, turn {unit.turn}"):
                outputs[label] = _generate(decoders[label], prompts[label], self._settings.params)
        runs = []
        for label in order:
            equal, difference = None, None
            if label != PLAIN and outputs[label].stats.lossless and self._settings.comparable:
                equal, difference = self._judge(unit, label, prompts, outputs)
            runs.append(_make_run(unit, label, outputs[label], equal, difference))
        for label, output in outputs.items():
            for question, result in zip(unit.questions, output.results, strict=True):
                self._texts.setdefault((unit.repeat, question.question_id, label), []).append(result.text)
        return runs

    def _judge(
        self, unit: _Unit, label: str, prompts: Mapping[str, list[list[int]]], outputs: Mapping[str, _Output]
    ) -> tuple[bool | None, Difference | None]:
        """Whether a run's tokens equal plain decoding's, and the first difference; rows of other prompts left out.

        Raises:
            AgreementError: for a difference that rounding does not explain.
        """
        compared, first = 0, None
        plain = zip(unit.questions, prompts[PLAIN], outputs[PLAIN].results, strict=True)
        mine = zip(prompts[label], outputs[label].results, strict=True)
        for (question, prompt, expected), (own_prompt, got) in zip(plain, mine, strict=True):
            if prompt != own_prompt:  # an earlier turn differed by rounding
                continue
            compared += 1
            params = self._settings.params
            found = compare(self._target, question.question_id, prompt, expected.token_ids, got.token_ids, params)
            if found is not None and not found.rounding:
                raise AgreementError(describe(label, unit.turn, found, self._tokenizer))
            first = first or found
        return (first is None if compared else None), first

    def _encode(self, unit: _Unit, question: Question, label: str) -> list[int]:
        answers = self._texts.get((unit.repeat, question.question_id, label), [])
        prompt = make_prompt(question, answers[: unit.turn - 1], bool(getattr(self._tokenizer, "chat_template", None)))
        return encode_prompt(prompt, self._tokenizer, self._target.vocab_size)


def run_key(run: Run) -> tuple[int, tuple[int, ...], int, str]:
    """What tells a run from others: repeat, questions, turn, drafter."""
    return run.repeat, run.question_ids, run.turn, run.drafter


def make_prompt(question: Question, answers: Sequence[str], chat: bool) -> Prompt:
    """The question's next turn after the answers given so far: chat messages, or all of it as text."""
    if not chat:
        return "".join(f"{turn}\n{answer}\n" for turn, answer in zip(question.turns, answers, strict=False)) + (
            f"{question.turns[len(answers)]}\n"
        )
    messages = []
    for turn, answer in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def describe(label: str, turn: int, difference: Difference, tokenizer: Any) -> str:
    """One sentence on a difference that rounding does not explain."""

    def show(token: int | None) -> str:
        return "has ended" if token is None else f"has {token} ({tokenizer.decode([token])!r})"

    gap = "no score at all for one of them" if difference.gap is None else f"scores {difference.gap:.4g} apart"
    return (
        f"drafter {label!r}, question {difference.question_id}, turn {turn}, new token {difference.position}: plain "
        f"decoding {show(difference.plain_token)}, this run {show(difference.token)}; the target gives {gap}, rounding "
        f"explains {difference.bound:.4g}"
    )


def _generate(decoder: SpecDecoder, prompts: list[list[int]], params: SamplingParams) -> _Output:
    """One timed call."""
    with _no_collector():
        start, first = perf_counter(), None
        with decoder.stream(prompts, params) as stream:
            for _ in stream:
                if first is None:
                    first = perf_counter()
        end = perf_counter()
    results = stream.results
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise RuntimeError(failed)
    return _Output(results, stream.stats, 1000.0 * ((first or end) - start), 1000.0 * (end - start))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Garbage is collected before, not within."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def failing_at(where: str) -> Iterator[None]:
    """Say where something failed."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


def _make_run(unit: _Unit, label: str, output: _Output, equal: bool | None, difference: Difference | None) -> Run:
    results, stats = output.results, output.stats
    read = sum(result.stats.passes * (result.prompt_len + len(result.token_ids) / 2) for result in results)
    tokens = json.dumps([result.token_ids for result in results]).encode()
    return Run(
        repeat=unit.repeat,
        question_id=unit.questions[0].question_id,
        question_ids=unit.key[1],
        category=unit.category,
        turn=unit.turn,
        drafter=label,
        prompt_tokens=sum(result.prompt_len for result in results),
        emitted=stats.emitted,
        passes=stats.passes,
        steps=stats.steps,
        drafted=stats.drafted,
        accepted=stats.accepted,
        accepted_per_pass=dict(stats.accepted_per_pass),
        offered_depth=dict(stats.offered_depth),
        context_tokens=read / stats.steps,
        milliseconds=dict(stats.milliseconds),
        first_token_ms=output.first_token_ms,
        wall_ms=output.wall_ms,
        token_sha256=hashlib.sha256(tokens).hexdigest(),
        equal=equal,
        difference=difference,
    )
