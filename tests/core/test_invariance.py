"""For a seed, coupled match emits the same text whatever is drafted and whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
from models import random_model

from specdec import KeptPrefix, SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.registry import create_drafter
from specdec.target import HFTarget

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [9, 10, 11], [30], [40, 41, 42, 40, 41]]
SETTINGS = [
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model()


def several_drafters(model: Any) -> list[Drafter]:
    return [
        create_drafter("ngram", {"max_nodes": 5, "depth": 3}),
        create_drafter("ngram", {"max_nodes": 24}),
        create_drafter("suffix"),
        create_drafter("recycling", {"max_nodes": 12, "depth": 2}),
        create_drafter("recycling"),
        ModelDrafter(ModelConfig(depth=2, beams=2, max_nodes=5), model=model),
        ModelDrafter(ModelConfig(depth=4, beams=3), model=random_model(seed=3)),
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"T={s['temperature']}")
def test_text_for_a_seed_depends_on_neither_drafter_nor_tree_nor_batch(model: Any, settings: dict[str, Any]) -> None:
    target = HFTarget(model)
    plain = SpecDecoder(target, "none")
    expected = [plain.generate(p, max_new_tokens=20, seed=7, **settings).token_ids for p in PROMPTS]
    for drafter in several_drafters(model):
        decoder = SpecDecoder(target, drafter, on_drafter_error="raise")
        assert [decoder.generate(p, max_new_tokens=20, seed=7, **settings).token_ids for p in PROMPTS] == expected
        batched = decoder.generate(PROMPTS, max_new_tokens=20, seed=7, **settings)
        assert [result.token_ids for result in batched] == expected, drafter.name


def test_the_same_draft_model_is_accepted_at_every_temperature(model: Any) -> None:
    """The drafter ranks with the target's own noise, so a perfect drafter is always right."""
    decoder = SpecDecoder(model, ModelDrafter(ModelConfig(depth=4, beams=2), model=model))
    decoder.generate(PROMPTS[0], max_new_tokens=40, temperature=1.2, seed=1, ignore_eos=True)
    assert decoder.stats.acceptance_by_depth[0] == 1.0


def test_completions_of_a_prompt_differ_and_a_seed_repeats_them(model: Any) -> None:
    decoder = SpecDecoder(model, "recycling")
    first = [r.token_ids for r in decoder.generate(PROMPTS[0], n=4, temperature=1.0, seed=5, max_new_tokens=12)]
    again = [r.token_ids for r in decoder.generate(PROMPTS[0], n=4, temperature=1.0, seed=5, max_new_tokens=12)]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 4
    unseeded = [r.token_ids for r in decoder.generate(PROMPTS[0], n=2, temperature=1.0, max_new_tokens=12)]
    assert unseeded[0] != unseeded[1]


def test_results_of_several_prompts_and_completions_are_prompt_major(model: Any) -> None:
    results = SpecDecoder(model, "none").generate(PROMPTS[:2], n=2, temperature=1.0, max_new_tokens=3)
    assert [(r.prompt_index, r.completion_index) for r in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_streaming_emits_the_same_tokens_as_generate(model: Any) -> None:
    decoder = SpecDecoder(model, "recycling")
    expected = decoder.generate(PROMPTS[0], max_new_tokens=30).token_ids
    with decoder.stream(PROMPTS[0], max_new_tokens=30) as stream:
        pieces = list(stream)
    assert [piece.token_id for piece in pieces] == expected
    assert sum(piece.from_draft for piece in pieces) <= stream.stats.accepted
    assert stream.result.token_ids == expected


def test_a_kept_prefix_changes_nothing_but_the_work(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target, kept = HFTarget(model), KeptPrefix()
    decoder = SpecDecoder(target, "ngram")
    with decoder.stream(PROMPTS[0], max_new_tokens=10, ignore_eos=True, kept=kept) as stream:
        list(stream)
    longer = PROMPTS[0] + stream.result.token_ids + [3, 4]
    expected = decoder.generate(longer, max_new_tokens=10).token_ids
    fed: list[int] = []
    extend = target.extend

    def counting(rows: Any, *args: Any) -> Any:
        fed.append(sum(len(row) for row in rows))
        return extend(rows, *args)

    monkeypatch.setattr(target, "extend", counting)
    with decoder.stream(longer, max_new_tokens=10, kept=kept) as stream:
        list(stream)
    assert stream.result.token_ids == expected
    assert sum(fed) <= 3


def test_logprobs_are_the_targets_own(model: Any) -> None:
    import torch

    result = SpecDecoder(model, "recycling").generate(PROMPTS[0], max_new_tokens=20, logprobs=True)
    ids = torch.tensor([PROMPTS[0] + result.token_ids])
    with torch.no_grad():
        scores = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(result.token_ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(result.logprobs), expected, rtol=0, atol=1e-4)


def test_rejection_never_uses_noise_twice_in_rows_or_calls_that_share_a_seed(model: Any) -> None:
    """Drafts may stem from other rows and earlier calls; noise shared with those would bias what is accepted."""
    decoder = SpecDecoder(model, "recycling", verifier="rejection")
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    first = [r.token_ids for r in decoder.generate([PROMPTS[0]] * 2, **settings)]
    second = [r.token_ids for r in decoder.generate([PROMPTS[0]] * 2, **settings)]
    assert len({tuple(tokens) for tokens in first + second}) == 4
    fresh = SpecDecoder(model, "recycling", verifier="rejection")
    assert [r.token_ids for r in fresh.generate([PROMPTS[0]] * 2, **settings)] == first
