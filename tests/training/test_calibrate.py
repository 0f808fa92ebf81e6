"""``specdec calibrate``: rates that are counted right, written beside the weights, and used by the drafter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny_chat import TEMPLATE, make_model, make_tokenizer
from click.testing import CliRunner

from specdec import SpecDecoder
from specdec.cli import main
from specdec.drafters.ppd import PPDConfig, PPDDrafter
from specdec.drafters.weights import load_weights
from specdec.target import HFTarget
from specdec.training.calibrate import (
    Calibration,
    CalibrationReporter,
    CalibrationRequest,
    calibrate_drafter,
    load_method,
    measure,
)
from specdec.training.method import TrainingBatch, create_method

REPLIES = ["The quick brown fox jumps over the lazy dog.", "A rolling stone gathers no moss at all, they say."]
OPTIONS: dict[str, dict[str, Any]] = {
    "ppd": {"num_tokens": 2},
    "medusa": {"num_heads": 2, "vocab_size": 50, "int8": False},
    "model": {"layers": 1, "vocab_size": 50, "int8": False},
}
DEPTHS = {"ppd": 2, "medusa": 2, "model": 5}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Conversations with replies, so that the target need not write any."""
    path = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {reply[:5]}"}, {"role": "assistant", "content": reply}]}
        for reply in REPLIES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(TEMPLATE)
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_weights(folder: Path, drafter: str) -> HFTarget:
    """Untrained weights in a folder, and their target."""
    target = HFTarget(make_model(make_tokenizer(TEMPLATE)))
    method = create_method(drafter, target, OPTIONS[drafter])
    method.prepare(torch.arange(target.vocab_size).flip(0))
    method.save(folder, {"drafter": drafter, "target": "tiny", "options": OPTIONS[drafter]})
    return target


def calibrate(folder: Path, drafter: str, target: HFTarget, data: Path, notes: list[str] | None = None) -> Calibration:
    request = CalibrationRequest(drafter, str(folder), folder.parent / "cache", tokens=100, data=data)
    reporter = CalibrationReporter(note=(notes if notes is not None else []).append)
    return calibrate_drafter(request, target, make_tokenizer(TEMPLATE), reporter)


@pytest.mark.parametrize("drafter", OPTIONS)
def test_rates_are_counted_and_kept_with_the_weights(drafter: str, tmp_path: Path, data: Path) -> None:
    target = make_weights(tmp_path / "weights", drafter)
    before = (tmp_path / "weights" / "model.safetensors").read_bytes()
    found = calibrate(tmp_path / "weights", drafter, target, data)
    assert len(found.hit_rates) == len(found.positions) == DEPTHS[drafter]
    assert all(len(rates) == 10 and 0 <= sum(rates) <= 1 for rates in found.hit_rates)
    weights = load_weights(tmp_path / "weights")
    for kept, rates in zip(weights.hit_rates, found.hit_rates, strict=True):
        assert kept == pytest.approx(rates, abs=5e-5)
    assert weights.facts["calibration"]["positions"] == found.positions
    assert weights.facts["target"] == "tiny"
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == before
    # The same texts by hand: the first guess stands two places behind the last known state, all in the reply.
    tokenizer = make_tokenizer(TEMPLATE)
    assert found.positions[0] == sum(len(tokenizer(reply).input_ids) + 1 for reply in REPLIES)


