"""Published tables come from the result files, and a hostile name stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.benchmarks.report import write_html
from specdec.benchmarks.tables import fill, main

FIGURES = {"decode_tokens_per_s": 20.0, "speedup": None, "tau": 1.0, "equal_runs": 2, "num_runs": 2}
RESULT: dict[str, Any] = {
    "date": "2026-01-02T03:04:05Z",
    "command": ["specdec", "bench", "<b>|`"],
    "commit": "abc",
    "machine": {"cpu": "C|PU", "threads": 2},
    "settings": {"model": "<script>", "dtype": "bf16", "max_new_tokens": 8},
    "questions": {"name": "mine", "sha256": "f" * 64, "count": 2},
    "summary": {
        "overall": {
            "none": FIGURES,
            "<img>": {**FIGURES, "speedup": {"median": 1.5, "low": 1.25, "high": 2.0}, "tau": 1.75},
        },
        "categories": {"<i>": {"none": FIGURES}},
    },
}


def test_a_block_is_filled_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULT))
    text = fill("a\n<!-- results: mt-bench r.json -->\nold\n<!-- /results -->\nb\n", tmp_path)
    assert "| 20.0 | 1.50 [1.25, 2.00] | 1.75 | 2 of 2 |" in text
    assert "C\\|PU" in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("<!-- /results -->\nb\n")
    assert fill(text, tmp_path) == text


def test_an_unknown_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mt-bench gone\.json"):
        fill("<!-- results: mt-bench gone.json -->\n<!-- /results -->", tmp_path)


def test_readme_agrees_with_the_results() -> None:
    assert main(["--check"]) == 0


def test_the_page_escapes_what_users_named(tmp_path: Path) -> None:
    write_html(RESULT, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in page
    assert "&lt;img&gt;" in page
    assert not any(tag in page for tag in ("<script", "<img", "<i>", "<b>"))
    assert "1.50 [1.25, 2.00]" in page
