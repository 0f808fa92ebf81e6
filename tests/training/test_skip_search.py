"""The search for layers that draft: subsets measured as they draft, the best of them found and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny_chat import TEMPLATE, make_model, make_tokenizer
from click.testing import CliRunner
from integration.architectures import tiny_model

from specdec import SpecDecoder
from specdec.cli import main
from specdec.drafters import skip
from specdec.drafters.skip import SkippedLayers
from specdec.drafters.weights import load_weights
from specdec.model_shape import ModelShape
from specdec.target import HFTarget
from specdec.training.calibrate import RANKS, CalibrationReporter, CalibrationRequest
from specdec.training.skip import (
    Layers,
    ReadText,
    SearchOptions,
    Subset,
    calibrate_skip,
    cost_of,
    measure,
    neighbours,
    search,
    speedup_of,
)
from specdec.training.texts import TrainingText
from specdec.tree import TokenTree

TEXT = TrainingText((5, 6, 7, 8), (9, 30, 31, 50, 7, 12))
# Float64 rounding, 1e-16, of sums of some hundred products, through a few layers, of entries of order 10.
TOLERANCE = 1e-9
REPLIES = [
    "The quick brown fox jumps over the lazy dog.", "A rolling stone gathers no moss at all, they say.",
    "Still waters run deep, and slowly too.", "Every cloud has a silver lining.",
]  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_all_places_of_a_text_at_once_are_drafts_one_by_one(architecture: str) -> None:
    target = HFTarget(tiny_model(architecture, num_hidden_layers=4).double())
    tokens, first = [*TEXT.prompt_ids, *TEXT.reply_ids], len(TEXT.prompt_ids) - 1
    draft = SkippedLayers(target, [0, 2])
    found = list(ReadText(target, TEXT, max_len=100).draft(draft, levels=3))
    whole = target.model(torch.tensor([tokens]), use_cache=False).logits[0]
    compared = 0
    for level, (logits, chosen) in enumerate(found):
        places = [at for at in range(len(tokens)) if first <= at < len(tokens) - 1 and at >= level]
        assert chosen.tolist() == whole.argmax(-1)[places].tolist()
        assert len(logits) == len(places)
        for row, at in enumerate(places):
            start = at - level
            cache = target.new_cache(1, len(tokens) + 8)
            if start:
                target.extend([tokens[:start]], cache)
            for count in range(1, level + 2):
                tree = TokenTree(
                    torch.tensor([tokens[start : start + count]]), torch.arange(-1, count - 1).unsqueeze(0)
                )
                expected = draft.forward(tree, cache, count - 1)[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=TOLERANCE)
            compared += 1
    assert compared == 6 + 6 + 6


@torch.no_grad()
def test_all_layers_are_always_right_and_rates_are_counted_within_the_draft_vocabulary() -> None:
    target = HFTarget(tiny_model("llama", num_hidden_layers=4))
    texts = [ReadText(target, TEXT, max_len=100), ReadText(target, TEXT, max_len=8)]
    every = SkippedLayers(target, range(4))
    rates, places = measure(texts, every, 2, None)
    assert [row[0] for row in rates] == [1.0, 1.0]
    assert all(sum(row) == 1.0 and len(row) == RANKS for row in rates)
    assert places == [6 + 4, 6 + 4]

    chosen = int(texts[0].chosen[4])
    others = [token for token in range(target.vocab_size) if token != chosen]
    head = torch.nn.Linear(64, len(others), bias=False)
    head.weight.copy_(target.model.lm_head.weight[others])
    missed, _ = measure(texts, SkippedLayers(target, range(4), head), 1, torch.tensor(others))
    right = sum(int((text.chosen[3:-1] != chosen).sum()) for text in texts)
    assert missed[0][0] == pytest.approx(right / 10)
    assert right < 10
    with pytest.raises(ValueError, match="no text is long enough for a guess"):
        measure([], every, 1, None)


def test_what_a_draft_costs_and_saves() -> None:
    shape = ModelShape(
        weights=0, layers=4, hidden=8, inner=16, queries=8, keys=4, cached=16, group=2, vocab=100, element=2
    )  # a layer has 8 * (16 + 8 + 48) = 576 weights, the head 800
    assert cost_of(shape, 4, 0) == 1.0
    assert cost_of(shape, 2, 50) == pytest.approx((2 * 576 + 400) / (4 * 576 + 800))

    rates = [[0.8], [0.5]]
    # one draft: 1.8 tokens for 1.25; two: 2.2 for 1.5; three, the last as good as the second: 2.4 for 1.75
    assert speedup_of(rates, 0.25, depth=1) == pytest.approx(1.8 / 1.25)
    assert speedup_of(rates, 0.25, depth=3) == pytest.approx(2.2 / 1.5)
    assert speedup_of(rates, 2.0, depth=3) == pytest.approx(1.8 / 3.0)


def test_neighbours_differ_by_one_layer() -> None:
    found = neighbours((0, 2), 4)
    assert sorted(found) == sorted([(0,), (2,), (0, 1, 2), (0, 2, 3), (1, 2), (2, 3), (0, 1), (0, 3)])
    assert neighbours((1,), 2) == [(0, 1), (0,)]


def planted(best: Layers, tried: list[Layers]) -> Any:
    """A score that falls with every layer that is missing or too many."""

    def score(layers: Layers) -> Subset:
        tried.append(layers)
        return Subset(layers, [[0.0]], [1], 0.0, -len({*layers} ^ {*best}))

    return score


def test_the_search_climbs_to_the_best_and_measures_nothing_twice() -> None:
    best, tried = (0, 1, 4, 7, 9), []  # type: ignore[var-annotated]
    found = search(10, planted(best, tried), trials=400)
    assert found.layers == best
    assert len(tried) == len(set(tried)) < 400
    assert (0, 1, 2, 3, 4) in tried[:10]
    assert (0, 2, 4, 7, 9) in tried[:10]

    again: list[Layers] = []
    search(10, planted(best, again), trials=400)
    assert again == tried
    few: list[Layers] = []
    steps: list[tuple[int, int]] = []
    search(10, planted(best, few), trials=13, progress=lambda done, total: steps.append((done, total)))
    assert few == tried[:13]
    assert steps[-1] == (13, 13)


def test_of_a_model_with_one_layer_it_is_the_one() -> None:
    assert search(1, planted((0,), []), trials=5).layers == (0,)


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


def test_the_layers_found_are_kept_with_rates_of_texts_that_were_not_searched_on(tmp_path: Path, data: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    target = HFTarget(make_model(tokenizer))
    request = CalibrationRequest("skip", str(tmp_path / "layers"), tmp_path / "cache", tokens=1000, data=data)
    options = SearchOptions(trials=3, levels=2, vocab_size=120)
    subset, found = calibrate_skip(request, target, tokenizer, CalibrationReporter(), options)
    weights = load_weights(tmp_path / "layers")
    assert weights.shape == {"layers": list(subset.layers)}
    vocabulary = weights.tensors["vocabulary"]
    assert len(vocabulary) == 120
    assert weights.facts["calibration"]["texts"] == 2
    # Each reply's tokens and its end are guessed: those of the second and the fourth text.
    assert found.positions[0] == sum(len(tokenizer(reply).input_ids) + 1 for reply in REPLIES[1::2])
    for kept, rates in zip(weights.hit_rates, found.hit_rates, strict=True):
        assert kept == pytest.approx(rates, abs=5e-5)

    prompts = [[5, 6, 7, 8], [9] * 6]
    plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=20)
    decoder = SpecDecoder(
        target, "skip", drafter_options={"weights": str(tmp_path / "layers")}, on_drafter_error="raise", adaptive=False
    )
    assert [r.token_ids for r in decoder.generate(prompts, max_new_tokens=20)] == [r.token_ids for r in plain]
    assert decoder.stats.drafted > 0


def test_layers_found_are_kept_for_their_target_alone_and_give_way_to_what_is_asked_for(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skip, "KEPT", tmp_path / "kept")
    tokenizer = make_tokenizer(TEMPLATE)
    target = HFTarget(tiny_model("llama", num_hidden_layers=4, vocab_size=len(tokenizer)))
    stranger = HFTarget(tiny_model("llama", num_hidden_layers=5))
    request = CalibrationRequest("skip", "", tmp_path / "cache", tokens=1000, data=data)
    subset, found = calibrate_skip(request, target, tokenizer, CalibrationReporter(), SearchOptions(trials=1))
    assert found.folder.parent == tmp_path / "kept"

    def layers_of(bound_to: HFTarget, **options: Any) -> tuple[int, ...]:
        drafter = skip.SkipDrafter(skip.SkipConfig(**options))
        drafter.bind(bound_to, None)
        return drafter.layers

    assert subset.layers == layers_of(target) == (0,)
    assert layers_of(target, layers="1") == (1,)
    assert layers_of(target, count=3) == layers_of(target, weights=str(found.folder), count=3) == (0, 2, 3)
    assert layers_of(stranger) == (0, 3, 4)  # two thirds of them
    (found.folder / "config.json").write_text("{")  # damaged: as if there were none
    assert layers_of(target) == (0, 2, 3)


def test_what_cannot_be_searched_is_refused(tmp_path: Path, data: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    target = HFTarget(make_model(tokenizer))
    request = CalibrationRequest("skip", str(tmp_path / "layers"), tmp_path / "cache", tokens=10, data=data)
    with pytest.raises(ValueError, match="a search takes at least 2 texts, there are 1"):
        calibrate_skip(request, target, tokenizer, CalibrationReporter())
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        SearchOptions(trials=0)


def test_the_command_finds_layers(tmp_path: Path, data: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["calibrate", "-d", "skip", "-m", str(tmp_path / "model"), "--data", str(data), "--dtype", "fp32"]
    result = CliRunner().invoke(main, [*arguments, "-o", f"weights={tmp_path / 'layers'}", "-o", "trials=2"])
    assert result.exit_code == 0, result.output
    assert "a draft pass reads" in result.output
    assert load_weights(tmp_path / "layers").drafter == "skip"
    wrong = CliRunner().invoke(main, [*arguments, "-o", f"weights={tmp_path / 'layers'}", "-o", "tryals=2"])
    assert wrong.exit_code != 0
    assert "did you mean 'trials'" in str(wrong.output) + str(wrong.exception)
