"""Checkpoints for vLLM, and the commands that write them and its configuration.

That vLLM loads them and drafts the same is tested where vLLM is, in tests/vllm_engine.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from integration.architectures import VOCAB, tiny_model
from safetensors.torch import load_file
from unit.unit_heads import random_weights

from specdec import SpecDecoder
from specdec.cli import main
from specdec.drafters.eagle import make_eagle
from specdec.drafters.foreign import read_foreign
from specdec.drafters.layer import LayerShape
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.integrations.vllm.export import LAYOUTS, export_weights
from specdec.integrations.vllm.launch import Launch
from specdec.integrations.vllm.settings import Settings
from specdec.registry import create_drafter
from specdec.target import HFTarget

DRAFT_VOCAB = 60


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model(num_hidden_layers=4))


def eagle3(target: HFTarget, **changes: Any) -> DrafterWeights:
    """A head of the published form with random weights."""
    torch.manual_seed(1)
    shape = {
        "layer": asdict(LayerShape.of(target)), "states": [2, 3, "pre_norm"], "vocab_size": DRAFT_VOCAB,
        "scaled": False, "mixed": False, **changes,
    }  # fmt: skip
    module = make_eagle(shape)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert module.vocabulary is not None
    module.vocabulary.copy_(torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values)
    return DrafterWeights("eagle", TargetFacts.of(target), shape, module.state_dict())


def drafted_alike(target: HFTarget, folders: list[Path], drafter: str) -> None:
    """Both folders' drafters draft and are accepted alike on a text."""
    seen = []
    for folder in folders:
        options = {"weights": str(folder), "width": 1, "branching": 1}
        decoder = SpecDecoder(target, create_drafter(drafter, options), adaptive=False, on_drafter_error="raise")
        result = decoder.generate([5, 6, 7, 5, 6], max_new_tokens=24, ignore_eos=True)
        seen.append((result.token_ids, result.stats.drafted, result.stats.passes))
    assert seen[0] == seen[1]
    assert seen[0][1] > 0


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
@pytest.mark.parametrize("own_output", [False, True])
def test_exported_eagle_heads_are_read_back_as_they_were(
    target: HFTarget, tmp_path: Path, layout: str, own_output: bool
) -> None:
    weights = eagle3(target, own_output=own_output)
    export_weights(weights, target, "some/model", layout, tmp_path / "out", num_tokens=3)
    found = read_foreign(tmp_path / "out", TargetFacts.of(target))
    assert found is not None
    expected = dict(weights.tensors)
    if not own_output:  # the layouts have a head of their own in any case: the target's rows
        expected["output.weight"] = target.model.get_output_embeddings().weight[expected["vocabulary"]]
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert found.shape["states"] == [2, 3, 4]
    same = ("layer", "vocab_size", "scaled", "mixed")
    assert {name: found.shape[name] for name in same} == {name: weights.shape[name] for name in same}


def test_exported_eagle_heads_draft_alike(target: HFTarget, tmp_path: Path) -> None:
    save_weights(tmp_path / "own", eagle3(target, own_output=True), card="")
    from specdec.drafters.weights import load_weights

    export_weights(load_weights(tmp_path / "own"), target, "some/model", "eagle3", tmp_path / "out")
    drafted_alike(target, [tmp_path / "own", tmp_path / "out"], "eagle")


def test_the_speculators_folder_says_what_vllm_asks(target: HFTarget, tmp_path: Path) -> None:
    export_weights(eagle3(target, own_output=True), target, "some/model", "speculators", tmp_path, num_tokens=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/model"
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert config["transformer_layer_config"]["vocab_size"] == VOCAB
    assert config["draft_vocab_size"] == DRAFT_VOCAB
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["t2d"].nonzero().squeeze(1).tolist() == (torch.arange(DRAFT_VOCAB) + tensors["d2t"]).tolist()


def test_medusa_heads_share_one_copy_of_the_targets_output(target: HFTarget, tmp_path: Path) -> None:
    weights = random_weights(target, "medusa", vocab_size=50, num_layers=2)
    export_weights(weights, target, "some/model", "medusa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"], config["vocab_size"]) == (4, 2, VOCAB)
    assert config["original_lm_head"] is True
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors.pop("0.2.weight"), target.model.get_output_embeddings().weight)
    assert tensors.keys() == {f"{k}.{n}.linear.{p}" for k in range(4) for n in range(2) for p in ("weight", "bias")}
    for head in range(4):
        assert torch.equal(tensors[f"{head}.1.linear.weight"], weights.tensors["weight"][1, head])
        assert torch.equal(tensors[f"{head}.0.linear.bias"], weights.tensors["bias"][0, head])


