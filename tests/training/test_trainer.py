"""Training: killed and resumed it ends in the same bits; it learns, skips what is no number, and refuses clearly."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.training import checkpoints
from specdec.training.checkpoints import CheckpointFolder
from specdec.training.dataset import TrainingSet
from specdec.training.features import compute_features
from specdec.training.method import METHODS, create_method, expected_tau
from specdec.training.run import make_accelerator
from specdec.training.trainer import Trainer, TrainerSettings
from training.toy import ToyMethod, ToyOptions, random_texts, tiny_target

SETTINGS = TrainerSettings(epochs=2, learning_rate=1e-2, evaluations=4, checkpoint_seconds=0.0, accumulate=2)
KILLED_AT = 6


def make_trainer(folder: Path, settings: TrainerSettings = SETTINGS, **options: Any) -> Trainer:
    target = tiny_target()
    texts = random_texts(60)
    torch.manual_seed(settings.seed)
    method = ToyMethod(target, ToyOptions(**options))
    store = compute_features(target, texts, folder / "features", method.features, 64)
    data = TrainingSet(texts, store, method.features, batch_tokens=64, seed=settings.seed)
    return Trainer(method, data, settings, folder / "out", {"what": "test"}, make_accelerator("cpu"), target.device)


def die_while_saving(folder: Path, muon: bool) -> None:
    """Train until the process kills itself between writing a checkpoint and giving it its name."""
    import os

    move = os.replace

    def replace_or_die(source: Path, goal: Path) -> None:
        if Path(goal).name == f"step-{KILLED_AT:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        move(source, goal)

    checkpoints.os.replace = replace_or_die  # type: ignore[assignment]
    torch.set_num_threads(1)
    make_trainer(folder, muon=muon).run(resume=False)


def bits(trainer: Trainer) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in trainer.method.module.state_dict().items()}


def without_times(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**point, "seconds": None} for point in curve]


@pytest.mark.parametrize("muon", [False, True])
def test_after_a_kill_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, muon: bool) -> None:
    source = f"from training.test_trainer import *; die_while_saving(Path({str(tmp_path)!r}), {muon})"
    done = subprocess.run([sys.executable, "-c", source], cwd=Path(__file__).parents[2], env=child_environment())
    assert done.returncode == -signal.SIGKILL
    left = CheckpointFolder(tmp_path / "out" / "checkpoints", {})
    assert left.steps() == [KILLED_AT - 2, KILLED_AT - 1]
    assert [path.name for path in left.folder.glob(".*")] == [f".step-{KILLED_AT:08d}.tmp"]
    resumed = make_trainer(tmp_path, muon=muon)
    steps: list[int] = []
    final = resumed.run(resume=True, progress=lambda step: steps.append(step.step))
    assert steps == list(range(KILLED_AT, resumed.total + 1))
    whole = make_trainer(tmp_path / "whole", muon=muon)
    expected = whole.run(resume=False)
    assert bits(resumed) == bits(whole)
    assert (final, resumed.tokens) == (expected, whole.tokens)
    assert without_times(resumed.curve) == without_times(whole.curve)
    lines = (tmp_path / "out" / "curve.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.curve
    assert [point["step"] for point in resumed.curve] == sorted({point["step"] for point in resumed.curve})


def child_environment() -> dict[str, str]:
    import os

    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}


def test_it_learns_and_the_curve_says_how(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, replace(SETTINGS, epochs=6))
    final = trainer.run(resume=False)
    curve = trainer.curve
    assert [point["step"] for point in curve[::4]] == [0, trainer.total]
    assert curve[-1]["loss"] < curve[1]["loss"]
    assert curve[-1]["tokens"] == trainer.tokens > 0
    assert curve[-1]["acceptance"] == [pytest.approx(final.acceptance[0], abs=1e-5)]
    assert final.acceptance == [row[0] for row in final.hit_rates]
    assert len(final.hit_rates[0]) == 10
    trainer.finish()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_rate_warms_up_and_falls_as_a_cosine() -> None:
    settings = TrainerSettings(learning_rate=1.0, warmup=0.1, final_rate=0.1)
    rates = [settings.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[99] < 0.102
    with pytest.raises(ValueError, match="learning rate must be above 0, got -1"):
        TrainerSettings(learning_rate=-1.0)


def test_ten_steps_that_are_no_number_end_the_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, explode=True)
    before = bits(trainer)
    losses: list[float] = []
    with pytest.raises(ValueError, match=r"no number in 10 steps in a row, up to step 10: try a lower --lr than 0\.01"):
        trainer.run(resume=False, progress=lambda step: losses.append(step.loss))
    assert len(losses) == 9
    assert all(math.isnan(loss) for loss in losses)
    assert bits(trainer) == before
    assert trainer.skipped == 10


def test_checkpoints_of_another_run_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.run(resume=False)
    with pytest.raises(ValueError, match="holds an unfinished training: go on with --resume"):
        make_trainer(tmp_path).run(resume=False)
    with pytest.raises(ValueError, match=r"trainer\.learning_rate: 0\.01 before, 0\.02 now"):
        make_trainer(tmp_path, replace(SETTINGS, learning_rate=2e-2)).run(resume=True)
    newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    data = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged .*to go on from the checkpoint before it"):
        make_trainer(tmp_path).run(resume=True)


def test_a_full_disk_leaves_the_checkpoints_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ValueError, match=r"cannot write .*step-00000001: No space left on device"):
        make_trainer(tmp_path).run(resume=False)
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


def test_names_and_options_of_methods_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match="unknown trainable drafter 'medsua'; did you mean 'medusa'"):
        create_method("medsua", target)
    monkeypatch.setitem(METHODS, "toy", "training.toy:ToyMethod")
    assert create_method("toy", target, {"noise": "0.5"}).options.noise == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="unknown option of the training of 'toy' 'nois'; did you mean 'noise'"):
        create_method("toy", target, {"nois": "1"})


def test_the_expected_tau_is_one_plus_the_chances_to_get_so_far() -> None:
    assert expected_tau([]) == 1.0
    assert expected_tau([0.5, 0.5]) == 1.75
