"""Published tables come from the result files, and a hostile name stays text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specdec.benchmarks.tables import ROOT, fill, main, mt_bench_table, peers_table, quant_table

EXAMPLE = Path(__file__).with_name("example_result.json")
BLOCK = "<!-- results: mt-bench r.json -->\n<!-- /results -->\n"


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def peers(result: dict[str, Any]) -> dict[str, Any]:
    ran = {
        "name": "llamacpp-q4_1", "engine": "llama.cpp", "version": "0.3.36", "precision": "q4_1", "speculation": "none",
        "decode_tokens_per_s": 42.25, "end_to_end_tokens_per_s": 40.0, "prefill_tokens_per_s": 500.0, "tau": None,
        "equal_to_plain": 3, "num_runs": 4, "relative": {"median": 0.75, "low": 0.5, "high": 1.0}, "skipped": None,
        "equal_to_own_plain": 1, "own_plain_runs": 2, "unsettled_runs": 0, "disturbed_runs": 1, "failed": None,
        "notes": ["built without AMX"],
    }  # fmt: skip
    failing = ran | {"name": "openvino-int4", "num_runs": 2, "disturbed_runs": 0, "failed": "It died."}
    missing = dict.fromkeys(ran) | {
        "name": "vllm-bf16", "engine": "vllm", "precision": "bf16", "skipped": "Not installed: run `x | y`."
    }  # fmt: skip
    settings = result["settings"] | {"dtype": "bf16, fp32", "reference": "specdec-bf16-suffix"}
    return result | {"kind": "peers", "settings": settings, "summary": {"peers": [ran, failing, missing]}}


@pytest.fixture
def make_root(tmp_path: Path, result: dict[str, Any]) -> Callable[[str], Path]:
    """A folder with a README, a page of docs and the example as ``r.json``."""

    def make(readme: str) -> Path:
        (tmp_path / "docs").mkdir()
        (tmp_path / "benchmarks" / "results").mkdir(parents=True)
        (tmp_path / "benchmarks" / "results" / "r.json").write_text(json.dumps(result))
        (tmp_path / "README.md").write_text(readme)
        (tmp_path / "docs" / "page.md").write_text("No table.\n")
        return tmp_path

    return make


def cells(line: str) -> list[str]:
    """The cells of a table's line as a Markdown reader splits them: at bars without an odd number of backslashes."""
    found, escaped = [""], False
    for char in line:
        if char == "|" and not escaped:
            found.append("")
        else:
            found[-1] += char
        escaped = char == "\\" and not escaped
    return [cell.strip() for cell in found[1:-1]]


def test_mt_bench_table_has_the_figures_and_their_origin(result: dict[str, Any]) -> None:
    assert mt_bench_table(result) == (
        "| drafter | tok/s | speed-up [95 %] | tau | texts equal to plain |\n"
        "|---|---|---|---|---|\n"
        "| none | 10.0 |  | 1.00 |  |\n"
        "| alpha | 15.0 | 1.50 [1.25, 2.00] | 1.75 | 3 of 4 |\n"
        "| beta | 9.0 | 0.90 [0.80, 1.00] | 1.20 | 2 of 3 compared |\n"
        "\n"
        "No category is slower than 0.97 times plain decoding.\n"
        "\n"
        "example/made-by-hand, bfloat16, 8 new tokens, 4 questions of example-for-tests (sha256 001122334455), Example "
        "CPU, made by hand for tests, nothing was measured, 2 thread(s), 2000-01-02, commit 0123456789ab: "
        "`specdec bench mt-bench --model example/made-by-hand --drafter 'one two'`\n"
    )


def test_slow_categories_are_said(result: dict[str, Any]) -> None:
    below = [["beta", "math", 0.8], ["be|ta", "co*de", 0.7], ["beta", "coding", 0.75]]
    floor = {"required": 0.97, "below": [[*names, {"median": each, "low": 0.1, "high": 1.2}] for *names, each in below]}
    result["summary"]["floor"] = floor
    assert (
        "\n\nCategories slower than 0.97 times plain decoding, the slowest named: beta in 2 (coding 0.75), "
        "be\\|ta in 1 (co\\*de 0.70).\n\n"
    ) in mt_bench_table(result)
    del result["summary"]["floor"]
    assert "slower" not in mt_bench_table(result)


