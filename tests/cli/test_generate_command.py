"""``specdec generate``: what it prints where, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import Invoke

from specdec import SpecDecoder, models
from specdec.models import LoadedModel

FAST = ("--drafter", "ngram", "-t", "24")


def test_the_text_goes_to_stdout_and_the_summary_to_stderr(invoke: Invoke, chat_folder: str) -> None:
    result = invoke("generate", "Hello", "-m", chat_folder, *FAST)
    assert result.exit_code == 0, result.stderr
    expected = SpecDecoder(chat_folder, "none").chat([{"role": "user", "content": "Hello"}], max_new_tokens=24).text
    assert result.stdout == expected + "\n"
    assert len(expected) == 24
    assert result.stderr.count("\n") == 1
    for part in ("24 tokens", "tok/s", "tau", "drafter ngram", "accepted"):
        assert part in result.stderr


def test_raw_completes_and_a_model_without_template_completes(
    invoke: Invoke, chat_folder: str, base_folder: str
) -> None:
    expected = SpecDecoder(base_folder, "none").generate("Hello", max_new_tokens=24).text + "\n"
    assert invoke("generate", "Hello", "-m", chat_folder, "--raw", *FAST).stdout == expected
    assert invoke("generate", "Hello", "-m", base_folder, *FAST).stdout == expected
    refused = invoke("generate", "Hello", "-m", base_folder, "--chat", *FAST)
    assert refused.exit_code == 2
    assert "no chat template" in refused.stderr


def test_json_is_one_document_and_nothing_else(invoke: Invoke, chat_folder: str) -> None:
    result = invoke("generate", "Hello", "-m", chat_folder, "--json", "--logprobs", *FAST)
    assert result.exit_code == 0
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert list(document) == [
        "model", "text", "token_ids", "finish_reason", "error", "prompt_len", "logprobs", "stats",
    ]  # fmt: skip
    assert document["finish_reason"] == "length"
    assert len(document["token_ids"]) == len(document["logprobs"]) == document["stats"]["emitted"] == 24
    assert document["stats"]["drafter"] == "ngram"


def test_several_completions(invoke: Invoke, chat_folder: str) -> None:
    arguments = ("generate", "Hello", "-m", chat_folder, "-n", "3", "--temperature", "1", "--seed", "5", *FAST)
    document = json.loads(invoke(*arguments, "--json").stdout)
    texts = [completion["text"] for completion in document["completions"]]
    assert len(set(texts)) == 3
    assert document["stats"]["emitted"] == sum(len(c["token_ids"]) for c in document["completions"])
    shown = invoke(*arguments).stdout
    assert all(f"[{index + 1}/3]\n" in shown for index in range(3))


def test_the_prompt_comes_from_stdin_or_a_file(invoke: Invoke, chat_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße", encoding="utf-8")
    expected = invoke("generate", "Grüße", "-m", chat_folder, *FAST).stdout
    assert invoke("generate", "-", "-m", chat_folder, *FAST, stdin="Grüße").stdout == expected
    assert invoke("generate", "--file", str(file), "-m", chat_folder, *FAST).stdout == expected


def test_a_system_message_changes_the_prompt(invoke: Invoke, chat_folder: str) -> None:
    document = json.loads(invoke("generate", "Hi", "-m", chat_folder, "--system", "Rhyme.", "--json", *FAST).stdout)
    assert document["prompt_len"] == len("Hi") + len("Rhyme.") + 5


def test_drafter_options_reach_the_drafter(invoke: Invoke, chat_folder: str) -> None:
    arguments = ("generate", "Hello", "-m", chat_folder, "-t", "60", "--json")
    with_depth = json.loads(invoke(*arguments, "-d", "ngram", "-o", "depth=1").stdout)
    assert len(with_depth["stats"]["acceptance_by_depth"]) <= 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["Hi", "-d", "ngrm"], ["unknown drafter 'ngrm'", "did you mean 'ngram'"]),
        (["Hi", "-d", "ngram", "-o", "dpth=3"], ["'dpth'", "did you mean 'depth'"]),
        (["Hi", "-d", "ngram", "-o", "depth=deep"], ["depth", "int", "'deep'"]),
        (["Hi", "-d", "ngram", "-o", "depth"], ["NAME=VALUE", "'depth'"]),
        (["Hi", "-d", "ngram", "-o", "depth=1", "-o", "depth=2"], ["given twice"]),
        (["Hi", "-d", "none", "--verifier", "gready"], ["unknown verifier 'gready'", "'greedy'"]),
        (["Hi", "--verifier", "greedy", "--temperature", "1"], ["temperature 0"]),
        (["Hi", "--temperature", "-1"], ["temperature", "-1"]),
        (["Hi", "--top-p", "0"], ["top_p must be in (0, 1]"]),
        (["Hi", "--top-p", "1.5"], ["top_p must be in (0, 1]"]),
        (["Hi", "-t", "0"], ["max_new_tokens", "at least 1"]),
        (["Hi", "--stop", ""], ["stop strings must not be empty"]),
        (["Hi", "--logprobs"], ["needs --json"]),
        (["Hi", "--raw", "--system", "x"], ["--system needs a chat"]),
        ([""], ["the prompt is empty"]),
        (["", "--raw"], ["the prompt is empty"]),
        (["x" * 17000], ["tokens, the model's context only 16384"]),
        ([], ["give one prompt"]),
        (["Hi", "--file", "x"], ["give one prompt"]),
        (["--file", "no-such-file"], ["cannot read 'no-such-file'"]),
        (["Hi", "--max-tokens", "3"], ["No such option"]),
    ],
)
def test_bad_input_is_one_clear_error(invoke: Invoke, chat_folder: str, arguments: list[str], parts: list[str]) -> None:
    result = invoke("generate", "-m", chat_folder, *arguments)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def test_a_drafters_weights_count_before_the_model_is_read(
    invoke: Invoke, chat_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter is others', and its file 64 MiB of nothing; the model is far smaller than the budget."""

    def fail(*_: object) -> None:
        raise AssertionError("weights were read")

    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**26)
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3}')
    monkeypatch.setattr(models, "_load", fail)
    options = ("-d", "medusa", "-o", f"weights={tmp_path}", "--memory-budget", "40MiB")
    result = invoke("generate", "Hello", "-m", chat_folder, *options)
    assert result.exit_code == 2
    assert "drafter 64 MiB" in result.stderr
    with pytest.raises(ValueError, match="drafter 64 MiB") as raised:
        SpecDecoder(chat_folder, "medusa", drafter_options={"weights": str(tmp_path)}, memory_budget="40MiB")
    assert str(raised.value) in result.stderr


