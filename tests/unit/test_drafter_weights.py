"""Trained drafters on disk: what is written is read, and what does not fit is refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model

from specdec.drafters.clover import CloverDrafter
from specdec.drafters.medusa import MedusaConfig, MedusaDrafter, MedusaHeads
from specdec.drafters.weights import (
    DrafterWeights,
    TargetFacts,
    find_pretrained,
    load_weights,
    read_config,
    save_weights,
    write_config,
)
from specdec.target import HFTarget

WIDTH = 64


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model())


def medusa_weights(target: HFTarget, **changes: Any) -> DrafterWeights:
    """Random weights of two Medusa heads over 20 tokens."""
    torch.manual_seed(0)
    module = MedusaHeads(WIDTH, num_heads=2, num_layers=1, vocab_size=20)
    torch.nn.init.normal_(module.weight, std=0.1)
    torch.nn.init.normal_(module.bias, std=0.1)
    assert module.vocabulary is not None
    module.vocabulary.copy_(torch.arange(20) * 3)
    weights = DrafterWeights(
        "medusa",
        TargetFacts.of(target),
        {"hidden_size": WIDTH, "num_heads": 2, "num_layers": 1, "vocab_size": 20},
        {name: value.clone() for name, value in module.state_dict().items()},
        {"tokens": 7},
        [[0.5, 0.25], [0.125, 0.0625]],
    )
    return replace(weights, **changes)


@pytest.fixture
def folder(target: HFTarget, tmp_path: Path) -> Path:
    """Weights as they ship."""
    save_weights(tmp_path / "medusa", medusa_weights(target), "# A card\n")
    return tmp_path / "medusa"


def bound(target: HFTarget, folder: Path) -> MedusaDrafter:
    """The drafter, met with the target."""
    drafter = MedusaDrafter(MedusaConfig(weights=str(folder)))
    drafter.bind(target, None)
    return drafter


def test_weights_in_bfloat16_come_back_as_they_were_rounded(target: HFTarget, folder: Path) -> None:
    expected, got = medusa_weights(target), load_weights(folder)

    assert (got.drafter, got.target, got.shape, got.facts) == ("medusa", expected.target, expected.shape, {"tokens": 7})
    assert got.hit_rates == [[0.5, 0.25], [0.125, 0.0625]]
    assert (folder / "README.md").read_text() == "# A card\n"
    for name, tensor in expected.tensors.items():
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert got.tensors[name].dtype == wanted.dtype
        assert torch.equal(got.tensors[name], wanted)


def test_weights_in_int8_are_off_by_half_a_step_of_their_row_at_most(target: HFTarget, tmp_path: Path) -> None:
    expected = medusa_weights(target)
    expected.tensors["weight"][0, 0, 3] = 0.0  # a row without a scale of its own
    save_weights(tmp_path, expected, "", quantize=True)
    got = load_weights(tmp_path).tensors

    step = expected.tensors["weight"].abs().amax(-1, keepdim=True) / 127
    error = (got["weight"] - expected.tensors["weight"]).abs()
    assert bool((error <= step * (0.5 + 1e-5)).all())
    assert float((error / step.clamp(min=1e-9)).max()) > 0.4  # else it was not int8
    assert torch.equal(got["bias"], expected.tensors["bias"].bfloat16())  # too small to be worth it
    assert torch.equal(got["vocabulary"], expected.tensors["vocabulary"])
    assert set(got) == set(expected.tensors)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * expected.tensors["weight"].numel()


def test_loaded_weights_draft(target: HFTarget, folder: Path) -> None:
    drafter = bound(target, folder)

    assert drafter.module.weight.dtype == torch.float32
    assert not drafter.module.weight.requires_grad
    assert drafter.module.vocabulary.tolist() == list(range(0, 60, 3))


def test_calibration_changes_the_hit_rates_alone(target: HFTarget, folder: Path) -> None:
    write_config(folder, replace(load_weights(folder), hit_rates=[[0.75]]))

    assert load_weights(folder).hit_rates == [[0.75]]
    assert load_weights(folder).facts == {"tokens": 7}


def test_calibrated_trees_need_hit_rates(target: HFTarget) -> None:
    drafter = MedusaDrafter(MedusaConfig(tree="calibrated"), weights=medusa_weights(target, hit_rates=()))
    with pytest.raises(ValueError, match="'medusa' have no hit rates: run specdec calibrate"):
        drafter.bind(target, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config\.json is damaged"),
        ('{"format": 1, "drafter": "med', r"config\.json is damaged"),
        ("[]", r"config\.json is no drafter's configuration"),
        ('{"format": 1, "drafter": "medusa"}', "lacks 'drafter', 'target' or 'shape'"),
        ('{"format": 9, "drafter": "medusa", "target": {}, "shape": {}}', "has format 9, this version reads 1"),
        ('{"format": 1, "drafter": "medusa", "target": {"hidden_size": 1}, "shape": {}}', r"config\.json is damaged"),
        ('{"format": 1, "drafter": "medusa", "target": {"size": 1}, "shape": {}}', r"config\.json is damaged"),
        ('{"format": 1, "drafter": "medusa", "target": 3, "shape": {}}', r"config\.json is damaged"),
    ],
)
def test_damaged_configuration_is_refused_by_name(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_weights(folder)


def test_missing_files_are_refused_by_name(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/config\.json cannot be read \(No such file"):
        load_weights(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_weights(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_tensors_are_refused_by_name(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated .* fetch or train it again"):
        load_weights(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 101}, "another target: vocab_size 97, not 101"),
        ({"num_hidden_layers": 3}, "another target: num_layers 2, not 3"),
        ({"hidden_size": 48, "head_dim": 12}, "another target: hidden_size 64, not 48"),
    ],
)
def test_weights_for_another_target_are_refused(folder: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bound(HFTarget(tiny_model(**changes)), folder)


def test_weights_for_a_finetuned_target_of_the_same_sizes_are_used(folder: Path) -> None:
    bound(HFTarget(tiny_model(seed=5)), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bias"), "'medusa' lack the tensor 'bias'"),
        (lambda tensors: tensors.update(scale=torch.zeros(2)), "'medusa' hold an unknown tensor 'scale'"),
        (
            lambda tensors: tensors.update(bias=torch.zeros(1, 2, 9)),
            r"tensor 'bias' of drafter 'medusa' is \(1, 2, 9\), its module wants \(1, 2, 64\)",
        ),
        (lambda tensors: tensors.pop("vocabulary"), "'medusa' lack the tensor 'vocabulary'"),
    ],
)
def test_tensors_that_do_not_fit_the_module_are_refused(target: HFTarget, change: Any, message: str) -> None:
    weights = medusa_weights(target)
    change(weights.tensors)
    with pytest.raises(ValueError, match=message):
        MedusaDrafter(weights=weights).bind(target, None)


def test_weights_of_another_kind_of_drafter_are_refused(target: HFTarget, folder: Path) -> None:
    with pytest.raises(ValueError, match="weights of drafter 'medusa', not of 'clover'"):
        CloverDrafter(weights=load_weights(folder)).bind(target, None)


def test_without_weights_the_drafter_says_how_to_get_them(target: HFTarget) -> None:
    with pytest.raises(ValueError, match="no weights of drafter 'medusa' ship for this LlamaForCausalLM: train them"):
        MedusaDrafter().bind(target, None)


def test_shipped_weights_are_found_by_the_targets_weights_in_any_precision(
    target: HFTarget, folder: Path, tmp_path: Path
) -> None:
    rounded = HFTarget(tiny_model().bfloat16())
    other = HFTarget(tiny_model(seed=1))
    assert TargetFacts.of(rounded) == TargetFacts.of(target)

    (tmp_path / "medusa-broken").mkdir()
    (tmp_path / "medusa-broken" / "config.json").write_text("{")
    for facts in (TargetFacts.of(target), TargetFacts.of(rounded)):
        assert find_pretrained("medusa", facts, tmp_path) == folder
        assert find_pretrained("clover", facts, tmp_path) is None
        assert find_pretrained("medusa", facts, tmp_path / "nowhere") is None
    assert find_pretrained("medusa", TargetFacts.of(other), tmp_path) is None


def test_a_name_that_begins_like_another_is_not_taken_for_it(target: HFTarget, folder: Path) -> None:
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps({**config, "drafter": "medusa2"}))

    assert find_pretrained("medusa", TargetFacts.of(target), folder.parent) is None


def test_vocabulary_of_the_facts_is_the_models(target: HFTarget) -> None:
    facts = TargetFacts.of(target)

    assert (facts.hidden_size, facts.vocab_size, facts.num_layers) == (WIDTH, VOCAB, 2)


def test_a_matrix_that_int8_would_ruin_stays_bfloat16(target: HFTarget, tmp_path: Path) -> None:
    expected = medusa_weights(target)
    small = expected.tensors["weight"]
    large = torch.eye(small.shape[-1])
    expected.tensors["weight"] = large + 3e-3 * small.sign()  # below half a step of int8, whose rows reach 1
    save_weights(tmp_path, expected, "", quantize=True)
    got = load_weights(tmp_path).tensors["weight"].float()

    assert torch.equal(got, expected.tensors["weight"].bfloat16().float())
