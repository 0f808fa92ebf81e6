"""``specdec bench quant`` on a tiny model: one table, one document, and what cannot be asked."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny_chat import Invoke

from specdec.benchmarks.quant import run_quant
from specdec.benchmarks.questions import SHIPPED, load_questions
from specdec.benchmarks.tables import fill
from specdec.models import load_model
from specdec.target import HFTarget


def test_one_table_and_one_document(chat_folder: str, invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "quant.json"
    result = invoke(
        "bench", "quant", "-m", chat_folder, "--dtype", "fp32", "-q", "int8", "-q", "int4", "-q",
        "int8+kv-int4", "-d", "ngram", "--kv", "int4", "--limit", "2", "-t", "8", "--device", "cpu", "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert [line["precision"] for line in document["precisions"]] == [
        "fp32", "int8", "int4", "int8, KV int4", "fp32, KV int4",
    ]  # fmt: skip
    dense, int8, int4, both, kv = document["precisions"]
    assert (dense["perplexity_change"], dense["top_agreement"], dense["text_agreement"]) == (0, 1, 1)
    assert int8["top_agreement"] > int4["top_agreement"]
    assert dense["weight_bytes"] > int8["weight_bytes"] > int4["weight_bytes"]
    assert kv["weight_bytes"] == dense["weight_bytes"]
    assert kv["kv_bytes"] < 0.5 * dense["kv_bytes"]
    assert (both["weight_bytes"], both["kv_bytes"]) == (int8["weight_bytes"], kv["kv_bytes"])
    assert len({line["perplexity"] for line in document["precisions"]}) == 5
    assert len({line["scored_tokens"] for line in document["precisions"]}) == 1
    assert {*int8["drafters"]} == {"none", "ngram"}
    assert int8["drafters"]["none"]["tau"] == 1
    for line in document["precisions"]:
        row = next(row for row in result.stdout.splitlines() if row.startswith(f"| {line['precision']} "))
        assert f"{line['perplexity']:.3f}" in row
        assert "| plain |" in row
        assert row.endswith("|  |")  # nothing to compare it with
    drafted = [row for row in result.stdout.splitlines() if "| ngram |" in row]
    assert [row.split("|")[-2].strip() for row in drafted] == ["2 of 2"] * 5
    assert result.stdout.splitlines()[-1] == f"perplexity and same token over {dense['scored_tokens']} tokens"
    published = fill("<!-- results: quant quant.json -->\n<!-- /results -->\n", tmp_path)
    for line in result.stdout.splitlines()[2:]:
        assert line.replace(" ", "") in published.replace(" ", "").replace("\\", "")
    assert "2 questions of" in published


def test_perplexity_is_that_of_the_model_itself(chat_folder: str) -> None:
    questions = load_questions(SHIPPED).limit(1).questions
    loaded = load_model(chat_folder, device="cpu")
    line = run_quant(lambda _: (HFTarget(loaded.model), loaded.tokenizer), ["fp32"], [], questions, 1)[0]
    chat = [{"role": "user", "content": questions[0].turns[0]}]
    ids = loaded.tokenizer.apply_chat_template(  # type: ignore[union-attr]
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids[:, :512]
    with torch.no_grad():
        loss = float(loaded.model(ids, labels=ids).loss)
    assert line.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert line.scored_tokens == ids.shape[1] - 1


def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    result = invoke("bench", "quant", "-m", "no such model", "-q", "nf4")
    assert result.exit_code == 2
    assert "bitsandbytes is needed" in result.stderr
    result = invoke("bench", "quant", "-m", "no such model", "-q", "int7")
    assert result.exit_code == 2
    assert "unknown quantization 'int7'" in result.stderr
    for name, message in (("int8+kv-int5", "of the KV cache 'int5'"), ("int8+int4", "quantization 'int8+int4'")):
        result = invoke("bench", "quant", "-m", "no such model", "-q", name)
        assert result.exit_code == 2
        assert message in result.stderr
    result = invoke("bench", "quant", "-m", "no such model", "--json", str(tmp_path / "missing" / "out.json"))
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr
