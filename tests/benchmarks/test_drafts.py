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

from specdec.benchmarks.drafts import DraftComparison, compare_drafts, count_right
from specdec.cli import main
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.target import HFTarget
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
    result = CliRunner().invoke(main, ["bench", "layer-parallel", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["accuracy"] == [1.0, 1.0]  # two layers make no group
    assert found["drafts"] == 2 * 2
    shown = CliRunner().invoke(main, ["bench", "layer-parallel", *arguments])
    assert "in groups  0.0 % less accurate" in shown.stdout
