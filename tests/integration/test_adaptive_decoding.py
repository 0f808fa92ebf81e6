"""Speculation that comes and goes changes passes and nodes, never the text."""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from integration.architectures import VOCAB, tiny_model
from integration.scripted import ScriptedDrafter, chain, oracle
from integration.untrained import untrained_eagle, untrained_ppd
from specdec import SpecDecoder
from specdec.adaptive import CREDIT, SHARE
from specdec.batch import Row
from specdec.drafters.base import Drafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.latency import LatencyCurve
from specdec.missed import MOST_NODES
from specdec.policy import NO_LIMIT
from specdec.registry import create_drafter
from specdec.target import HFTarget
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

PROMPT = [5, 6, 7, 8, 5, 6]
OTHER = [9, 10, 9]
LENGTH = 160
FLAT = LatencyCurve.simple({1: 1e6, 8: 1.1e6, 16: 1.2e6, 64: 1.8e6})  # milliseconds: what drafts really take is nothing


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.15)


@pytest.fixture(scope="module")
def target(model: Any) -> HFTarget:
    return HFTarget(model)


def plain_texts(target: HFTarget, prompts: Sequence[Sequence[int]], **fields: Any) -> list[list[int]]:
    decoder = SpecDecoder(target, "none")
    return [decoder.generate(list(p), max_new_tokens=LENGTH, ignore_eos=True, **fields).token_ids for p in prompts]


class OnAndOff:
    """A policy that speculates in bursts, and has drafts made now and then that no pass checks."""

    reason = "planted"
    trying = False

    def __init__(self) -> None:
        self.step, self.beside, self.held = 0, 1, 0

    def budget(self, rows: Sequence[Row], most: int = NO_LIMIT) -> int:
        self.step += 1
        budget = (1, 1, 1, 6, 1, 24, 24, *[1] * 40)[self.step % 47]
        self.beside = 5 if budget == 1 and self.step % 9 == 1 else 1
        return budget

    def hold(self, rows: Sequence[Row], tree: TokenTree) -> None:
        assert len(rows) == tree.batch_size
        assert self.beside > 1
        self.held += 1

    def observe(self, rows: Sequence[Row], tree: TokenTree, verdict: Verdict, ms: dict[str, float] | None) -> None:
        assert len(rows) == tree.batch_size == len(verdict.num_accepted)
        assert ms["target"] > 0


def always_wrong(texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], depth: int = 12) -> ScriptedDrafter:
    wholes = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    return ScriptedDrafter(chain(lambda index, tokens: [(t + 1) % VOCAB for t in wholes[index][len(tokens) :][:depth]]))


def test_hostile_text_is_decoded_plainly_but_for_a_few_narrow_passes(target: HFTarget) -> None:
    texts = plain_texts(target, [PROMPT])
    decoder = SpecDecoder(target, always_wrong(texts, [PROMPT]), latency=FLAT, on_drafter_error="raise")
    result = decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    assert result.token_ids == texts[0]
    stats = result.stats
    assert (stats.passes, stats.accepted, stats.speculation_off) == (LENGTH, 0, None)
    assert stats.passes - stats.plain_passes <= 0.15 * LENGTH
    # A node costs at most 1 / 70 of a plain pass on this curve.
    assert stats.drafted / 70 <= SHARE * LENGTH + CREDIT <= 0.03 * LENGTH
    assert "accepted per pass of late" in (stats.plain_reason or "")
    assert stats.to_json()["plain_passes"] == stats.plain_passes


NOISY = {"initializer_range": 0.15, "temperature": 50.0}  # at such a temperature the model writes random tokens
CHAOTIC = {"initializer_range": 0.3, "temperature": 0.0}
"""PPD draws its guesses by the noise that the target's tokens are drawn by: of random tokens it would guess most."""


@pytest.mark.parametrize("kind", ["random tokens", "base64"])
@pytest.mark.parametrize("drafter", ["ngram", "suffix", "recycling", "eagle", "suffix+eagle", "ppd"])
def test_noise_is_decoded_plainly_by_every_drafter(kind: str, drafter: str) -> None:
    text = CHAOTIC if drafter == "ppd" else NOISY
    generator = random.Random(0)
    noise = [generator.randrange(VOCAB) for _ in range(400)]
    if kind == "base64":
        noise = [byte % VOCAB for byte in base64.b64encode(generator.randbytes(300))]
    model = tiny_model(initializer_range=text["initializer_range"], max_position_embeddings=1024)
    target = HFTarget(model)
    decoder = SpecDecoder(target, for_noise(drafter, target), latency=FLAT, on_drafter_error="raise")
    fields: dict[str, Any] = {"max_new_tokens": 300, "temperature": text["temperature"], "seed": 3, "ignore_eos": True}
    stats = decoder.generate(noise, **fields).stats
    assert stats.drafted > 0
    lost = (stats.drafted / 70) - stats.accepted
    assert lost <= SHARE * 300 + CREDIT
    assert stats.plain_passes >= 0.7 * stats.passes
    assert re.search("accepted per pass of late|no more may be lost in trying", stats.plain_reason or "")


