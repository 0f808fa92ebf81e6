"""Whether text with speculation is text without, in every precision: drafters alone and in batches.

Plain decoding of one text at a time is what all others are held against: itself in batches, and every drafter at every
batch size. They run with what decoders do by default, shared and kept prefixes included. Nothing is timed.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from specdec.benchmarks import record
from specdec.benchmarks.agreement import compare
from specdec.benchmarks.masking import masked
from specdec.benchmarks.mt_bench import failing_at, make_prompt
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.schema import PLAIN, SCHEMA, Difference
from specdec.benchmarks.settings import DrafterSpec
from specdec.decoder import SpecDecoder
from specdec.prompts import encode_prompt
from specdec.registry import create_drafter
from specdec.result import GenerationResult
from specdec.sampling import SamplingParams
from specdec.stats import DecodeStats
from specdec.target import HFTarget

KIND = "texts"

Load = Callable[[str], tuple[HFTarget, Any, Sequence[DrafterSpec]]]
"""From a precision's name to a target, its tokenizer and the drafters to run."""


@dataclass(frozen=True)
class TextSettings:
    """What is asked for; a run can only be resumed with the same.

    Attributes:
        model: the target's name, for the record.
        precisions: names, each with plain decoding of its own.
        drafters: as asked for; plain decoding always runs.
        batch_sizes: texts decoded together.
        turns: 1 or 2 messages of each question, where it has as many.
        max_new_tokens: most tokens per text.
        temperature: 0 is greedy; else tokens are drawn by the coupled policy.
        seed: of sampling.
        weights: the dtype of weights, where a precision names none, and beside quantized ones.
        device: where targets are.
        adaptive: draft no more than pays, as decoders do by default; otherwise trees are as the drafters make them.
        threads: CPU threads.
    """

    model: str
    precisions: tuple[str, ...]
    drafters: tuple[str, ...]
    batch_sizes: tuple[int, ...] = (1, 4)
    turns: int = 1
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    weights: str = "bf16"
    device: str = "cpu"
    adaptive: bool = True
    threads: int = field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        if self.turns not in (1, 2):
            raise ValueError(f"turns must be 1 or 2, got {self.turns}")
        for kind, values in (("precision", self.precisions), ("batch size", self.batch_sizes)):
            if not values:
                raise ValueError(f"at least one {kind} is needed, got none")
            doubled = [value for value in values if values.count(value) > 1]
            if doubled:
                raise ValueError(f"{kind} {doubled[0]!r} is there twice")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes must be at least 1, got {min(self.batch_sizes)}")
        _ = self.params  # it refuses what nobody can sample by

    @property
    def params(self) -> SamplingParams:
        """Sampling parameters of every text."""
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``dtype`` is there for readers of any benchmark's result."""
        return asdict(self) | {"dtype": ", ".join(self.precisions)}


@dataclass(frozen=True)
class Text:
    """What plain decoding wrote, alone.

    Attributes:
        question_id: the question.
        turn: from 1; the prompt of the second has plain decoding's first answer in it.
        prompt: token ids.
        tokens: new token ids.
    """

    question_id: int
    turn: int
    prompt: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class TextFigures:
    """How texts of a drafter, or of plain decoding in batches, compare with those of plain decoding alone.

    Attributes:
        drafter: its label; "none" is plain decoding.
        batch_size: texts decoded together.
        equal: texts of the same tokens.
        rounding: texts that differ by no more than rounding explains.
        tau: emitted tokens per target pass.
        first: the first difference, of those that rounding does not explain if there are any; None where all are equal.
        turn: of that text.
    """

    drafter: str
    batch_size: int
    equal: int
    rounding: int
    tau: float
    first: Difference | None = None
    turn: int | None = None


