"""Comparing two drafters: accuracy by hand, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny_chat import TEMPLATE, make_model, make_tokenizer
from click.testing import CliRunner
from integration.architectures import generate_alone, tiny_model

from specdec.benchmarks.drafts import DraftComparison, Start, compare_drafts, count_right, document
from specdec.benchmarks.questions import SHIPPED, load_questions
from specdec.benchmarks.record import commit
from specdec.benchmarks.tables import fill, layer_parallel_table
from specdec.cli import main
from specdec.drafters import weights
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.target import HFTarget
from specdec.training.method import create_method
from specdec.tree import TokenTree

PROMPTS = [[5, 6, 7], [30, 31]]


def bound(drafter: ModelDrafter, target: HFTarget) -> ModelDrafter:
    drafter.bind(target, None)
    return drafter


def test_right_nodes_are_those_on_the_path_of_the_text() -> None:
    tree = TokenTree(torch.tensor([[1, 5, 6, 7, 8]]), torch.tensor([[-1, 0, 0, 2, 3]]))
    assert [count_right(tree, goal) for goal in ([6, 7, 8, 9], [6, 8], [5, 7], [9], [])] == [3, 1, 1, 0, 0]


def test_a_target_drafting_for_itself_is_always_right_and_groups_of_its_layers_are_not() -> None:
    model = tiny_model(num_hidden_layers=6)
    target = HFTarget(model)
    texts = [prompt + generate_alone(model, prompt, 20, eos_token_id=None) for prompt in PROMPTS]
    config = {"beams": 1, "depth": 4}
    exact = bound(ModelDrafter(ModelConfig(**config), model), target)
    grouped = bound(LayerParallelDrafter(LayerParallelConfig(**config, group=4), model), target)
    found = compare_drafts((exact, grouped), target, texts, [3, 2], stride=4)
    assert found.drafts == 2 * 4  # after 4, 8, 12 and 16 of 20 tokens
    assert found.accuracy[0] == 1.0
    # a draft's first token is from an exact pass: one of four is right at least
    assert 0.25 <= found.accuracy[1] < 1.0
    assert found.accuracy_lost == pytest.approx(1.0 - found.accuracy[1])
    with pytest.raises(ValueError, match="no text is 40 tokens longer"):
        compare_drafts((exact, grouped), target, texts, [3, 2], stride=40)


def test_shares_and_ratios() -> None:
    found = DraftComparison(10, (0.8, 0.76), (13.0, 10.0))
    assert found.accuracy_lost == pytest.approx(0.05)
    assert found.speedup == pytest.approx(1.3)


def test_the_command_reports_both(tmp_path: Path) -> None:
    tokenizer: Any = make_tokenizer(TEMPLATE)
    make_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["-m", str(tmp_path), "--draft-model", str(tmp_path), "-t", "8", "--limit", "2", "--dtype", "fp32"]
    out = tmp_path / "r.json"
    result = CliRunner().invoke(main, ["bench", "layer-parallel", *arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "in groups  0.0 % less accurate" in result.stdout
    found = json.loads(out.read_text())
    assert found["comparison"]["accuracy"] == [1.0, 1.0]  # two layers make no group
    assert found["comparison"]["drafts"] == 2 * 2
    assert (found["kind"], found["commit"], found["command"][0]) == ("layer-parallel", commit(), "specdec")
    assert found["machine"]["threads"] == 1
    assert found["settings"]["dtype"] == "float32"
    assert found["questions"]["count"] == 2
    block = fill("<!-- results: layer-parallel r.json -->\n<!-- /results -->\n", tmp_path)
    assert "| groups of 4 | 1.000 | +0.0 % |" in block


def test_the_draft_model_that_ships_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PRETRAINED", tmp_path / "ships")
    tokenizer: Any = make_tokenizer(TEMPLATE)
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    arguments = ["-m", str(tmp_path / "target"), "-t", "8", "--limit", "1", "--dtype", "fp32"]
    command = ["bench", "layer-parallel", *arguments, "--json", str(tmp_path / "r.json")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2
    assert "drafter 'model' needs a draft model" in refused.stderr

    method = create_method("model", HFTarget(model), {"layers": 1, "vocab_size": 0})
    method.prepare(torch.ones(len(tokenizer)))
    method.save(tmp_path / "ships" / "model", {})
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["settings"]["draft_model"] == "the draft model that ships"
    assert found["comparison"]["accuracy"][0] == found["comparison"]["accuracy"][1] < 1.0  # one layer makes no group


def test_the_table_says_what_groups_cost_and_save_and_where_it_was_measured() -> None:
    settings = {
        "model": "m", "draft_model": "d|raft", "dtype": "float32", "group": 4, "depth": 5, "beams": 2,
        "max_new_tokens": 8,
    }  # fmt: skip
    machine = {"cpu": "Example CPU", "threads": 2, "gpu": None}
    found = DraftComparison(10, (0.8, 0.76), (13.0, 10.0))
    made = document(
        found, settings, load_questions(SHIPPED).limit(1), ["specdec", "bench"], Start("2000-01-02", machine)
    )
    lines = layer_parallel_table({**made, "commit": "0123456789abcdef"}).splitlines()
    assert lines[2:4] == [
        "| one layer at a time | 0.800 |  | 13.00 |  |",
        "| groups of 4 | 0.760 | -5.0 % | 10.00 | 1.30 |",
    ]
    for part in (
        "m, float32, 8 new tokens, 1 questions",
        "10 drafts of 5 levels, 2 beams by d\\|raft",
        "Example CPU",
        "2 thread(s), 2000-01-02, commit 0123456789ab: `specdec bench`",
    ):
        assert part in lines[-1], part


def test_a_folder_that_is_not_there_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    out = str(tmp_path / "missing" / "r.json")
    arguments = ["-m", "no such model", "--draft-model", "none", "--json", out]
    result = CliRunner().invoke(main, ["bench", "layer-parallel", *arguments])
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr
