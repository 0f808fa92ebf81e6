"""specdec and the engines that users would pick instead, on the same weights, prompts and threads, in one run.

Every row answers a question before the next question begins, in an order that rotates, so that what changes on the
machine meets all alike. Engines stay loaded in processes of their own, and nobody computes but the one that is timed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from specdec.benchmarks import record
from specdec.benchmarks.agreement import AgreementError, compare
from specdec.benchmarks.contenders import Contender, OurRow, one_line
from specdec.benchmarks.masking import masked
from specdec.benchmarks.mt_bench import WARM_UP, WARM_UP_TOKENS, describe, make_prompt
from specdec.benchmarks.peer_schema import KIND, Entrant, PeerRun, PeersResult
from specdec.benchmarks.peer_settings import PeerSettings
from specdec.benchmarks.peer_summary import fastest_of_ours, summarise_peers
from specdec.benchmarks.peers import PeerError
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.schema import PLAIN, SCHEMA
from specdec.benchmarks.stage import Stage
from specdec.prompts import encode_prompt
from specdec.registry import unknown
from specdec.target import HFTarget


@dataclass(frozen=True)
class PeerProgress:
    """What was done so far.

    Attributes:
        runs: all runs.
        total: runs there will be, if nobody else fails.
        latest: those of the row that has just answered.
        entrants: all rows as they are now, by name.
    """

    runs: Sequence[PeerRun]
    total: int
    latest: Sequence[PeerRun]
    entrants: Mapping[str, Entrant]


def run_peers(
    targets: Mapping[str, HFTarget],
    tokenizer: Any,
    peers: Sequence[Contender],
    skipped: Sequence[Entrant],
    settings: PeerSettings,
    questions: QuestionSet,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: Callable[[PeerProgress], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (),
) -> PeersResult:
    """Run the comparison on the first turns of questions, greedily.

    A peer that fails is recorded with its reason and left out from then on.

    Args:
        targets: the model in each of ``settings.precisions``, for specdec's own rows.
        tokenizer: its tokenizer; with a chat template questions are chat messages, else text.
        peers: those that can run, from ``prepare_peers``; started and closed here.
        skipped: those that cannot, for the record.
        settings: what to run.
        questions: the questions.
        out: the JSON file to write, without paths of this machine; finished blocks go to ``OUT.partial.jsonl`` first.
        resume: go on where an interrupted run with the same settings and ``out`` stopped.
        progress: called after every row's turn, outside the clock.
        say: told in a few words what takes long or goes wrong.
        command: the command line, for the record.

    Raises:
        AgreementError: where a text of specdec's differs from its plain decoding by more than rounding explains.
        ValueError: for settings that cannot be served, or a journal that is of another run or was not asked for.
        RuntimeError: where specdec itself fails, saying at which question.
    """
    bench = _Bench(targets, tokenizer, peers, skipped, settings, questions, say)
    try:
        return bench.run(out, resume, progress, command)
    finally:
        bench.close()


def encode_question(question: Question, tokenizer: Any, vocab_size: int) -> list[int]:
    """Token ids of a question's first turn, as every row gets it."""
    chat = bool(getattr(tokenizer, "chat_template", None))
    return encode_prompt(make_prompt(question, [], chat), tokenizer, vocab_size)


