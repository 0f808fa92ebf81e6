"""``specdec train`` as processes: killed and resumed, and two of them under accelerate's launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny_chat import TEMPLATE, make_model, make_tokenizer
from click.testing import CliRunner

from specdec.cli import main
from specdec.cli import train as command
from specdec.drafters.weights import load_weights

ROOT = Path(__file__).parents[2]
KILLED_AT = 6
KILLED = f"""
import functools, os, signal, sys
from pathlib import Path
from specdec.cli import main
from specdec.training import checkpoints, trainer

move = os.replace
def replace_or_die(source, goal):
    if Path(goal).name == "step-{KILLED_AT:08d}":
        os.kill(os.getpid(), signal.SIGKILL)
    move(source, goal)

checkpoints.os.replace = replace_or_die
trainer.TrainerSettings = functools.partial(trainer.TrainerSettings, checkpoint_seconds=0.0)
main()
"""
"""The command, saving after every step, until it dies between writing a checkpoint and giving it its name."""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training of a dozen steps, where it goes left out."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer(TEMPLATE)
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {number}"}) + "\n" for number in range(12)))
    return [
        "train", "medusa", "--model", str(folder), "--data", str(prompts), "--tokens", "240", "--batch-size", "6",
        "--reply-tokens", "20", "--batch-tokens", "64", "--epochs", "3", "--dtype", "fp32", "--device", "cpu",
        "--threads", "1", "-o", "vocab_size=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the training by one process that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    result = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.stderr
    return out


def start(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240)


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "curve.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def test_a_killed_command_resumed_ends_in_the_weights_of_one_that_was_not(
    arguments: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = start(["-c", KILLED, *arguments, "--out", str(tmp_path)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith("."))
    assert left == [f"step-{step:08d}" for step in (KILLED_AT - 2, KILLED_AT - 1)]
    assert not (tmp_path / "model.safetensors").exists()
    steps: list[int] = []
    monkeypatch.setattr(command, "describe_step", lambda step: steps.append(step.step) or "")
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path), "--resume"])
    assert result.exit_code == 0, result.stderr
    expected, found = load_weights(whole), load_weights(tmp_path)
    assert steps == list(range(KILLED_AT, expected.facts["steps"] + 1)), "it went on, it did not begin anew"
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert curve(tmp_path) == curve(whole)
    assert found.facts["held_out"] == expected.facts["held_out"]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(importlib.util.find_spec("accelerate.commands.launch") is None, reason="accelerate has no launcher")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_processes_train_under_accelerate_launch(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    """``--multi_gpu`` is what accelerate starts torchrun by; with ``--cpu`` it starts one process, or needs MPI."""
    launch = [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "specdec.cli",
    ]  # fmt: skip
    done = start([*launch, *arguments, "--out", str(tmp_path)], CUDA_VISIBLE_DEVICES="", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": held-out acceptance by depth ") == 1, "the first process alone reports"
    alone, found = load_weights(whole), load_weights(tmp_path)
    assert found.facts["texts"] == alone.facts["texts"]
    assert found.facts["steps"] == alone.facts["steps"] // 2, "a step is a batch of each process"
    assert found.tensors.keys() == alone.tensors.keys()
    assert curve(tmp_path)[-1]["held_out_loss"] < curve(tmp_path)[0]["held_out_loss"]