def run_texts(
    load: Load,
    settings: TextSettings,
    questions: QuestionSet,
    *,
    out: Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Write all texts and compare them; drafters begin anew with every batch size.

    Args:
        load: called once per precision.
        settings: what to run.
        questions: the questions.
        out: the JSON file to write; what was finished goes to ``OUT.partial.jsonl`` meanwhile.
        resume: go on where an interrupted run with the same settings and ``out`` stopped.
        say: told of everything that was finished.
        command: the command line, for the record.

    Returns:
        The result as JSON: what was compared, on what, from which commit. See ``broken`` for what must not be.

    Raises:
        ValueError: for settings that cannot be served, or a journal that is of another run or was not asked for.
        RuntimeError: when a drafter or the target fails, saying at which question.
    """
    # Nothing is timed, so that what else the machine did does not matter.
    machine, commit = record.machine(torch.device(settings.device)) | {"load_at_start": None}, record.commit()
    head = {
        "schema": SCHEMA, "kind": KIND, "commit": commit, "settings": settings.to_json(),
        "questions": questions.to_json(),
    }  # fmt: skip
    date = datetime.now(UTC).isoformat(timespec="seconds")
    journal = None if out is None else record.Journal(out, head)
    bench = _Bench(settings, questions, journal, resume, say)
    lines = [bench.run(precision, load) for precision in settings.precisions]
    result = head | {
        "date": date, "command": list(command), "machine": machine, "versions": record.versions(), "precisions": lines,
    }  # fmt: skip
    if out is not None and journal is not None:
        record.write_json(out, masked(result))
        journal.remove()
    return result


class _Bench:
    def __init__(
        self,
        settings: TextSettings,
        questions: QuestionSet,
        journal: record.Journal | None,
        resume: bool,
        say: Callable[[str], None],
    ) -> None:
        self._settings, self._questions, self._journal, self._say = settings, questions, journal, say
        self._texts: dict[str, list[Text]] = {}  # of plain decoding alone, by precision
        self._figures: dict[tuple[str, str, int], dict[str, Any]] = {}  # by precision, drafter, batch size
        entries = record.interrupted(journal, resume)
        for entry in entries:
            self._take(entry)
        if journal is not None:
            journal.start(entries)

    def run(self, precision: str, load: Load) -> dict[str, Any]:
        """A precision's entry of the result."""
        self._say(f"loading {precision}")
        target, tokenizer, specs = load(precision)
        if precision not in self._texts:
            texts = _write_alone(target, tokenizer, self._settings, self._questions.questions)
            self._keep({"precision": precision, "texts": [asdict(text) for text in texts]})
        texts, figures = self._texts[precision], []
        self._say(f"{precision}: {len(texts)} texts of plain decoding")
        for spec in (DrafterSpec(PLAIN, PLAIN), *specs):
            for size in self._settings.batch_sizes:
                if (spec.name, size) == (PLAIN, 1):  # what the others are compared with
                    continue
                key = precision, spec.label, size
                if key not in self._figures:
                    found = _compare_with(texts, target, tokenizer, spec, size, self._settings)
                    self._keep({"precision": precision, "figures": asdict(found)})
                figures.append(self._figures[key])
                self._say(f"{precision}, {spec.label}, batch size {size}: {figures[-1]['equal']} of {len(texts)} equal")
        tokens = json.dumps([text.tokens for text in texts]).encode()
        line = {
            "precision": precision, "invariant": target.invariant, "num_texts": len(texts),
            "num_tokens": sum(len(text.tokens) for text in texts), "token_sha256": hashlib.sha256(tokens).hexdigest(),
            "drafters": figures,
        }  # fmt: skip
        del target
        gc.collect()
        return line

    def _keep(self, entry: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.append([entry])
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        precision = entry["precision"]
        if "texts" in entry:
            self._texts[precision] = [Text(**text) for text in entry["texts"]]
        else:
            figures = entry["figures"]
            self._figures[precision, figures["drafter"], figures["batch_size"]] = figures


def _write_alone(target: HFTarget, tokenizer: Any, settings: TextSettings, questions: Sequence[Question]) -> list[Text]:
    """Plain decoding's texts, each prompt computed whole."""
    decoder = SpecDecoder(target, PLAIN, tokenizer=tokenizer, keep_prefixes=False)
    chat, texts = bool(getattr(tokenizer, "chat_template", None)), []
    for question in questions:
        answers: list[str] = []
        for turn in range(1, min(settings.turns, len(question.turns)) + 1):
            prompt = encode_prompt(make_prompt(question, answers, chat), tokenizer, target.vocab_size)
            with failing_at(f"plain decoding, question {question.question_id}, turn {turn}"):
                result = _generate(decoder, [prompt], settings.params)[0]
            answers.append(result.text)
            texts.append(Text(question.question_id, turn, prompt, result.token_ids))
    return texts


def _compare_with(
    texts: Sequence[Text], target: HFTarget, tokenizer: Any, spec: DrafterSpec, size: int, settings: TextSettings
) -> TextFigures:
    """Have a new drafter write texts anew, ``size`` at a time, and compare."""
    decoder = SpecDecoder(
        target, create_drafter(spec.name, spec.options), tokenizer=tokenizer, adaptive=settings.adaptive,
        on_drafter_error="raise",
    )  # fmt: skip
    differing: list[tuple[int, Difference]] = []
    stats = DecodeStats()
    for start in range(0, len(texts), size):
        group = texts[start : start + size]
        with failing_at(f"drafter {spec.label!r}, batch size {size}, from question {group[0].question_id} on"):
            results = _generate(decoder, [text.prompt for text in group], settings.params)
        for text, result in zip(group, results, strict=True):
            stats.add(result.stats)
            found = compare(target, text.question_id, text.prompt, text.tokens, result.token_ids, settings.params)
            if found is not None:
                differing.append((text.turn, found))
    unexplained = [(turn, found) for turn, found in differing if not found.rounding]
    turn, first = next(iter(unexplained or differing), (None, None))
    return TextFigures(
        spec.label, size, len(texts) - len(differing), len(differing) - len(unexplained), stats.tau, first, turn
    )


def _generate(decoder: SpecDecoder, prompts: list[list[int]], params: SamplingParams) -> list[GenerationResult]:
    results: list[GenerationResult] = decoder.generate(prompts, params)
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise RuntimeError(failed)
    return results


def broken(result: Mapping[str, Any]) -> list[str]:
    """A sentence on every row of a result that is not what was promised: a text that differs where a row of a pass is
    the same whatever rides along (``HFTarget.invariant``), or elsewhere by more than rounding explains."""
    sentences = []
    for line in result["precisions"]:
        for row in line["drafters"]:
            wrong = line["num_texts"] - row["equal"] - (0 if line["invariant"] else row["rounding"])
            if wrong:
                sentences.append(
                    f"{line['precision']}, drafter {row['drafter']!r}, batch size {row['batch_size']}: {wrong} of "
                    f"{line['num_texts']} texts are not plain decoding's, first question "
                    f"{row['first']['question_id']}, turn {row['turn']}, new token {row['first']['position']}"
                )
    return sentences
