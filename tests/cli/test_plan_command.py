"""``specdec plan`` says what a call will take, and loads nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_chat import Invoke

from specdec import models


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read."""

    def fail(*_: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "_load", fail)


def test_parts_and_what_fits_are_said(invoke: Invoke, chat_folder: str) -> None:
    result = invoke("plan", "-m", chat_folder, "--rows", "4", "--length", "40", "--memory-budget", "1GiB")
    assert result.exit_code == 0, result.output
    load, call, fits = result.stdout.splitlines()
    assert load.startswith("to load: weights ")
    assert call.startswith("to decode: weights ")
    assert all(f"{part} " in call for part in ("drafter", "kv", "logits", "masks", "activations"))
    assert call.endswith(" for 4 rows of 16 nodes")
    assert fits == "1 GiB may be used with drafter suffix: all of it fits"
    trained = invoke("plan", "-m", chat_folder, "-d", "suffix+eagle", "--memory-budget", "1GiB").stdout
    assert trained.endswith("all of it fits, but for the weights of eagle, which are not there\n")


def test_what_does_not_fit_shrinks_and_then_exits_with_the_numbers(invoke: Invoke, chat_folder: str) -> None:
    arguments = ("plan", "-m", chat_folder, "--rows", "4", "--length", "100", "-t", "20", "--memory-budget")
    document = json.loads(invoke(*arguments, "1GiB", "--json").stdout)
    whole = document["call"]
    assert (whole["rows"], document["budget"]) == (4, 2**30)
    assert document["load"]["held"] <= document["load"]["peak"]
    fewer = invoke(*arguments, str(whole["total"] - whole["kv"] // 2))
    assert "4 rows of 16 nodes do not fit at a time, this does" in fewer.stdout
    refused = invoke(*arguments, str(whole["weights"] + 1000))
    assert refused.exit_code == 2
    assert "are needed and" in refused.stderr
    assert "for 1 rows of 1 nodes" in refused.stderr
    assert "are needed to load the model" in invoke(*arguments, "1000").stderr


def test_a_drafter_and_a_quantized_cache_count(invoke: Invoke, chat_folder: str) -> None:
    def call(*options: str) -> dict[str, Any]:
        result = invoke("plan", "-m", chat_folder, "--length", "200", "--json", *options)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)["call"]
        return found

    assert call("-d", "none")["nodes"] == 1
    assert call("-d", "suffix", "-o", "max_nodes=5")["nodes"] == 5
    assert call("--kv", "int4")["kv"] != call()["kv"]


def test_what_cannot_be_planned_says_why(invoke: Invoke, chat_folder: str) -> None:
    for options, said in (
        (("--kv", "int5"), "unknown precision of the KV cache 'int5'"),
        (("-d", "sufix"), "did you mean 'suffix'"),
        (("--length", "100000"), "the prompt has 100000 tokens"),
        (("--memory-budget", "lots"), "a size is a number above 0"),
    ):
        result = invoke("plan", "-m", chat_folder, *options)
        assert result.exit_code == 2
        assert said in result.stderr
