"""Texts of drafters and batches are held against plain decoding's alone, and what differs is found and named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec import SamplingParams, SpecDecoder
from specdec.benchmarks import texts
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.settings import DrafterSpec
from specdec.benchmarks.tables import fill, texts_table
from specdec.benchmarks.texts import TextSettings, broken, run_texts
from specdec.result import GenerationResult
from specdec.target import HFTarget

QUESTIONS = QuestionSet(
    "three",
    "/home/somebody/three.jsonl",
    "ab" * 32,
    tuple(Question(number, "math", ("abcabcabc" * number, "And then?")) for number in (1, 2, 3)),
)
SETTINGS = TextSettings("tiny", ("fp32",), ("ngram",), (1, 2), max_new_tokens=12, adaptive=False)
SPECS = (DrafterSpec("ngram", "ngram", {"depth": 3}), DrafterSpec("recycling", "again"))


@pytest.fixture
def load(target: HFTarget, tokenizer: Any) -> texts.Load:
    return lambda precision: (target, tokenizer, SPECS)


def run(load: texts.Load, settings: TextSettings = SETTINGS, **more: Any) -> dict[str, Any]:
    return run_texts(load, settings, QUESTIONS, **more)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, temperature=0.9, seed=5), replace(SETTINGS, turns=2)])
def test_every_drafter_and_batch_is_compared(load: texts.Load, settings: TextSettings) -> None:
    line = run(load, settings)["precisions"][0]
    count = 3 * settings.turns
    assert (line["precision"], line["invariant"], line["num_texts"]) == ("fp32", False, count)
    assert line["num_tokens"] == 12 * count
    rows = {(row["drafter"], row["batch_size"]): row for row in line["drafters"]}
    assert [*rows] == [("none", 2), ("ngram", 1), ("ngram", 2), ("again", 1), ("again", 2)]
    assert all(row["equal"] == count and row["first"] is None for row in rows.values())
    assert rows["none", 2]["tau"] == 1
    assert max(row["tau"] for row in rows.values()) > 1


def test_what_they_are_compared_with_is_plain_decoding_alone(
    load: texts.Load, target: HFTarget, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "_compare_with", lambda *_: pytest.fail("as if interrupted"))
    with pytest.raises(pytest.fail.Exception):
        run(load, replace(SETTINGS, turns=2), out=tmp_path / "out.json")
    entry = json.loads((tmp_path / "out.json.partial.jsonl").read_text().splitlines()[1])
    decoder, params = SpecDecoder(target, "none", tokenizer=tokenizer), SamplingParams(max_new_tokens=12)
    first, second = entry["texts"][:2]
    answer = decoder.generate("abcabcabc\n", params)
    assert (first["question_id"], first["turn"], first["tokens"]) == (1, 1, answer.token_ids)
    assert second["tokens"] == decoder.generate(f"abcabcabc\n{answer.text}\nAnd then?\n", params).token_ids


def spoil(monkeypatch: pytest.MonkeyPatch, drafter: str, rows: int, index: int, position: int) -> None:
    """Have a drafter's calls of so many rows change a token of one of them."""
    generate = texts._generate

    def spoiled(decoder: SpecDecoder, prompts: list[list[int]], params: SamplingParams) -> list[GenerationResult]:
        results = generate(decoder, prompts, params)
        if (decoder.drafter.name, len(prompts)) == (drafter, rows):
            tokens = results[index].token_ids
            tokens[position] = (tokens[position] + 1) % 256
        return results

    monkeypatch.setattr(texts, "_generate", spoiled)


def test_a_text_that_differs_is_named(load: texts.Load, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "ngram", 2, 1, 7)
    result = run(load)
    assert broken(result) == [
        "fp32, drafter 'ngram', batch size 2: 1 of 3 texts are not plain decoding's, first question 2, turn 1, new "
        "token 7"
    ]
    lines = texts_table(result).splitlines()
    assert lines[0] == (
        "| precision | drafter | texts equal, alone | tau | texts equal, 2 at a time | tau | first text that differs |"
    )
    assert lines[2].startswith("| fp32 | plain | compared with | 1.00 | 3 of 3 | 1.00 |")
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert (cells[3], cells[5], cells[7]) == ("3 of 3", "2 of 3", "question 2, turn 1, token 7, 2 at a time")


def test_what_rounding_explains_is_allowed_only_where_rows_depend_on_each_other(
    load: texts.Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "ngram", 1, 0, 3)
    compare = texts.compare
    monkeypatch.setattr(
        texts, "compare", lambda *given: None if (found := compare(*given)) is None else replace(found, rounding=True)
    )
    result = run(load, replace(SETTINGS, batch_sizes=(1,)))
    assert broken(result) == []
    table = texts_table(result)
    assert "| 0 of 3, 3 by rounding |" in table
    assert "Rounding may decide near-ties otherwise in fp32." in table
    result["precisions"][0]["invariant"] = True
    assert "3 of 3 texts are not plain decoding's, first question 1" in broken(result)[0]
    assert "near-ties" not in texts_table(result)


def test_an_interrupted_run_goes_on_where_it_was(
    load: texts.Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    said: list[str] = []

    def break_off(message: str) -> None:
        said.append(message)
        if "ngram, batch size 2" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load, out=out, say=break_off)
    with pytest.raises(ValueError, match="holds an interrupted run"):
        run(load, out=out)
    with pytest.raises(ValueError, match=r"settings\.seed: 0 before, 1 now"):
        run(load, replace(SETTINGS, seed=1), out=out, resume=True)
    with pytest.raises(ValueError, match=r"settings\.weights: 'bf16' before, 'fp32' now"):
        run(load, replace(SETTINGS, weights="fp32"), out=out, resume=True)
    ran: list[tuple[str, int]] = []
    compare_with = texts._compare_with

    def recording(
        written: Sequence[texts.Text], target: HFTarget, tokenizer: Any, spec: Any, size: int, *more: Any
    ) -> Any:
        ran.append((spec.label, size))
        return compare_with(written, target, tokenizer, spec, size, *more)

    monkeypatch.setattr(texts, "_compare_with", recording)
    resumed = run(load, out=out, resume=True)
    assert ran == [("again", 1), ("again", 2)]
    assert resumed["precisions"] == run(load)["precisions"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_file_fills_a_table_and_says_nothing_of_where_files_lie(load: texts.Load, tmp_path: Path) -> None:
    result = run(load, out=tmp_path / "r.json", command=["specdec", "bench", "texts"])
    written = (tmp_path / "r.json").read_text()
    assert "somebody" not in written
    text = fill("<!-- results: texts r.json -->\n<!-- /results -->\n", tmp_path)
    assert texts_table(json.loads(written)) in text
    assert "| fp32 | again | 3 of 3 |" in text
    assert "tiny, fp32, 12 new tokens, 3 questions of three" in text
    assert result["machine"]["load_at_start"] is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"turns": 3}, "turns must be 1 or 2, got 3"),
        ({"precisions": ()}, "at least one precision is needed, got none"),
        ({"batch_sizes": (4, 1, 4)}, "batch size 4 is there twice"),
        ({"batch_sizes": (0,)}, "batch sizes must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changed)


def test_where_a_drafter_fails_is_said(load: texts.Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("broken")

    monkeypatch.setattr("specdec.drafters.ngram.NgramDrafter.propose", fail)
    with pytest.raises(RuntimeError, match=r"drafter 'ngram', batch size 1, from question 1 on: .*broken"):
        run(load)