def for_noise(name: str, target: HFTarget) -> Drafter:
    made = {"eagle": untrained_eagle, "ppd": untrained_ppd}
    parts = [made[part](target) if part in made else create_drafter(part) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else HybridDrafter(parts)


def test_good_text_is_never_decoded_plainly(target: HFTarget) -> None:
    texts = plain_texts(target, [PROMPT])
    decoder = SpecDecoder(target, ScriptedDrafter(oracle([PROMPT + texts[0]])), latency=FLAT)
    stats = decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).stats
    assert (stats.passes, stats.plain_passes, stats.plain_reason) == (-(-LENGTH // 7), 0, None)


def test_one_wrong_row_of_a_batch_does_not_stop_the_other(target: HFTarget) -> None:
    texts = plain_texts(target, [PROMPT, OTHER])
    half = [[*PROMPT, *texts[0]], [*OTHER, *([0] * LENGTH)]]
    decoder = SpecDecoder(target, ScriptedDrafter(oracle(half)), latency=FLAT)
    results = decoder.generate([PROMPT, OTHER], max_new_tokens=LENGTH, ignore_eos=True)
    assert [result.token_ids for result in results] == texts
    assert results[0].stats.plain_passes == 0
    assert results[1].stats.plain_passes > LENGTH // 2  # alone with its wrong drafts


DRAFTERS = ["ngram", "suffix", "recycling", "lookahead", "skip", "model"]


def make_drafter(name: str, model: Any) -> Any:
    return ModelDrafter(ModelConfig(depth=3), model=model) if name == "model" else create_drafter(name)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_the_same_however_speculation_comes_and_goes(
    model: Any, target: HFTarget, name: str, sampled: bool
) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 5} if sampled else {}
    texts = plain_texts(target, [PROMPT, OTHER], **fields)
    decoder = SpecDecoder(target, make_drafter(name, model), on_drafter_error="raise")
    decoder._pick_policy = lambda *_: OnAndOff()  # type: ignore[method-assign]
    results = decoder.generate([PROMPT, OTHER], max_new_tokens=LENGTH, ignore_eos=True, **fields)
    assert [result.token_ids for result in results] == texts
    assert 0 < decoder.stats.plain_passes < decoder.stats.passes
    assert decoder.stats.drafted > 0


class Witness(ScriptedDrafter):
    """Keeps what it is shown of the committed tokens, and their hidden states, by prompt."""

    features = ("last",)

    def __init__(self, propose: Any) -> None:
        super().__init__(propose)
        self.tokens: list[list[int]] = [[], []]
        self.states: list[list[torch.Tensor]] = [[], []]
        self.most_at_once = 0

    def observe(self, *seen: Any) -> None:
        batch, tree, output, verdict = seen
        tree.validate(batch.vocab_size)
        assert output.logits.shape[:2] == output.features["last"].shape[:2] == tree.tokens.shape
        for index, (row, count) in enumerate(zip(batch.rows, verdict.num_accepted, strict=True)):
            path = verdict.path[index, : count + 1]
            assert tree.tokens[index, path[1:]].tolist() == verdict.tokens[index][:-1]
            assert len(verdict.tokens[index]) == count + 1
            self.tokens[row.prompt_index] += tree.tokens[index, path].tolist()
            self.states[row.prompt_index] += list(output.features["last"][index, path])
            self.most_at_once = max(self.most_at_once, count + 1)


def test_a_drafter_is_shown_all_that_was_decoded_without_it(target: HFTarget) -> None:
    texts = plain_texts(target, [PROMPT, OTHER])
    drafter = Witness(chain(lambda index, tokens: [*PROMPT, *texts[0]][len(tokens) :][:4]))  # right for one of them
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise")
    policy = OnAndOff()
    decoder._pick_policy = lambda *_: policy  # type: ignore[method-assign]
    results = decoder.generate([PROMPT, OTHER], max_new_tokens=LENGTH, ignore_eos=True)
    assert policy.held > 0
    assert [result.token_ids for result in results] == texts
    assert 5 < drafter.most_at_once <= MOST_NODES
    for prompt, text, seen, states in zip((PROMPT, OTHER), texts, drafter.tokens, drafter.states, strict=True):
        assert seen == [prompt[-1], *text][: len(seen)]
        assert len(seen) >= LENGTH - MOST_NODES  # the last ones no draft needed
        whole = [*prompt[:-1], *seen]
        with torch.inference_mode():
            exact = target.extend([whole], target.new_cache(1, len(whole)), ("last",)).features["last"][0]
        assert torch.allclose(torch.stack(states), exact[len(prompt) - 1 :], atol=1e-4)


def test_with_a_seed_trees_of_the_rejection_policy_stay_as_they_are(target: HFTarget) -> None:
    texts = plain_texts(target, [PROMPT])
    fields: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.7, "ignore_eos": True}
    passes = []
    for seed in (3, None):
        decoder = SpecDecoder(target, always_wrong(texts, [PROMPT]), verifier="rejection", latency=FLAT)
        passes.append(decoder.generate(PROMPT, seed=seed, **fields).stats.plain_passes)
    assert passes[0] <= 1 < passes[1]  # the very last pass has no room for a draft


def test_adaptive_false_leaves_every_tree_to_the_drafter(target: HFTarget) -> None:
    texts = plain_texts(target, [PROMPT])
    decoder = SpecDecoder(target, always_wrong(texts, [PROMPT]), adaptive=False)
    stats = decoder.generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True).stats
    assert (stats.plain_passes, stats.plain_reason) == (1, None)
