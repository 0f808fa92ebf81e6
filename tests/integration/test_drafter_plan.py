"""What a drafter takes is known from its files, before it and its target are loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.drafter_plan import DrafterPlan, plan_drafter, resolve_planned
from specdec.drafters import weights as weights_module
from specdec.drafters.clover import make_clover
from specdec.drafters.eagle import make_eagle
from specdec.drafters.heads import HeadModule
from specdec.drafters.layer import LayerShape
from specdec.drafters.medusa import MedusaHeads
from specdec.drafters.ppd import PromptTokens
from specdec.drafters.pruned import PrunedLayers
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.load_plan import LoadPlan
from specdec.memory_plan import drafter_kv, drafter_weights
from specdec.models import load_model, plan_model
from specdec.packing import cpu_takes_bfloat16
from specdec.registry import AUTO_DRAFTER, FASTER_THAN_AUTO, create_drafter
from specdec.target import HFTarget

LENGTH = 300
TRAINED = ("medusa", "clover", "eagle", "ppd", "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target in two files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("target") / "bf16"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="1MB")
    assert len([*path.glob("*.safetensors")]) > 1
    return path


@pytest.fixture(scope="module")
def shipped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of every kind of drafter for it."""
    target = HFTarget(load_model(str(folder), dtype="fp32", device="cpu").model)
    layer = asdict(LayerShape.of(target))
    makers: dict[str, tuple[dict[str, object], type | object]] = {
        "medusa": ({"hidden_size": 128, "num_heads": 3, "vocab_size": 500}, lambda shape: MedusaHeads(**shape)),
        "clover": ({"layer": layer, "vocab_size": 500}, make_clover),
        "eagle": ({"layer": layer, "states": ["pre_norm"], "vocab_size": 500}, make_eagle),
        "ppd": ({"hidden_size": 128, "num_tokens": 3, "ensembles": 1}, lambda shape: PromptTokens(**shape)),
        "model": ({"layers": [0, 2], "vocab_size": 500}, lambda shape: PrunedLayers(target, **shape)),
    }
    root = tmp_path_factory.mktemp("pretrained")
    for name, (shape, make) in makers.items():
        module: HeadModule = make(shape)  # type: ignore[operator]
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        facts = TargetFacts.of(target)
        save_weights(root / name, DrafterWeights(name, facts, shape, module.state_dict()), "", quantize=True)
    return root


@pytest.fixture(autouse=True)
def found(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They ship."""
    monkeypatch.setattr(weights_module, "PRETRAINED", shipped)


def plan_of(folder: Path, dtype: str, quantize: str | None = None) -> LoadPlan:
    if dtype == "bf16" and not cpu_takes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    load = plan_model(str(folder), dtype=dtype, device="cpu", packed=True, quantize=quantize)
    assert load is not None
    return load


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_files_tell_what_a_loaded_target_does(folder: Path, dtype: str) -> None:
    loaded = load_model(str(folder), dtype=dtype, device="cpu", packed=True).model
    assert plan_of(folder, dtype).facts == TargetFacts.of(HFTarget(loaded))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*TRAINED, "suffix+eagle", "suffix"])
def test_plans_say_what_bound_drafters_hold(folder: Path, name: str, dtype: str) -> None:
    load = plan_of(folder, dtype)
    plan = plan_drafter(create_drafter(name), load, rows=3, length=LENGTH)
    target = HFTarget(load_model(str(folder), dtype=dtype, device="cpu", packed=True).model)
    drafter = create_drafter(name)
    drafter.bind(target, None)
    assert plan.unknown == ()
    assert plan.weights == pytest.approx(drafter_weights(drafter, target), rel=0.1)
    assert plan.kv == drafter_kv(drafter, 3, LENGTH)
    assert plan.features == len(drafter.every_feature)
    assert (plan.weights > 0) == (name != "suffix")


def test_weights_that_an_option_names_count_like_those_that_ship(folder: Path, shipped: Path) -> None:
    load = plan_of(folder, "fp32")
    for name, option in (("clover", "weights"), ("model", "model")):
        named = plan_drafter(create_drafter(name, {option: str(shipped / name)}), load, 1, LENGTH)
        assert named == plan_drafter(create_drafter(name), load, 1, LENGTH)


def test_auto_is_what_it_is_with_the_loaded_target(folder: Path) -> None:
    best = next(iter(FASTER_THAN_AUTO))
    assert resolve_planned("auto", plan_of(folder, "fp32")).name == best
    decoded = plan_of(folder, "fp32", "fp6")  # its passes cost more for each node
    assert resolve_planned("auto", decoded).name == AUTO_DRAFTER
    assert resolve_planned("medusa", decoded, {"depth": 2}).name == "medusa"


def test_weights_that_are_not_there_are_named(
    folder: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = plan_of(folder, "fp32")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"drafter": "eagle", "target"')
    damaged = create_drafter("eagle", {"weights": str(tmp_path / "damaged")})
    assert plan_drafter(damaged, load) == DrafterPlan(unknown=("eagle",))
    monkeypatch.setattr(weights_module, "PRETRAINED", tmp_path)
    assert plan_drafter(create_drafter("suffix+eagle"), load).unknown == ("eagle",)
    with pytest.raises(ValueError, match="no weights of drafter 'medusa' ship"):
        create_drafter("medusa").weights_folder(load.facts)


def test_a_model_is_refused_where_its_drafter_would_not_fit_beside_it(folder: Path) -> None:
    load, drafter = plan_of(folder, "fp32"), create_drafter("clover")
    beside = plan_drafter(drafter, load).num_bytes
    assert beside > 100_000
    with pytest.raises(ValueError, match="are needed to load the model"):
        load_model(str(folder), dtype="fp32", device="cpu", memory_budget=load.held + beside - 1, drafter=drafter)
    load_model(str(folder), dtype="fp32", device="cpu", memory_budget=load.held + beside - 1, drafter="suffix")
