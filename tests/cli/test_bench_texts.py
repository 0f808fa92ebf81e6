"""``specdec bench texts`` on a tiny model: the table, the document, the exit status, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import Invoke

from specdec.benchmarks import texts
from specdec.benchmarks.questions import SHIPPED

ARGUMENTS = ("--questions", str(SHIPPED), "--limit", "2", "-t", "8", "--device", "cpu")


def test_one_table_and_one_document(chat_folder: str, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "texts.json"
    result = invoke(
        "bench", "texts", "-m", chat_folder, "-q", "fp32", "-q", "int8+kv-int4", "-d", "ngram", "-d", "recycling", "-o",
        "ngram.depth=2", "--fixed-trees", "--batch-size", "1", "--batch-size", "2", *ARGUMENTS, "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [line["precision"] for line in document["precisions"]] == ["fp32", "int8, KV int4"]
    assert document["settings"]["drafters"] == ["ngram", "recycling", "ngram.depth=2"]
    rows = [line for line in result.stdout.splitlines() if line.startswith(("| fp32", "| int8, KV int4"))]
    assert [row.split("|")[2].strip() for row in rows] == ["plain", "ngram", "recycling"] * 2
    assert all(row.count("2 of 2") >= 1 for row in rows)
    assert "fp32, ngram, batch size 2: 2 of 2 equal" in result.stderr


def test_without_a_precision_it_is_dtypes_and_auto_is_the_models_own_drafter(chat_folder: str, invoke: Invoke) -> None:
    result = invoke("bench", "texts", "-m", chat_folder, "--dtype", "fp32", "--batch-size", "2", *ARGUMENTS)
    assert result.exit_code == 0, result.output
    assert "| fp32 | suffix | 2 of 2 |" in result.stdout


def test_a_text_that_differs_is_shown_and_fails(
    chat_folder: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = texts.compare

    def spoiled(target: Any, question_id: int, prompt: Any, plain: list[int], tokens: list[int], params: Any) -> Any:
        return compare(target, question_id, prompt, plain, [*tokens[:5], 0, *tokens[6:]], params)

    monkeypatch.setattr(texts, "compare", spoiled)
    out = tmp_path / "texts.json"
    result = invoke(
        "bench", "texts", "-m", chat_folder, "--dtype", "fp32", "-d", "none", "--batch-size", "1", "--batch-size", "2",
        *ARGUMENTS, "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 1
    assert "| fp32 | plain | compared with | 1.00 | 0 of 2 | 1.00 |" in result.stdout
    assert "drafter 'none', batch size 2: 2 of 2 texts are not plain decoding's" in result.stderr
    assert json.loads(out.read_text())["precisions"][0]["drafters"][0]["equal"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-q", "int7"), "unknown quantization 'int7'"),
        (("-q", "int8+kv-int5"), "of the KV cache 'int5'"),
        (("--dtype", "bf17"), "unknown dtype 'bf17'"),
        (("-d", "magic"), "unknown drafter 'magic'"),
        (("--batch-size", "2", "--batch-size", "2", "-d", "ngram"), "batch size 2 is there twice"),
        (("--limit", "2", "--batch-size", "4", "-d", "ngram"), "--batch-size 4: there are 2 texts in all"),
        (("--temperature", "-1", "-d", "ngram"), "temperature must be at least 0"),
        (("--resume",), "--resume needs --json"),
        (("--json", "/no such folder/out.json"), "there is no folder '/no such folder'"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    arguments: tuple[str, ...], message: str, invoke: Invoke
) -> None:
    result = invoke("bench", "texts", "-m", "no such model", "--questions", str(SHIPPED), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