class _Bench:
    def __init__(
        self,
        targets: Mapping[str, HFTarget],
        tokenizer: Any,
        peers: Sequence[Contender],
        skipped: Sequence[Entrant],
        settings: PeerSettings,
        questions: QuestionSet,
        say: Callable[[str], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._questions = questions
        self._say = say
        self._ours = [
            OurRow(precision, targets[precision], tokenizer, spec)
            for precision in settings.precisions
            for spec in (None, *settings.drafters)
        ]
        names = [row.entrant.name for row in self._ours]
        if settings.reference is not None and settings.reference not in names:
            raise ValueError(unknown("reference", settings.reference, names))
        self._contenders: list[Contender] = [*self._ours, *peers]
        self._entrants = {entrant.name: entrant for entrant in (*(c.entrant for c in self._contenders), *skipped)}
        self._runs: list[PeerRun] = []
        target = targets[settings.precisions[0]]
        self._prompts = {
            question.question_id: encode_question(question, tokenizer, target.vocab_size)
            for question in questions.questions
        }
        self._check_room(target.max_context)
        self._stage = Stage(
            encode_prompt(WARM_UP, tokenizer, target.vocab_size),
            min(WARM_UP_TOKENS, settings.max_new_tokens),
            sorted(target.eos_token_ids),
            settings.loaded,
            say,
        )

    def run(
        self,
        out: Path | None,
        resume: bool,
        progress: Callable[[PeerProgress], None] | None,
        command: Sequence[str],
    ) -> PeersResult:
        """See ``run_peers``."""
        settings, asked = self._settings, self._questions.questions
        date, commit = datetime.now(UTC).isoformat(timespec="seconds"), record.commit()
        machine = record.machine(torch.device("cpu")) | {"threads": settings.threads}
        skipped = [name for name, entrant in self._entrants.items() if entrant.skipped is not None]
        header = {
            "schema": SCHEMA, "kind": KIND, "commit": commit, "settings": settings.to_json(),
            "questions": self._questions.to_json(), "skipped": skipped,
        }  # fmt: skip
        journal = None if out is None else record.Journal(out, header)
        num_done, resumed_after = self._open(journal, resume)
        blocks = [asked[start : start + settings.block] for start in range(0, len(asked), settings.block)]
        for index, block in enumerate(blocks[num_done:], start=num_done):
            before = len(self._runs)
            self._run_block(index, block, progress)
            if journal is not None:
                journal.append([self._entry(self._runs[before:])])
        entrants = list(self._entrants.values())
        reference = settings.reference or fastest_of_ours(entrants, self._runs)
        result = PeersResult(
            date, list(command), commit, machine, record.versions(), settings.to_json() | {"reference": reference},
            self._questions.to_json(), self._runs,
            summarise_peers(entrants, self._runs, reference, settings.seed), resumed_after,
        )  # fmt: skip
        if out is not None and journal is not None:
            record.write_json(out, masked(result.to_json()))
            journal.remove()
        return result

    def close(self) -> None:
        """End all workers."""
        self._stage.clear()

    def _check_room(self, max_context: int | None) -> None:
        """Raise ValueError where a question and its answer do not fit the model."""
        for question_id, prompt in self._prompts.items():
            needed = len(prompt) + self._settings.max_new_tokens
            if max_context is not None and needed > max_context:
                raise ValueError(f"question {question_id} needs {needed} tokens, the model has room for {max_context}")

    def _open(self, journal: record.Journal | None, resume: bool) -> tuple[int, list[int]]:
        """Start the journal with the blocks of an interrupted run.

        Returns:
            The number of those blocks, and the numbers of runs after which the benchmark broke off.
        """
        entries = record.interrupted(journal, resume)
        if journal is None:
            return 0, []
        breaks = [int(entry["resumed_after"]) for entry in entries if "resumed_after" in entry]
        blocks = [entry for entry in entries if "runs" in entry]
        for entry in blocks:
            self._runs += [PeerRun.from_json(run) for run in entry["runs"]]
            self._entrants |= {name: Entrant.from_json(state) for name, state in entry["entrants"].items()}
        if blocks:
            breaks.append(len(self._runs))
        journal.start([*blocks, *({"resumed_after": number} for number in breaks)])
        return len(blocks), breaks

    def _entry(self, runs: Sequence[PeerRun]) -> dict[str, Any]:
        """A finished block, and what is known of all rows after it."""
        entrants = {name: asdict(entrant) for name, entrant in self._entrants.items()}
        return {"runs": [asdict(run) for run in runs], "entrants": entrants}

    def _run_block(
        self, index: int, block: Sequence[Question], progress: Callable[[PeerProgress], None] | None
    ) -> None:
        """Have every row that has not failed answer all questions of a block, from another row on in every block."""
        answers: dict[tuple[str, int], tuple[int, ...]] = {}
        start = index % len(self._contenders)
        for contender in (*self._contenders[start:], *self._contenders[:start]):
            if self._entrants[contender.entrant.name].out:
                continue
            before = len(self._runs)
            try:
                for question in block:
                    self._ask(contender, question, answers)
            except PeerError as error:
                self._leave_out(contender, error)
            if progress is not None and len(self._runs) > before:
                progress(PeerProgress(self._runs, self._total(), self._runs[before:], self._entrants))
        for question in block:
            self._judge(question, answers)

    def _ask(self, contender: Contender, question: Question, answers: dict[tuple[str, int], tuple[int, ...]]) -> None:
        name, prompt = contender.entrant.name, self._prompts[question.question_id]
        try:
            hello = self._stage.ready(contender)
            if hello is not None:
                known = self._entrants[name]
                load_ms = hello.load_ms if known.load_ms is None else known.load_ms
                self._entrants[name] = replace(known, version=hello.version, load_ms=load_ms, notes=hello.notes)
            answer = self._stage.ask(contender, prompt, self._settings.max_new_tokens)
        except (PeerError, ValueError):
            raise
        except Exception as error:
            raise RuntimeError(f"{name}, question {question.question_id}: {type(error).__name__}: {error}") from error
        self._runs.append(PeerRun.of(question, name, answer.reply, answer.busy, answer.foreign_cpus))
        answers[name, question.question_id] = answer.reply.token_ids

    def _leave_out(self, contender: Contender, error: PeerError) -> None:
        """Record why a row answers no further questions."""
        name = contender.entrant.name
        self._say(f"{name} is left out from here on: {error}")
        self._stage.close(contender)
        reason, known = one_line(error), self._entrants[name]
        ran = any(run.name == name for run in self._runs)
        self._entrants[name] = replace(known, failed=reason) if ran else replace(known, skipped=reason)

    def _total(self) -> int:
        """Runs made and to be made."""
        made = Counter(run.name for run in self._runs)
        names = [contender.entrant.name for contender in self._contenders]
        return len(self._runs) + sum(
            len(self._questions.questions) - made[name] for name in names if not self._entrants[name].out
        )

    def _judge(self, question: Question, answers: Mapping[tuple[str, int], tuple[int, ...]]) -> None:
        """Raise AgreementError where one of specdec's texts is not its plain decoding's, rounding aside."""
        plain = {row.entrant.precision: row for row in self._ours if row.entrant.speculation == PLAIN}
        number, prompt = question.question_id, self._prompts[question.question_id]
        for row in self._ours:
            expected = answers[plain[row.entrant.precision].entrant.name, number]
            got = answers[row.entrant.name, number]
            found = compare(row.target, number, prompt, expected, got, self._settings.params)
            if found is not None and not found.rounding:
                raise AgreementError(describe(row.entrant.name, 1, found, self._tokenizer))
