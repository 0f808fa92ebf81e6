"""For a seed, the text depends on neither drafter, tree, batch, neighbours, streaming nor a kept prefix."""

from __future__ import annotations

from typing import Any

import pytest

from integration.architectures import VOCAB, tiny_model
from integration.scripted import ScriptedDrafter, bush, oracle, star
from specdec import KeptPrefix, SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.registry import create_drafter
from specdec.target import HFTarget
from specdec.verifiers.match import CoupledVerifier

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [9, 10, 11], [30], [40, 41, 42, 40, 41] * 3]
NEW_TOKENS = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy with repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.4},
    "cool, top-k": {"temperature": 0.5, "top_k": 20},
    "plain": {"temperature": 1.0},
    "min-p": {"temperature": 1.2, "min_p": 0.05},
    "hot, everything on": {
        "temperature": 1.6,
        "top_k": 50,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
    },
}
DRAFTERS = [
    ("ngram", {}),
    ("ngram", {"max_nodes": 4, "depth": 3, "max_matches": 1}),
    ("ngram", {"min_ngram": 1, "max_ngram": 1, "max_matches": 16, "max_nodes": 64}),
    ("suffix", {}),
    ("suffix", {"max_nodes": 40, "min_probability": 0.0, "depth": 3}),
    ("recycling", {}),
    ("recycling", {"max_nodes": 60, "candidates": 2, "depth": 5}),
    ("recycling", {"max_nodes": 9, "candidates": 8, "depth": 1}),
    ("lookahead", {}),
    ("lookahead", {"window": 3, "ngram": 2, "candidates": 5}),
    ("skip", {}),
    ("skip", {"layers": "1", "width": 3, "max_nodes": 20}),
    ("stranger", {"depth": 1, "beams": 8}),
    ("stranger", {"depth": 4, "beams": 3, "max_nodes": 40}),
    ("itself", {"depth": 3, "beams": 1}),
    ("itself", {"depth": 2, "beams": 4, "max_nodes": 6}),
]


def make_drafter(name: str, options: dict[str, Any], model: Any) -> Drafter:
    if name in ("stranger", "itself"):
        return ModelDrafter(ModelConfig(**options), model=model if name == "itself" else tiny_model(seed=3))
    return create_drafter(name, options)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.15)  # flatter, so that settings and seeds matter


@pytest.fixture(scope="module")
def target(model: Any) -> HFTarget:
    return HFTarget(model)


@pytest.fixture(scope="module", params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"max_new_tokens": NEW_TOKENS, "seed": 7, **SETTINGS[request.param]}


@pytest.fixture(scope="module")
def plain(target: HFTarget, settings: dict[str, Any]) -> list[list[int]]:
    """Each prompt alone, without a drafter."""
    decoder = SpecDecoder(target, "none")
    return [decoder.generate(prompt, **settings).token_ids for prompt in PROMPTS]


@pytest.mark.parametrize(("name", "options"), DRAFTERS, ids=lambda value: str(value))
def test_text_for_a_seed_depends_on_neither_drafter_nor_tree_nor_batch(
    model: Any, target: HFTarget, settings: dict[str, Any], plain: list[list[int]], name: str, options: dict[str, Any]
) -> None:
    decoder = SpecDecoder(target, make_drafter(name, options, model), on_drafter_error="raise")
    batched = decoder.generate(PROMPTS, **settings)
    assert [result.token_ids for result in batched] == plain
    assert decoder.stats.drafted > 0
    assert [decoder.generate(prompt, **settings).token_ids for prompt in PROMPTS] == plain


def test_text_for_a_seed_survives_trees_that_know_the_answer(
    target: HFTarget, settings: dict[str, Any], plain: list[list[int]]
) -> None:
    """Long accepted paths, scattered ones, and the whole vocabulary at once."""
    wholes = [prompt + tokens for prompt, tokens in zip(PROMPTS, plain, strict=True)]
    for propose in (oracle(wholes, 9), bush(wholes, VOCAB), star):
        decoder = SpecDecoder(target, ScriptedDrafter(propose), on_drafter_error="raise", adaptive=False)
        assert [r.token_ids for r in decoder.generate(PROMPTS, **settings)] == plain
        assert decoder.stats.accepted >= sum(len(tokens) for tokens in plain) // 3


def test_settings_lead_to_different_texts(target: HFTarget) -> None:
    """Else the comparisons above would compare little."""
    decoder = SpecDecoder(target, "none")
    found = {
        tuple(decoder.generate(PROMPTS[0], max_new_tokens=NEW_TOKENS, seed=seed, **fields).token_ids)
        for fields in SETTINGS.values()
        for seed in (1, 2)
    }
    assert len(found) == 2 * len(SETTINGS) - 1  # the seed means nothing to the greedy one


@pytest.mark.parametrize("name", ["ngram", "suffix", "recycling", "stranger"])
def test_completions_are_the_same_with_every_drafter(
    model: Any, target: HFTarget, settings: dict[str, Any], name: str
) -> None:
    expected = SpecDecoder(target, "none").generate(PROMPTS[:2], n=3, **settings)
    got = SpecDecoder(target, make_drafter(name, {}, model), on_drafter_error="raise").generate(
        PROMPTS[:2], n=3, **settings
    )
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
    order = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [(r.prompt_index, r.completion_index) for r in got] == order
    distinct = {tuple(r.token_ids) for r in got[:3]}
    assert len(distinct) == (1 if settings["temperature"] == 0 else 3)