def test_medusa_heads_with_outputs_of_their_own_are_read_back(target: HFTarget, tmp_path: Path) -> None:
    weights = random_weights(target, "medusa", num_layers=1)
    own = DrafterWeights(
        "medusa", weights.target, {**weights.shape, "own_output": VOCAB},
        {**weights.tensors, "output.weight": torch.randn(4, VOCAB, weights.shape["hidden_size"])},
    )  # fmt: skip
    export_weights(own, target, "some/model", "medusa", tmp_path)
    found = read_foreign(tmp_path, TargetFacts.of(target))
    assert found is not None
    assert found.tensors.keys() == own.tensors.keys()
    for name, tensor in own.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("eagle3", {"scaled": True}, r"brings the target's states to unit length \(scaled\)"),
        ("speculators", {"mixed": True}, r"\(mixed\), which EAGLE-3's layout cannot say"),
        ("eagle3", {"fc_bias": True}, r"\(fc_bias\)"),
        ("medusa", {}, "the format medusa is for weights of drafter 'medusa', these are of 'eagle'"),
        ("eagle4", {}, "unknown format 'eagle4'; did you mean 'eagle3'"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    target: HFTarget, tmp_path: Path, layout: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_weights(eagle3(target, **changes), target, "some/model", layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_medusa_heads_are_refused(target: HFTarget, tmp_path: Path) -> None:
    weights = random_weights(target, "medusa")
    mixed = DrafterWeights("medusa", weights.target, {**weights.shape, "mixed": True}, weights.tensors)
    with pytest.raises(ValueError, match="-o mixed=false"):
        export_weights(mixed, target, "some/model", "medusa", tmp_path / "out")


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_the_command_exports_eagle_heads_for_the_model_it_names(target: HFTarget, tmp_path: Path, layout: str) -> None:
    target.model.save_pretrained(tmp_path / "model")
    save_weights(tmp_path / "weights", eagle3(target, own_output=True), card="")
    arguments = ["export", "vllm", "--format", layout, "--model", str(tmp_path / "model"), "-k", "3"]
    arguments += ["--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout.partition(" = ")[2])
    assert said == {"method": "eagle3", "model": str(tmp_path / "out"), "num_speculative_tokens": 3}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if layout == "speculators":
        assert config["speculators_config"]["verifier"]["name_or_path"] == str(tmp_path / "model")
    else:
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]


def test_the_command_exports_weights_and_says_how_vllm_loads_them(target: HFTarget, tmp_path: Path) -> None:
    target.model.save_pretrained(tmp_path / "model")
    save_weights(tmp_path / "weights", random_weights(target, "medusa", num_layers=1), card="")
    arguments = ["export", "vllm", "--format", "medusa", "--model", str(tmp_path / "model"), "-k", "3"]
    arguments += ["--weights", str(tmp_path / "weights"), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout.partition(" = ")[2])
    assert said == {"method": "medusa", "model": str(tmp_path / "out"), "num_speculative_tokens": 3}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    again = CliRunner().invoke(main, [*arguments[:4], "--model", str(tmp_path / "model"), "--out", "x"])
    assert again.exit_code == 2
    assert "no weights of drafter 'medusa' ship for" in again.output
    wrong = CliRunner().invoke(main, ["export", "vllm", "--format", "medusas", "--out", "x"])
    assert wrong.exit_code == 2
    assert f"choices: {', '.join(sorted(LAYOUTS))}" in wrong.output


def test_the_launch_command_survives_the_shell() -> None:
    settings = Settings("medusa", {"weights": "a folder's name", "depth": 3})
    launch = Launch("some/model", settings, 6)
    words = shlex.split(str(launch.to_json()["command"]))
    assert words[:3] == ["vllm", "serve", "some/model"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert json.loads(options["--speculative-config"])["num_speculative_tokens"] == 6
    assert Settings.read(json.loads(options["--additional-config"])) == settings


def test_vllm_config_prints_both_configurations() -> None:
    found = CliRunner().invoke(main, ["vllm-config", "-m", "some/model", "-d", "suffix", "-o", "depth=3", "-k", "7"])
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[0].startswith('speculative_config = {"method": "custom_class"')
    assert json.loads(lines[1].partition(" = ")[2]) == {"specdec": {"drafter": "suffix", "options": {"depth": "3"}}}
    assert lines[3].startswith("vllm serve some/model --speculative-config ")
    document = json.loads(CliRunner().invoke(main, ["vllm-config", "-m", "some/model", "--json"]).stdout)
    assert document["command"].startswith("vllm serve some/model")
    assert document["additional_config"] == {"specdec": {"drafter": "auto", "options": {}}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "ppd"], "cannot run in vLLM: its prompt tokens"),
        (["-d", "layer_parallel"], "cannot run in vLLM: it runs the target's own layers"),
        (["-d", "ngrm"], "did you mean 'ngram'"),
        (["-d", "ngram", "-o", "dept=3"], "did you mean 'depth'"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_before_it_starts(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(main, ["vllm-config", "-m", "some/model", *arguments])
    assert found.exit_code == 2
    assert message in found.output
