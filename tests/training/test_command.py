"""``specdec train``, from nothing to a folder, with a method that learns one linear layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from specdec.cli import main
from specdec.cli import train as command
from specdec.drafters.weights import load_weights
from specdec.training.method import METHODS
from training.toy import chat_target

FAST = ("--tokens", "150", "--batch-size", "6", "--reply-tokens", "20", "--batch-tokens", "128")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", "training.toy:ToyMethod")
    monkeypatch.setattr(command, "load_target", lambda *_: chat_target())


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["train", *arguments])


def test_it_writes_texts_trains_and_saves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("toy", "--out", str(out), *FAST, "-o", "noise=0.2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{out}: held-out acceptance by depth 0.")
    for part in ("tokens of replies", "hidden states:", "step", "left"):
        assert part in result.stderr
    facts = json.loads((out / "facts.json").read_text())
    assert facts["options"] == {"noise": 0.2, "explode": False, "muon": False}
    assert facts["texts"]["reply_tokens"] >= 150
    assert facts["held_out"]["acceptance"]
    assert facts["curve"][-1]["step"] == facts["steps"]
    assert sorted(path.name for path in out.iterdir()) == ["cache", "curve.jsonl", "facts.json", "model.safetensors"]
    again = run("toy", "--out", str(tmp_path / "b"), "--cache", str(out / "cache"), *FAST, "-o", "noise=0.2")
    assert again.exit_code == 0, again.stderr
    assert "hidden states:" not in again.stderr, "the cache was used"
    same = json.loads((tmp_path / "b" / "facts.json").read_text())
    assert same["held_out"] == facts["held_out"]


def test_texts_alone_can_be_written_and_then_be_more(tmp_path: Path) -> None:
    result = run("toy", "--out", str(tmp_path), *FAST, "--texts-only")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["texts.json", "texts.jsonl"]
    before = (tmp_path / "cache" / "texts.jsonl").read_text()
    result = run("toy", "--out", str(tmp_path), *FAST, "--texts-only", "--tokens", "400")
    assert result.exit_code == 0, result.stderr
    after = (tmp_path / "cache" / "texts.jsonl").read_text()
    assert after.startswith(before)
    assert len(after) > len(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("taxi",), "unknown trainable drafter 'taxi'"),
        (("toy", "-o", "noise"), "-o takes NAME=VALUE, got 'noise'"),
        (("toy", "-o", "noize=1"), "did you mean 'noise'"),
        (("toy", "--data", "missing.jsonl"), "missing.jsonl cannot be read: No such file or directory"),
        (("toy", "--lr", "0"), "the learning rate must be above 0, got 0.0"),
    ],
)
def test_what_cannot_be_served_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unfinished_training_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    result = run("toy", "--out", str(tmp_path), *FAST)
    assert result.exit_code == 2
    assert "holds an unfinished training: go on with --resume" in result.stderr


def test_finished_weights_can_be_gone_on_from(tmp_path: Path) -> None:
    first, second, cache = tmp_path / "first", tmp_path / "second", ("--cache", str(tmp_path / "cache"))
    plain = ("-o", "num_drafts=2", "-o", "int8=false", "-o", "vocab_size=20")
    assert run("eagle", "--out", str(first), *FAST, *cache, *plain).exit_code == 0
    result = run("eagle", "--out", str(second), *FAST, *cache, *plain, "--start", str(first), "--lr", "1e-12")
    assert result.exit_code == 0, result.stderr
    before, after = load_weights(first), load_weights(second)
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert after.facts["start"]["texts"] == before.facts["texts"]
    assert after.facts["curve"][0]["acceptance"] == pytest.approx(before.facts["held_out"]["acceptance"], abs=0.05)


@pytest.mark.parametrize(
    ("drafter", "options", "message"),
    [
        ("medusa", ("-o", "vocab_size=20"), "are of drafter 'eagle', not 'medusa'"),
        ("eagle", ("-o", "vocab_size=30"), "the options ask for"),
    ],
)
def test_weights_that_do_not_fit_are_no_start(
    tmp_path: Path, drafter: str, options: tuple[str, ...], message: str
) -> None:
    cache = ("--cache", str(tmp_path / "cache"))
    assert run("eagle", "--out", str(tmp_path / "first"), *FAST, *cache, "-o", "vocab_size=20").exit_code == 0
    start = ("--start", str(tmp_path / "first"))
    result = run(drafter, "--out", str(tmp_path / "second"), *FAST, *cache, *start, *options)
    assert result.exit_code != 0
    assert message in result.stderr
