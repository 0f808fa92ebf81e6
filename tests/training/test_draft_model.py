"""Draft models made of the target's layers: what they are, how they learn, and that they are stored and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from integration.architectures import generate_alone, tiny_model
from torch import nn

from specdec import SpecDecoder
from specdec.cli import main
from specdec.cli import train as command
from specdec.drafters import weights
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.drafters.pruned import PrunedLayers, build_pruned, choose_layers, read_pruned, spaced_layers
from specdec.models import load_model
from specdec.packing import PackedLinear
from specdec.target import HFTarget
from specdec.training.distillation import Anchors
from specdec.training.draft_model import DraftModelMethod, DraftModelOptions
from specdec.training.method import create_method
from training.distilled import VOCAB, acceptance, generated_batch, prepared, random_batch, train
from training.toy import chat_target

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39]])
LAYERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
    "qwen3": {},
    "smollm3": {},
    "gemma2": {},
}


def target_of(architecture: str = "llama", layers: int = 4) -> HFTarget:
    changes = {"num_hidden_layers": layers, **LAYERS[architecture]}
    return HFTarget(tiny_model(architecture, **changes))


def pruned(target: HFTarget, layers: list[int], vocab_size: int = 0) -> Any:
    module = PrunedLayers(target, layers, vocab_size)
    module.copy_layers(target)
    return module.model(target, target.device, target.dtype)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", LAYERS)
def test_all_layers_are_the_target_and_some_are_the_target_without_the_others(architecture: str) -> None:
    target = target_of(architecture)
    model = target.model
    assert torch.equal(pruned(target, [0, 1, 2, 3])(TOKENS).logits, model(TOKENS).logits)
    draft = pruned(target, [0, 3])
    assert draft.config.num_hidden_layers == 2
    for layer in (1, 2):
        model.base_model.layers[layer].forward = lambda hidden_states, *_, **__: hidden_states
    assert torch.equal(draft(TOKENS).logits, model(TOKENS).logits)
    assert draft.get_input_embeddings() is model.get_input_embeddings(), "embeddings are not copied"


@torch.inference_mode()
def test_a_draft_vocabulary_leaves_the_other_tokens_out() -> None:
    target = target_of()
    draft, whole = pruned(target, [0, 3], vocab_size=40), pruned(target, [0, 3])
    logits = draft(TOKENS).logits
    torch.testing.assert_close(logits[..., :40], whole(TOKENS).logits[..., :40], atol=1e-5, rtol=1e-5)
    assert bool(logits[..., 40:].isneginf().all())
    head = draft.get_output_embeddings()
    again = nn.functional.linear(draft.base_model(TOKENS).last_hidden_state, head.weight, head.bias)
    torch.testing.assert_close(again[..., :40], logits[..., :40], atol=1e-5, rtol=1e-5)
    assert bool((again.softmax(-1)[..., 40:] == 0).all())


def test_layers_are_taken_from_both_ends() -> None:
    assert choose_layers(30, 6) == [0, 1, 2, 27, 28, 29]
    assert choose_layers(4, 3) == [0, 2, 3]
    assert choose_layers(3, 2) == [0, 2]
    assert choose_layers(4, 1) == [3]
    for count in (0, 5):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 4\], the target's layers, got {count}"):
            choose_layers(4, count)
    assert DraftModelOptions(keep="0,1,5").chosen(8) == [0, 1, 5]


def test_layers_are_evenly_spaced_where_that_is_asked_for() -> None:
    assert spaced_layers(30, 6) == [0, 6, 12, 17, 23, 29]
    assert spaced_layers(4, 4) == [0, 1, 2, 3]
    assert spaced_layers(4, 1) == [0]
    for count in (0, 5):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 4\], the target's layers, got {count}"):
            spaced_layers(4, count)
    assert DraftModelOptions(layers=3).chosen(5) == [0, 3, 4]
    method = create_method("model", target_of(layers=5), {"layers": "3", "spread": "even"})
    assert isinstance(method, DraftModelMethod)
    assert method.module.layers == [0, 2, 4]
    assert DraftModelOptions(spread="even", keep="0,1,5").chosen(8) == [0, 1, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "layers must be fewer than the model's 4, got 4"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"layers": 2, "spread": "middle"}, "unknown value of spread 'middle'"),
        ({"layers": 2, "keep": "3,1"}, r"layers must ascend within 0 .. 3, got \[3, 1\]"),
        ({"layers": 2, "keep": "1,4"}, r"layers must ascend within 0 .. 3, got \[1, 4\]"),
        ({"layers": 2, "keep": "1-3"}, "keep must be indices as '0,1,28,29', got '1-3'"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_method("model", target_of(), options)


def test_a_model_whose_layers_cannot_be_taken_out_is_refused() -> None:
    with pytest.raises(ValueError, match="no layers can be taken out of GPT2LMHeadModel"):
        create_method("model", HFTarget(tiny_model("gpt2")), {"layers": 1})


def test_the_loss_is_the_cross_entropy_to_the_targets_distribution_at_each_token_of_the_reply() -> None:
    target = target_of()
    batch = random_batch(target)
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2, vocab_size=60)), batch)
    with torch.no_grad():
        loss, count = method.loss(batch)
        vocabulary = method.module.vocabulary
        assert vocabulary is not None
        model = method.module.model(target, target.device, torch.float32)
        expected, places = torch.zeros(()), 0
        for row, (length, prompt) in enumerate(zip(batch.lengths.tolist(), batch.prompt_lengths.tolist(), strict=True)):
            text = batch.tokens[row : row + 1, :length]
            wanted = target.model(text).logits[0][:, vocabulary].softmax(-1)
            got = model(text).logits[0][:, vocabulary].log_softmax(-1)
            # at token t the token t + 1 is guessed, from the first one behind the reply's first on
            for at in range(max(prompt - 1, 1), length - 1):
                expected -= (wanted[at] * got[at]).sum()
                places += 1
    assert count == places == len(Anchors.of(batch, 1).rows)
    torch.testing.assert_close(loss, expected / places, atol=1e-5, rtol=1e-5)


def test_hits_are_those_of_the_model_that_is_loaded(tmp_path: Path) -> None:
    target = target_of()
    batch = generated_batch(target)
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2, vocab_size=60, int8=False)), batch)
    rates = acceptance(method, batch)
    assert len(rates) == ModelConfig().depth
    assert len(set(rates)) == 1
    method.save(tmp_path, {})
    stored = read_pruned(str(tmp_path))
    assert stored is not None
    model = build_pruned(stored, target)
    with torch.inference_mode():
        guesses = model(batch.tokens).logits.argmax(-1)
    anchors = Anchors.of(batch, 1)
    right = guesses[anchors.rows, anchors.positions + 1] == batch.tokens[anchors.rows, anchors.positions + 2]
    # weights are stored in bfloat16: one in a hundred guesses may turn
    assert abs(float(right.float().mean()) - rates[0]) <= 0.01 + 1 / len(anchors.rows)


def test_training_makes_it_draft_better(tmp_path: Path) -> None:
    target = target_of(layers=6)
    batch = generated_batch(target)
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2, vocab_size=80)), batch)
    before = acceptance(method, batch)[0]
    method.save(tmp_path / "untrained", {})
    train(method, batch, 60, 1e-2)
    assert acceptance(method, batch)[0] > max(0.9, before + 0.3)
    method.save(tmp_path / "trained", {})
    prompt, taus = [5, 6, 7], {}
    for name in ("untrained", "trained"):
        options = {"model": str(tmp_path / name)}
        decoder = SpecDecoder(target, "model", drafter_options=options, adaptive=False, on_drafter_error="raise")
        result = decoder.generate(prompt, max_new_tokens=24, ignore_eos=True)
        assert result.token_ids == generate_alone(target.model, prompt, 24, eos_token_id=None)
        taus[name] = decoder.stats.tau
    assert taus["trained"] > taus["untrained"] + 1.0
    size = (tmp_path / "trained" / "model.safetensors").stat().st_size
    stored = sum(p.numel() for p in method.module.parameters())
    assert size < 1.2 * stored + 8 * 80 + 10_000, "int8, and neither embeddings nor head are in it"


def test_the_command_trains_stores_and_says_how_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, tokenizer = chat_target()
    monkeypatch.setattr(command, "load_target", lambda *_: (target, tokenizer))
    arguments = ["model", "--layers", "1", "--tokens", "150", "--batch-size", "6", "--reply-tokens", "20"]
    result = CliRunner().invoke(main, ["train", *arguments, "--out", str(tmp_path), "--batch-tokens", "256"])
    assert result.exit_code == 0, result.stderr
    stored = read_pruned(str(tmp_path))
    assert stored is not None
    assert stored.shape["layers"] == [1]
    assert "--drafter model -o model=FOLDER" in (tmp_path / "README.md").read_text()
    again = SpecDecoder(target, ModelDrafter(ModelConfig(model=str(tmp_path))), tokenizer=tokenizer)
    assert (
        again.generate("Hello", max_new_tokens=8).text
        == SpecDecoder(target, "none", tokenizer=tokenizer).generate("Hello", max_new_tokens=8).text
    )


def test_a_folder_loads_as_a_model_with_the_target_it_names(tmp_path: Path) -> None:
    target = target_of()
    target.model.save_pretrained(tmp_path / "target")
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2, vocab_size=60)), random_batch(target))
    method.save(tmp_path / "draft", {"target": str(tmp_path / "target")})
    loaded = load_model(str(tmp_path / "draft"), dtype="fp32")
    stored = read_pruned(str(tmp_path / "draft"))
    assert stored is not None
    with torch.inference_mode():
        assert torch.equal(loaded.model(TOKENS).logits, build_pruned(stored, target)(TOKENS).logits)


@pytest.mark.parametrize("vocab_size", [0, 60])
def test_a_draft_model_to_train_through_has_no_packed_layer(tmp_path: Path, vocab_size: int) -> None:
    target = target_of()
    method = prepared(
        DraftModelMethod(target, DraftModelOptions(layers=2, vocab_size=vocab_size)), random_batch(target)
    )
    method.save(tmp_path, {})
    stored = read_pruned(str(tmp_path))
    assert stored is not None
    target.model.to(torch.bfloat16)
    model = build_pruned(stored, target, packed=False)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    create_method("ppd", HFTarget(model), {"num_tokens": 2})


def test_prompt_tokens_train_and_draft_on_such_a_model(tmp_path: Path) -> None:
    target = target_of()
    batch = generated_batch(target)
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2, vocab_size=80)), batch)
    train(method, batch, 40, 1e-2)
    method.save(tmp_path / "draft", {})
    stored = read_pruned(str(tmp_path / "draft"))
    assert stored is not None
    prompts = create_method("ppd", HFTarget(build_pruned(stored, target, packed=False)), {"num_tokens": 2})
    prepared(prompts, batch)
    loss = float(prompts.loss(batch)[0].detach())
    train(prompts, batch, 20, 1e-2)
    assert float(prompts.loss(batch)[0].detach()) < loss
    prompts.save(tmp_path / "prompts", {})
    passes = {}
    for extra in ({}, {"prompt_tokens": str(tmp_path / "prompts")}):
        drafter = ModelDrafter(ModelConfig(model=str(tmp_path / "draft"), **extra))
        decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
        count = 0
        run = drafter.draft_model.run

        def counted(*inputs: Any, run: Any = run, **named: Any) -> Any:
            nonlocal count
            count += 1
            return run(*inputs, **named)

        drafter.draft_model.run = counted  # type: ignore[method-assign]
        result = decoder.generate([5, 6, 7], max_new_tokens=24, ignore_eos=True)
        assert result.token_ids == generate_alone(target.model, [5, 6, 7], 24, eos_token_id=None)
        passes[bool(extra)] = count / decoder.stats.passes
    assert passes[True] < 0.6 * passes[False]  # 2 passes for 5 levels, not 5


def test_the_one_that_ships_for_the_target_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PRETRAINED", tmp_path)
    target = target_of()
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2)), random_batch(target))
    method.save(tmp_path / "model", {})
    decoder = SpecDecoder(target, "model")
    assert isinstance(decoder.drafter, ModelDrafter)
    assert decoder.drafter.draft_model.num_layers == 2
    with pytest.raises(ValueError, match=r"drafter 'model' needs a draft model: -o model=NAME.*specdec train model"):
        SpecDecoder(target_of(layers=6), "model")


def test_its_layers_can_run_in_groups(tmp_path: Path) -> None:
    target = target_of(layers=6)
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=4)), random_batch(target))
    method.save(tmp_path, {})
    decoder = SpecDecoder(
        target, "layer_parallel", drafter_options={"model": str(tmp_path), "group": "2"}, on_drafter_error="raise"
    )
    assert decoder.drafter.draft_model.groups == [range(1, 3)]  # type: ignore[attr-defined]
    result = decoder.generate([5, 6, 7], max_new_tokens=24, ignore_eos=True)
    assert result.token_ids == generate_alone(target.model, [5, 6, 7], 24, eos_token_id=None)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    target = target_of()
    method = prepared(DraftModelMethod(target, DraftModelOptions(layers=2)), random_batch(target))
    method.save(tmp_path, {})
    with pytest.raises(ValueError, match="for another target: num_layers 4, not 6"):
        SpecDecoder(target_of(layers=6), "model", drafter_options={"model": str(tmp_path)})
    assert target.vocab_size == VOCAB