def test_what_changes_the_figures_is_said(result: dict[str, Any]) -> None:
    result["settings"] |= {"turns": 2, "temperature": 0.7, "batch_size": 4}
    result["machine"] |= {"gpu": "Example GPU", "load_at_start": 1.5}
    result["commit"] += "-dirty"
    origin = mt_bench_table(result).splitlines()[-1]
    for fact in (
        "both turns",
        "temperature 0.7",
        "batches of 4",
        "Example GPU",
        "busy: load 1.5",
        "0123456789ab-dirty",
    ):
        assert fact in origin


def test_peers_table_always_names_the_precision(peers: dict[str, Any]) -> None:
    lines = peers_table(peers).splitlines()
    rows = [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:5]]
    assert [row["precision"] for row in rows] == ["q4_1", "q4_1", "bf16"]
    assert rows[0]["tok/s"] == "42.2"
    assert rows[0]["tau"] == ""
    assert rows[0]["texts equal to specdec's plain"] == "3 of 4"
    assert rows[0]["texts equal to its own plain"] == "1 of 2"
    assert rows[0]["specdec-bf16-suffix's speed over it [95 %]"] == "0.75 [0.50, 1.00]"
    assert rows[2]["tok/s"] == "did not run"
    assert "specdec in bf16, fp32, 8 new tokens" in lines[-1]
    assert "2000-01-02, commit 0123456789ab" in lines[-1]


def test_peers_table_says_what_must_be_known_of_its_rows(peers: dict[str, Any]) -> None:
    assert [line for line in peers_table(peers).splitlines() if line.startswith("- ")] == [
        "- llamacpp-q4_1, openvino-int4: built without AMX",
        "- openvino-int4: left out after 2 of 4 questions: It died.",
        r"- vllm-bf16: Not installed: run \`x \| y\`.",
        "- answers that shared the machine with something else that computed: llamacpp-q4_1 (1 of 4)",
    ]
    peers["summary"]["peers"][1]["disturbed_runs"], peers["summary"]["peers"][0]["disturbed_runs"] = 2, 4
    assert "- answers that shared the machine with something else that computed: all\n" in peers_table(peers)


def test_quant_table_counts_equal_texts_and_says_what_perplexity_is_over(result: dict[str, Any]) -> None:
    figures = {"tokens_per_s": 20.0, "speedup": 1.0, "tau": 1.0, "differing": 0}
    line = {
        "precision": "int8", "perplexity": 9.5, "perplexity_change": 0.25, "top_agreement": 0.5, "text_agreement": 0.75,
        "weight_bytes": 2e6, "kv_bytes": 1e6, "drafters": {"none": figures, "alpha": figures | {"differing": 1}},
    }  # fmt: skip
    lines = quant_table(result | {"precisions": [line]}).splitlines()
    assert cells(lines[0])[-1] == "texts equal to plain"
    assert [cells(row)[-1] for row in lines[2:4]] == ["", "3 of 4"]
    assert "perplexity" not in lines[-1]
    lines = quant_table(result | {"precisions": [line | {"scored_tokens": 162}]}).splitlines()
    assert "perplexity and same token over 162 tokens" in lines[-1]


def test_hostile_text_breaks_neither_table_nor_block(result: dict[str, Any], tmp_path: Path) -> None:
    hostile = "a|b`c\n<!-- /results -->\n| x | \\| *d* [e](f) <img> _g_"
    figures = result["summary"]["overall"]
    figures[hostile] = figures.pop("alpha")
    result["settings"]["model"] = result["machine"]["cpu"] = result["questions"]["name"] = hostile
    result["date"], result["command"] = "2000|`\n-1", ["specdec", "``", hostile]
    (tmp_path / "r.json").write_text(json.dumps(result))
    text = fill(BLOCK, tmp_path)
    lines = text.splitlines()
    assert fill(text, tmp_path) == text
    assert len(lines) == 1 + 5 + 4 + 1
    assert {len(cells(line)) for line in lines[1:6]} == {5}
    plain = r"a\|b\`c \<!-- /results --\> \| x \| \\\| \*d\* \[e\](f) \<img\> \_g\_"
    assert cells(lines[5])[0] == plain
    prose, _, command = lines[9].partition(": ```")
    assert prose.count(plain) == 3
    assert command == "specdec '``' 'a|b`c <!-- /results --> | x | \\| *d* [e](f) <img> _g_'```"


