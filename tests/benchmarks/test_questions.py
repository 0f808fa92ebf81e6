"""Question files: what is read, what is refused and where, and which part is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from specdec.benchmarks import questions as module
from specdec.benchmarks.questions import Question, QuestionSet, group_questions, load_questions, parse_questions

GOOD = '{"question_id": 1, "category": "math", "turns": ["a", "b"]}'


def entry(**fields: object) -> str:
    return json.dumps({"question_id": 2, "category": "math", "turns": ["a"]} | fields)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "an object is needed, got list"),
        ('{"category": "math", "turns": ["a"]}', "'question_id' is missing"),
        ('{"question_id": 2, "turns": ["a"]}', "'category' is missing"),
        ('{"question_id": 2, "category": "math"}', "'turns' is missing"),
        (entry(question_id="2"), "'question_id' must be an integer, got '2'"),
        (entry(question_id=True), "'question_id' must be an integer"),
        (entry(question_id=1), "question_id 1 is that of line 1"),
        (entry(category=" "), "'category' must be a text"),
        (entry(turns=[]), "'turns' must be a list of one or more texts"),
        (entry(turns="a"), "'turns' must be a list"),
        (entry(turns=["a", 3]), "turn 2 must be a text that is not blank, got 3"),
        (entry(turns=["a", " "]), "turn 2 must be a text that is not blank"),
    ],
)
def test_malformed_line_is_named_by_number_and_reason(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^file, line 3: ") as error:
        parse_questions(f"{GOOD}\n\n{line}\n".encode(), "file")
    assert reason in str(error.value)


def test_bytes_that_are_not_utf8_are_named_by_line() -> None:
    with pytest.raises(ValueError, match="file, line 2: not UTF-8 at byte 1"):
        parse_questions(GOOD.encode() + b"\n{\xff}\n", "file")


def test_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="file holds no questions"):
        parse_questions(b"\n\n", "file")


def test_file_is_read_with_its_hash_and_fields_of_other_benchmarks_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "spec_bench.jsonl"
    path.write_text("\ufeff" + GOOD + "\r\n" + entry(reference=["x"]), encoding="utf-8")
    found = load_questions(path)
    assert found.questions == (Question(1, "math", ("a", "b")), Question(2, "math", ("a",)))
    assert found.to_json() == {
        "name": "spec_bench",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "count": 2,
        "source": str(path),
    }


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read questions from .*nowhere"):
        load_questions(tmp_path / "nowhere.jsonl")


def test_without_a_hub_the_shipped_set_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hub_copy", lambda: None)
    found = load_questions()
    assert (found.source, found.name, len(found.questions)) == ("shipped", "specdec-questions", 80)
    assert load_questions(module.SHIPPED).source == "shipped"  # a result names no folder of the machine it is from
    assert all(len(question.turns) == 2 for question in found.questions)


def test_the_hubs_copy_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "question.jsonl"
    path.write_text(GOOD)
    monkeypatch.setattr(module, "_hub_copy", lambda: path)
    assert load_questions().source == "hub:lmsys/mt-bench"


def test_limit_spreads_over_categories_and_keeps_the_order() -> None:
    categories = ["a", "a", "a", "b", "b", "c"]
    found = QuestionSet("s", "f", "h", tuple(Question(i, c, ("t",)) for i, c in enumerate(categories)))
    assert [[q.question_id for q in found.limit(n).questions] for n in (1, 3, 4, 5, 99)] == [
        [0], [0, 3, 5], [0, 1, 3, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="got a limit of 0"):
        found.limit(0)


@pytest.mark.parametrize(("by_category", "expected"), [(True, [[0, 2], [1, 3], [4]]), (False, [[0, 1], [2, 3], [4]])])
def test_groups_mix_categories_only_where_they_may(by_category: bool, expected: list[list[int]]) -> None:
    found = [Question(i, c, ("t",)) for i, c in enumerate("ababa")]
    groups = group_questions(found, 2, by_category)
    assert [[q.question_id for q in group] for group in groups] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question_id": 1, "category": "\\ud800", "turns": ["a"]}', "line 1: a lone surrogate"),
        (b'{"question_id": 1, "category": "c", "turns": ["a \\udfff"]}', "line 1: a lone surrogate"),
        (b"[" * 100_000, "line 1: nested too deeply"),
    ],
)
def test_what_no_result_could_hold_is_named_before_anything_runs(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=message):
        load_questions(path)


def test_the_hostile_set_is_shipped_and_a_file_of_its_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_questions("hostile")
    assert (found.name, found.source) == ("specdec-hostile", "shipped")
    assert {q.category for q in found.questions} == {"random-words", "base64", "hex", "bytes"}
    assert len({turn for q in found.questions for turn in q.turns}) == 32
    Path("hostile").write_text(GOOD)
    assert load_questions("hostile").questions[0].category == "math"
