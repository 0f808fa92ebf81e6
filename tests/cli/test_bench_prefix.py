"""``specdec bench prefix`` on a tiny model: what is counted is what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import Invoke

from specdec.benchmarks.prefix import PrefixSizes, make_prompts, run_prefix
from specdec.benchmarks.questions import SHIPPED, load_questions
from specdec.benchmarks.tables import fill
from specdec.models import load_model
from specdec.prefix import common_prefix
from specdec.target import HFTarget

SIZES = PrefixSizes(rows=4, prefix=96, suffix=5, new_tokens=7)


@pytest.fixture(scope="module")
def loaded(chat_folder: str) -> Any:
    return load_model(chat_folder, dtype="fp32", device="cpu")


def test_a_document_and_its_table(chat_folder: str, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "prefix.json"
    result = invoke(
        "bench", "prefix", "-m", chat_folder, "--dtype", "fp32", "-d", "none", "-d", "ngram", "--rows", "4",
        "--prefix", "96", "--suffix", "5", "-t", "7", "--repeat", "2", "--device", "cpu", "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [line["drafter"] for line in document["drafters"]] == ["none", "ngram"]
    for line in document["drafters"]:
        assert len(line["shared_s"]) == len(line["unshared_s"]) == 2
        assert line["equal_rows"] + line["rounding_rows"] == 4
        assert line["shared_bytes"] < line["unshared_bytes"]
    block = fill("<!-- results: prefix prefix.json -->\n<!-- /results -->\n", tmp_path)
    assert result.stdout.strip() in block
    assert "| plain |" in block
    assert "batches of 4" in block


def test_prompts_share_the_prefix_and_no_more_than_suffixes_do(loaded: Any) -> None:
    prompts = make_prompts(SIZES, load_questions(SHIPPED), loaded.tokenizer, loaded.model.config.vocab_size)
    assert {len(prompt) for prompt in prompts} == {96 + 5}
    assert all(common_prefix(prompts[0], prompt) >= 96 for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)


def test_bytes_are_those_of_the_caches(loaded: Any) -> None:
    """Plain decoding holds one prefix, and of each row what comes behind it and a slot for its last token."""
    target = HFTarget(loaded.model)
    prompts = [[*range(3, 99), 200 + row, 1, 2, 3, 4] for row in range(4)]
    line = run_prefix(target, loaded.tokenizer, ["none"], prompts, SIZES, 1)[0]
    config = loaded.model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    token = 2 * config.num_hidden_layers * width * 4
    assert line.least_bytes == token * (96 + 4 * (5 + 7))
    assert line.shared_bytes == token * (96 + 4 * (5 + 7 + 1))
    assert line.unshared_bytes == token * 4 * (96 + 5 + 7 + 1)
    assert "new_cache" not in vars(target)


def test_what_cannot_be_served_is_said_before_anything_is_loaded(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("bench", "prefix", "-m", "no such model", "-d", "ngrams")
    assert result.exit_code == 2
    assert "ngrams" in result.stderr
    result = invoke("bench", "prefix", "-m", "no such model", "--json", str(tmp_path / "missing" / "out.json"))
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr
    with pytest.raises(ValueError, match="rows must be at least 2, got 1"):
        PrefixSizes(rows=1)