def test_loading_can_say_what_takes_long(invoke: Invoke, chat_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listens: list[bool] = []
    load = models.load_model

    def loud(*arguments: Any, **options: Any) -> LoadedModel:
        listens.append(callable(options["progress"]))
        return load(*arguments, **options)

    monkeypatch.setattr(models, "load_model", loud)
    assert invoke("generate", "Hello", "-m", chat_folder, *FAST).exit_code == 0
    assert listens == [True]


def test_an_unknown_model_is_named_with_the_nearest_alias(invoke: Invoke) -> None:
    result = invoke("generate", "Hi", "-m", "smollm22")
    assert result.exit_code == 2
    assert "smollm22" in result.stderr
    assert "smollm2'" in result.stderr


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_bytes_that_are_not_utf8_are_named_by_offset(invoke: Invoke, tmp_path: Path, where: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9 au lait")
    result = (
        invoke("generate", "--file", str(file)) if where == "file" else invoke("generate", "-", stdin=file.read_bytes())
    )
    assert result.exit_code == 2
    assert "is not UTF-8: byte 0xe9 at offset 3" in result.stderr


def test_a_failing_target_keeps_the_text_and_exits_with_one(
    invoke: Invoke, chat_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdec.target import HFTarget

    forward, passes = HFTarget.forward, []

    def failing(self: HFTarget, *arguments: object) -> object:
        passes.append(1)
        output = forward(self, *arguments)  # type: ignore[arg-type]
        return output if len(passes) < 6 else type(output)(output.logits * float("nan"), output.features)

    monkeypatch.setattr(HFTarget, "forward", failing)
    result = invoke("generate", "Hello", "-m", chat_folder, "-d", "none", "-t", "24")
    assert result.exit_code == 1
    assert len(result.stdout) == 6  # five tokens and the line's end
    assert "NaN" in result.stderr


@pytest.mark.real_model
def test_the_default_model_answers(invoke: Invoke) -> None:
    result = invoke("generate", "What is the capital of France?", "-t", "24", "--json")
    assert result.exit_code == 0, result.stderr
    assert "Paris" in json.loads(result.stdout)["text"]