def test_the_first_of_n_completions_is_the_only_one_of_one(target: HFTarget, settings: dict[str, Any]) -> None:
    decoder = SpecDecoder(target, "recycling")
    several = decoder.generate(PROMPTS[0], n=4, **settings)
    assert several[0].token_ids == decoder.generate(PROMPTS[0], **settings).token_ids


@pytest.mark.parametrize("name", ["none", "ngram", "recycling", "stranger"])
def test_a_row_does_not_depend_on_its_neighbours(
    model: Any, target: HFTarget, settings: dict[str, Any], plain: list[list[int]], name: str
) -> None:
    decoder = SpecDecoder(target, make_drafter(name, {}, model), on_drafter_error="raise")
    for order in ([0, 1], [1, 0], [3, 2, 1, 0], [2, 2, 2, 0]):
        results = decoder.generate([PROMPTS[index] for index in order], **settings)
        assert [r.token_ids for r in results] == [plain[index] for index in order]


def test_without_a_seed_texts_differ(target: HFTarget) -> None:
    decoder = SpecDecoder(target, "recycling")
    texts = {
        tuple(decoder.generate(PROMPTS[0], temperature=1.0, max_new_tokens=NEW_TOKENS).token_ids) for _ in range(3)
    }
    assert len(texts) == 3


def test_the_target_as_its_own_drafter_is_right_at_every_temperature(model: Any, target: HFTarget) -> None:
    """It ranks with the target's own noise."""
    for fields in SETTINGS.values():
        decoder = SpecDecoder(target, make_drafter("itself", {"depth": 4, "beams": 2}, model), adaptive=False)
        decoder.generate(PROMPTS[0], max_new_tokens=40, seed=1, ignore_eos=True, **fields)
        assert decoder.stats.acceptance_by_depth[0] == 1.0


@pytest.mark.parametrize("name", ["none", "ngram", "suffix", "recycling", "stranger"])
def test_streaming_emits_the_same_tokens_as_generate(
    model: Any, target: HFTarget, settings: dict[str, Any], plain: list[list[int]], name: str
) -> None:
    decoder = SpecDecoder(target, make_drafter(name, {}, model), on_drafter_error="raise")
    with decoder.stream(PROMPTS, **settings) as stream:
        pieces = list(stream)
    assert [r.token_ids for r in stream.results] == plain
    assert [[p.token_id for p in pieces if p.index == index] for index in range(len(PROMPTS))] == plain
    assert sum(p.from_draft for p in pieces) <= stream.stats.accepted


@pytest.mark.parametrize("name", ["none", "suffix", "recycling", "stranger"])
def test_a_kept_prefix_changes_nothing(model: Any, target: HFTarget, settings: dict[str, Any], name: str) -> None:
    """Continued, closed half-way, edited in the middle, replaced by a shorter and by an unrelated prompt."""
    decoder = SpecDecoder(target, make_drafter(name, {}, model), on_drafter_error="raise")
    fresh, kept = SpecDecoder(target, "none"), KeptPrefix()
    prompt, lengths = PROMPTS[3], []
    for turn in range(5):
        expected = fresh.generate(prompt, **settings).token_ids
        with decoder.stream(prompt, kept=kept, **settings) as stream:
            for index, _ in enumerate(stream):
                if turn == 1 and index == 2:
                    break
        got = stream.result.token_ids
        assert got == expected[: len(got)], turn
        assert turn == 1 or got == expected
        lengths.append(len(kept.tokens))
        prompt = [
            prompt + got + [3],
            prompt + got + [4, 5],
            [*prompt[:7], 60, *prompt[8:]],
            prompt[:5],
            [77, 78],
        ][turn]
    assert min(lengths) >= 5


def test_a_kept_prefix_is_not_computed_again(target: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, decoder = KeptPrefix(), SpecDecoder(target, "ngram")
    with decoder.stream(PROMPTS[3], max_new_tokens=10, ignore_eos=True, kept=kept) as stream:
        list(stream)
    fed: list[int] = []
    extend = target.extend

    def counting(rows: Any, *args: Any) -> Any:
        fed.append(sum(len(row) for row in rows))
        return extend(rows, *args)

    monkeypatch.setattr(target, "extend", counting)
    longer = PROMPTS[3] + stream.result.token_ids + [3, 4]
    with decoder.stream(longer, max_new_tokens=10, kept=kept) as stream:
        list(stream)
    assert sum(fed) <= 3


def test_a_policy_given_as_an_object_says_the_same_as_by_name(target: HFTarget) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": NEW_TOKENS}
    by_name = SpecDecoder(target, "recycling", verifier="coupled").generate(PROMPTS[0], **fields)
    given = SpecDecoder(target, "ngram", verifier=CoupledVerifier()).generate(PROMPTS[0], **fields)
    assert by_name.token_ids == given.token_ids


def test_logprobs_do_not_depend_on_the_drafter(model: Any, target: HFTarget, settings: dict[str, Any]) -> None:
    expected = SpecDecoder(target, "none").generate(PROMPTS, logprobs=True, **settings)
    for name in ("ngram", "stranger"):
        got = SpecDecoder(target, make_drafter(name, {}, model)).generate(PROMPTS, logprobs=True, **settings)
        for mine, theirs in zip(got, expected, strict=True):
            assert len(mine.logprobs) == len(mine.token_ids)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)  # float32, sums in another order