def test_rates_of_batches_are_weighed_by_their_positions() -> None:
    class Counting:
        module = torch.nn.Linear(1, 1)

        def hits(self, batch: TrainingBatch, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
            count = int(batch.lengths[0])
            found = torch.zeros(2, ranks, dtype=torch.int64)
            found[:, 0], found[:, 1] = 1, count - 1
            return found, torch.tensor([count, 2 * count])

    def batch(length: int) -> TrainingBatch:
        return TrainingBatch(torch.zeros(1, length), torch.tensor([length]), torch.tensor([1]))

    rates, positions = measure(Counting(), [batch(1), batch(4)])  # type: ignore[arg-type]
    assert positions == [5, 10]
    assert rates[0][:3] == pytest.approx([2 / 5, 3 / 5, 0])
    assert rates[1][:3] == pytest.approx([2 / 10, 3 / 10, 0])
    with pytest.raises(ValueError, match="no text is long enough for a guess"):
        measure(Counting(), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("drafter", ["medusa", "model"])
def test_a_method_is_restored_with_its_vocabulary(drafter: str, tmp_path: Path) -> None:
    target = make_weights(tmp_path, drafter)
    weights = load_weights(tmp_path)
    method = load_method(weights, target)
    for name, tensor in method.module.state_dict().items():
        assert torch.equal(tensor.to(weights.tensors[name].dtype), weights.tensors[name]), name


def test_calibrated_weights_shape_the_trees(tmp_path: Path, data: Path) -> None:
    target = make_weights(tmp_path / "weights", "ppd")
    calibrate(tmp_path / "weights", "ppd", target, data)
    drafter = PPDDrafter(PPDConfig(weights=str(tmp_path / "weights"), tree="calibrated", max_nodes=12))
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    assert drafter.plan is not None
    plain = SpecDecoder(target, "none").generate([5, 6, 7], max_new_tokens=12)
    assert decoder.generate([5, 6, 7], max_new_tokens=12).token_ids == plain.token_ids


def test_a_calibrated_draft_model_expects_what_was_measured(tmp_path: Path, data: Path) -> None:
    target = make_weights(tmp_path / "weights", "model")
    folder = str(tmp_path / "weights")
    drafters = [SpecDecoder(target, "model", drafter_options={"model": folder}).drafter]
    found = calibrate(tmp_path / "weights", "model", target, data)
    drafters.append(SpecDecoder(target, "model", drafter_options={"model": folder}).drafter)
    assert drafters[0].expected_accepted((1, 2)) is None
    assert drafters[1].expected_accepted((1, 2)) == pytest.approx([0.0, found.hit_rates[0][0]], abs=5e-5)


def test_text_that_was_trained_on_is_pointed_out(tmp_path: Path, data: Path) -> None:
    target = make_weights(tmp_path / "weights", "ppd")
    notes: list[str] = []
    calibrate(tmp_path / "weights", "ppd", target, data, notes)
    assert not [note for note in notes if "trained on" in note]
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    import hashlib

    config["facts"]["texts"] = {"data": {"name": "data.jsonl", "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}}
    (tmp_path / "weights" / "config.json").write_text(json.dumps(config))
    calibrate(tmp_path / "weights", "ppd", target, data, notes)
    assert [note for note in notes if "data.jsonl is what the drafter was trained on" in note]


def test_the_command_prints_a_table(tmp_path: Path, data: Path, model_folder: Path) -> None:
    make_weights(tmp_path / "weights", "ppd")
    arguments = ["calibrate", "--drafter", "ppd", "-o", f"weights={tmp_path / 'weights'}", "--model", str(model_folder)]
    result = CliRunner().invoke(main, [*arguments, "--data", str(data), "--tokens", "100", "--dtype", "fp32"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["depth", "rank", "1", "rank"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert str(tmp_path / "weights" / "config.json") in lines[3]
    assert len(load_weights(tmp_path / "weights").hit_rates) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "medusae"], "did you mean 'medusa'"),
        (["--drafter", "ngram"], "unknown trainable drafter 'ngram'"),
        (["--drafter", "ppd", "-o", "weight=x"], "did you mean 'weights'"),
        (["--drafter", "ppd"], "no weights of drafter 'ppd' ship"),
        (["--drafter", "ppd", "-o", "weights=/nowhere"], "/nowhere/config.json cannot be read"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], message: str, model_folder: Path) -> None:
    result = CliRunner().invoke(main, ["calibrate", *arguments, "--model", str(model_folder)])
    assert result.exit_code == 2
    assert message in result.stderr


def test_weights_of_another_drafter_or_target_are_refused(tmp_path: Path, data: Path) -> None:
    target = make_weights(tmp_path, "ppd")
    with pytest.raises(ValueError, match="these are weights of drafter 'ppd', not of 'medusa'"):
        calibrate(tmp_path, "medusa", target, data)
    small = make_model(make_tokenizer(TEMPLATE))
    small.config.num_hidden_layers = 1
    small.model.layers = small.model.layers[:1]
    with pytest.raises(ValueError, match="for another target: num_layers 2, not 1"):
        calibrate(tmp_path, "ppd", HFTarget(small), data)
