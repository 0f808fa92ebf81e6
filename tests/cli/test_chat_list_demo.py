"""``specdec chat``, ``list`` and ``demo``."""

from __future__ import annotations

import json
import re

import pytest
from tiny_chat import Invoke

from specdec import SpecDecoder
from specdec.cli import main
from specdec.cli.console import TextPrinter, escape_controls
from specdec.cli.demo import TimedRun, verdict
from specdec.result import GenerationResult
from specdec.stats import DecodeStats


def test_chat_answers_every_line_of_piped_input(invoke: Invoke, chat_folder: str) -> None:
    result = invoke(
        "chat", "-m", chat_folder, "-d", "ngram", "-t", "16", stdin="One\n\n/stats\n/reset\nOne\n/exit\nTwo\n"
    )
    assert result.exit_code == 0, result.stderr
    expected = SpecDecoder(chat_folder, "none").chat([{"role": "user", "content": "One"}], max_new_tokens=16).text
    assert result.stdout == f"{expected}\n{expected}\n"
    assert "16 tokens" in result.stderr


def test_chat_remembers_earlier_turns(invoke: Invoke, chat_folder: str) -> None:
    result = invoke("chat", "-m", chat_folder, "-d", "ngram", "-t", "16", stdin="One\nOne")
    first, second = result.stdout.splitlines()
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "One"},
    ]
    assert second == SpecDecoder(chat_folder, "none").chat(messages, max_new_tokens=16).text


def test_chat_goes_on_after_a_message_that_cannot_be_served(invoke: Invoke, chat_folder: str) -> None:
    lines = "/rset\n" + "x" * 17000 + "\nOne\n"
    result = invoke("chat", "-m", chat_folder, "-d", "none", "-t", "4", stdin=lines)
    assert result.exit_code == 0
    assert "did you mean '/reset'" in result.stderr
    assert "context" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_chat_refuses_a_model_without_template(invoke: Invoke, base_folder: str) -> None:
    result = invoke("chat", "-m", base_folder, stdin="One\n")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


def test_list_shows_every_drafter_option_verifier_and_alias(invoke: Invoke) -> None:
    shown = invoke("list").stdout
    document = json.loads(invoke("list", "--json").stdout)
    assert {"none", "ngram", "suffix", "recycling", "model"} <= set(document["drafters"])
    assert document["auto_drafter"] in document["drafters"]
    depth = document["drafters"]["ngram"]["options"]["depth"]
    assert depth == {"type": "int", "default": 8, "help": "tokens proposed per continuation."}
    assert document["verifiers"]["typical"]["lossless"] is False
    assert document["verifiers"]["rejection"]["lossless"] is True
    assert "smollm2" in document["models"]
    for about in document["drafters"].values():
        assert about["summary"]
        assert all(f"{name}={option['default']}" in shown for name, option in about["options"].items())
        assert all(option["help"] for option in about["options"].values())


def test_list_survives_a_plugin_that_cannot_be_imported(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("specdec.registry").registry._BUILT_IN["specdec.drafters"], "ghost", "no_such:Thing")
    result = invoke("list")
    assert result.exit_code == 0
    assert "cannot be imported: ModuleNotFoundError" in result.stdout


def test_demo_ends_in_one_line_of_numbers(invoke: Invoke, chat_folder: str) -> None:
    result = invoke("demo", "-m", chat_folder, "-t", "32", "--repeats", "2")
    assert result.exit_code == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"32 tokens, {number} tok/s with drafter \w+, {number} without, ratio {number}( \(slower\))?, "
        rf"tau {number} \(tokens per target pass\), texts equal",
        last,
    )


def test_demo_gives_every_timed_run_a_new_drafter(
    invoke: Invoke, chat_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdec import decoder, registry

    made: list[object] = []
    create = registry.create_drafter
    for place in (registry, decoder):
        monkeypatch.setattr(place, "create_drafter", lambda *a: made.append(d := create(*a)) or d)
    invoke("demo", "-m", chat_folder, "-d", "suffix", "-t", "8", "--repeats", "2")
    assert len({id(drafter) for drafter in made}) == len(made) == 6  # shown, plain warm-up, two of each


def run_of(tokens: list[int], seconds: float) -> TimedRun:
    stats = DecodeStats(passes=2, emitted=len(tokens), drafter="ngram")
    return TimedRun(GenerationResult("", tokens, "length", stats), seconds)


def test_demo_says_when_speculation_is_slower_and_when_texts_differ() -> None:
    slower = verdict([run_of([1, 2], 4.0)] * 3, [run_of([1, 2], 2.0)] * 3)
    assert "ratio 0.50 (slower)" in slower
    assert "texts equal" in slower
    assert "texts DIFFER" in verdict([run_of([1, 2], 1.0)], [run_of([1, 3], 1.0)])


def test_control_characters_cannot_steer_a_terminal() -> None:
    assert escape_controls("a\x1b[31mb\r\x9b\x7f\n\tö") == "a\\x1b[31mb\\x0d\\x9b\\x7f\n\tö"


def test_a_terminal_gets_escapes_and_colours_a_pipe_gets_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = TextPrinter(terminal=True, colour=True)
    terminal.write("a\x1b")
    terminal.write("b", from_draft=True)
    terminal.finish("a\x1bbc")
    assert capsys.readouterr().out == "a\\x1b\x1b[32mb\x1b[0mc\n"
    pipe = TextPrinter(terminal=False, colour=False)
    pipe.write("a\x1b[31m", from_draft=True)
    assert capsys.readouterr().out == "a\x1b[31m"


def test_every_command_has_help(invoke: Invoke) -> None:
    for command in ("generate", "chat", "list", "demo"):
        result = invoke(command, "--help")
        assert result.exit_code == 0
        assert "Usage: main" in result.stdout


def test_an_unknown_command_exits_with_two(invoke: Invoke) -> None:
    assert invoke("generat").exit_code == 2
    assert invoke("--version").stdout.startswith("specdec ")
    assert main.name == "main"
