"""Benchmark questions in the ``question.jsonl`` format of MT-Bench and Spec-Bench."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

HUB_REPO, HUB_FILE = "lmsys/mt-bench", "data/mt_bench/question.jsonl"
SHIPPED = Path(__file__).parent / "data" / "questions.jsonl"
HOSTILE = "hostile"
"""Name of the shipped set whose texts cannot be guessed, unless a file has it."""


@dataclass(frozen=True)
class Question:
    """One question: the user's messages, one per turn."""

    question_id: int
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Questions and where they are from.

    Attributes:
        name: of the set.
        source: the file's path, "hub:..." or "shipped".
        sha256: of the whole file, whatever part of it is used.
        questions: those to run.
    """

    name: str
    source: str
    sha256: str
    questions: tuple[Question, ...]

    def limit(self, count: int) -> QuestionSet:
        """``count`` questions spread evenly over the categories, in their order; all where there are not as many."""
        if count < 1:
            raise ValueError(f"at least 1 question is needed, got a limit of {count}")
        seen: dict[str, int] = {}
        ranked = []
        for index, question in enumerate(self.questions):
            rank = seen.get(question.category, 0)
            seen[question.category] = rank + 1
            ranked.append((rank, index))
        kept = sorted(index for _, index in sorted(ranked)[:count])
        return replace(self, questions=tuple(self.questions[index] for index in kept))

    def to_json(self) -> dict[str, Any]:
        """Name, source, hash and number of questions."""
        return {"name": self.name, "sha256": self.sha256, "count": len(self.questions), "source": self.source}


def load_questions(path: str | Path | None = None) -> QuestionSet:
    """Questions of a file; without one MT-Bench from the hub where it can be reached, else the set shipped here.

    Args:
        path: the file, or "hostile" for the set of that name that is shipped.

    Raises:
        ValueError: for a file that cannot be read, or a malformed line, by its number.
    """
    if str(path) == HOSTILE and not Path(HOSTILE).exists():
        return _read(SHIPPED.with_name("hostile.jsonl"), "specdec-hostile", "shipped")
    if path is not None:
        return _read(Path(path), Path(path).stem, "shipped" if Path(path) == SHIPPED else str(path))
    found = _hub_copy()
    if found is not None:
        return _read(found, "mt-bench", f"hub:{HUB_REPO}")
    return _read(SHIPPED, "specdec-questions", "shipped")


def _hub_copy() -> Path | None:
    """MT-Bench's file from the hub's cache or the hub; None where neither has it."""
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(HUB_REPO, HUB_FILE, repo_type="space")
        if isinstance(cached, str):
            return Path(cached)
        if constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT):
            return None
        return Path(hf_hub_download(HUB_REPO, HUB_FILE, repo_type="space", etag_timeout=2))
    except Exception:  # whatever the network or the hub's client raises, the shipped set serves
        return None


def _reachable(url: str) -> bool:
    """Whether a connection opens within 2 s; the hub's client would retry for 25 s. A proxy is taken at its word."""
    if getproxies():
        return True
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=2):
            return True
    except OSError:
        return False


def _read(path: Path, name: str, source: str) -> QuestionSet:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read questions from {str(path)!r}: {error.strerror}") from error
    return QuestionSet(name, source, hashlib.sha256(data).hexdigest(), parse_questions(data, str(path)))


def parse_questions(data: bytes, where: str) -> tuple[Question, ...]:
    """Questions of a file's bytes; blank lines are skipped.

    Raises:
        ValueError: naming ``where``, the number of the malformed line, and what is wrong with it.
    """
    questions: list[Question] = []
    lines: dict[int, int] = {}
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            question = _parse_line(raw)
            if question.question_id in lines:
                raise ValueError(f"question_id {question.question_id} is that of line {lines[question.question_id]}")
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from error
        lines[question.question_id] = number
        questions.append(question)
    if not questions:
        raise ValueError(f"{where} holds no questions")
    return tuple(questions)


def _parse_line(raw: bytes) -> Question:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(entry, dict):
        raise ValueError(f"an object is needed, got {type(entry).__name__}")
    for name in ("question_id", "category", "turns"):
        if name not in entry:
            raise ValueError(f"{name!r} is missing")
    question_id, category, turns = entry["question_id"], entry["category"], entry["turns"]
    if not isinstance(question_id, int) or isinstance(question_id, bool):
        raise ValueError(f"'question_id' must be an integer, got {question_id!r}")
    if not isinstance(category, str) or not category.strip():
        raise ValueError(f"'category' must be a text, got {category!r}")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"'turns' must be a list of one or more texts, got {turns!r}")
    for index, turn in enumerate(turns, start=1):
        if not isinstance(turn, str) or not turn.strip():
            raise ValueError(f"turn {index} must be a text that is not blank, got {turn!r}")
    for text in (category, *turns):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("a lone surrogate (\\ud800 to \\udfff) is no character, and no file could hold it")
    return Question(question_id, category, tuple(turns))


def group_questions(questions: Sequence[Question], size: int, by_category: bool = True) -> list[tuple[Question, ...]]:
    """Groups of at most ``size`` questions in the order of their first ones, of one category each or of any."""
    if size < 1:
        raise ValueError(f"groups must have at least 1 question, got {size}")
    groups: list[list[Question]] = []
    open_groups: dict[str, list[Question]] = {}
    for question in questions:
        kind = question.category if by_category else ""
        group = open_groups.get(kind)
        if group is None or len(group) == size:
            group = open_groups[kind] = []
            groups.append(group)
        group.append(question)
    return [tuple(group) for group in groups]