def test_only_the_block_is_rewritten(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result))
    text = fill("a\n<!-- results: mt-bench r.json -->\nold\n<!-- /results -->\nb", tmp_path)
    assert text == f"a\n<!-- results: mt-bench r.json -->\n{mt_bench_table(result)}<!-- /results -->\nb"


def test_a_block_in_fenced_code_is_text(tmp_path: Path) -> None:
    text = "````\n```\n<!-- results: KIND FILE.json -->\n````\n~~~ md\n<!-- /results -->\n~~~\n`<!-- results: x -->`\n"
    assert fill(text, tmp_path) == text


def test_a_block_after_fenced_code_is_filled(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result))
    assert "| alpha |" in fill("```\ncode\n```\n" + BLOCK, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n<!-- results: mt-bench gone.json -->\n<!-- /results -->", r"line 2: no file 'gone\.json' in .*r\.json"),
        ("<!-- results: mt-bench ../r.json -->\n<!-- /results -->", r"line 1: no file '\.\./r\.json'"),
        (
            "<!-- results: magic r.json -->\n<!-- /results -->",
            "line 1: unknown kind of results 'magic', .*mt-bench, peers",
        ),
        ("<!-- results: r.json -->\n<!-- /results -->", "line 1: .*names a kind and a file, got 'r.json'"),
        (
            "<!-- results: peers r.json -->\n<!-- /results -->",
            r"r\.json cannot be read: holds 'mt-bench' .* not 'peers'",
        ),
        ("<!-- results: mt-bench broken.json -->\n<!-- /results -->", r"broken\.json cannot be read"),
        ("<!-- results: mt-bench empty.json -->\n<!-- /results -->", r"empty\.json has no 'summary'"),
        ("a\n" + BLOCK.splitlines()[0] + "\n" + BLOCK, "line 2: the results block is not closed before line 3"),
        (BLOCK.splitlines()[0], "line 1: the results block is not closed"),
        ("a\n<!-- /results -->\n", "line 2: closes a results block that was not opened"),
    ],
)
def test_a_block_that_cannot_be_filled_is_named(
    text: str, message: str, result: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"schema": 1, "kind": "mt-bench"}')
    with pytest.raises(ValueError, match=message):
        fill(text, tmp_path)


def test_check_fails_with_a_diff_and_writes_nothing(
    make_root: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root(BLOCK)
    assert main(["--check"], root) == 1
    assert "+| alpha | 15.0 |" in capsys.readouterr().out
    assert (root / "README.md").read_text() == BLOCK


def test_rewriting_makes_the_check_pass_until_a_figure_is_edited(make_root: Callable[[str], Path]) -> None:
    root = make_root(BLOCK)
    page = root / "docs" / "page.md"
    page.write_text(BLOCK)
    assert main([], root) == 0
    assert page.read_text() == (root / "README.md").read_text() != BLOCK
    assert main(["--check"], root) == 0
    page.write_text(page.read_text().replace("1.50", "1.60"))
    assert main(["--check"], root) == 1


def test_nothing_is_written_when_any_block_cannot_be_filled(
    make_root: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_root(BLOCK)
    (root / "docs" / "page.md").write_text("<!-- results: magic r.json -->\n<!-- /results -->\n")
    assert main([], root) == 2
    assert "docs/page.md: line 1: unknown kind of results 'magic'" in capsys.readouterr().err
    assert (root / "README.md").read_text() == BLOCK


def test_this_repository_agrees_with_its_results() -> None:
    command = [sys.executable, "-m", "specdec.benchmarks.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
