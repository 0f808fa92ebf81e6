"""Through the whole decoder, sampled text has the target's distribution: chi-square against exact enumeration.

The expected probabilities come from transformers' own logits and a filter written out here, not from the library's.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from integration.architectures import tiny_model
from specdec import SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.registry import create_drafter
from specdec.target import HFTarget
from specdec.verifiers.base import Verifier
from specdec.verifiers.match import CoupledVerifier
from specdec.verifiers.rejection import RejectionConfig, RejectionVerifier
from specdec.verifiers.typical import TypicalConfig, TypicalVerifier

VOCAB = 7
PROMPT = [1, 2, 3, 1, 2]
LENGTH = 3
DRAWS = 1200
SETTINGS: dict[str, dict[str, float]] = {
    "T=0.7": {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    "T=1.3": {"temperature": 1.3, "top_k": 6, "top_p": 0.85},
    "T=1.3, min-p, penalty": {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.3},
}
DRAFTERS = ("none", "ngram", "recycling", "lookahead", "skip", "model")
VERIFIERS: dict[str, Verifier] = {
    "coupled": CoupledVerifier(),
    "rejection, ranked": RejectionVerifier(RejectionConfig(siblings="deterministic")),
    "rejection, with replacement": RejectionVerifier(RejectionConfig(siblings="with_replacement")),
    "rejection, without replacement": RejectionVerifier(RejectionConfig(siblings="without_replacement")),
}
TESTS = len(SETTINGS) * len(DRAFTERS) * len(VERIFIERS)
SIGNIFICANCE = 1e-4 / TESTS
"""Bonferroni: one false alarm in ten thousand over all of this file; seeds are fixed."""

Text = tuple[int, ...]


def small_model(seed: int = 0) -> Any:
    return tiny_model(seed=seed, vocab_size=VOCAB, eos_token_id=None, initializer_range=0.15)


@cache
def target() -> HFTarget:
    return HFTarget(small_model())


def choose_from(
    logits: list[float],
    seen: set[int],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> list[float]:
    """The distribution a token is drawn from, one token at a time."""
    penalised = [
        (x / repetition_penalty if x > 0 else x * repetition_penalty) if token in seen else x
        for token, x in enumerate(logits)
    ]
    weights = torch.tensor(penalised, dtype=torch.float64).div(temperature).softmax(0).tolist()
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    total, kept, mass = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        if mass < top_p:
            kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@cache
def expected(settings: str) -> dict[Text, float]:
    """Probability of every text of LENGTH tokens."""
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH - 1))
    with torch.inference_mode():
        logits = target().model(torch.tensor([PROMPT + list(text) for text in texts])).logits.double()
    joint: dict[Text, float] = {}
    for text, row in zip(texts, logits[:, len(PROMPT) - 1 :].tolist(), strict=True):
        probability, seen = 1.0, set(PROMPT)
        for position, token in enumerate(text):
            probability *= choose_from(row[position], seen, **SETTINGS[settings])[token]
            seen.add(token)
        for token, last in enumerate(choose_from(row[LENGTH - 1], seen, **SETTINGS[settings])):
            joint[*text, token] = probability * last
    return joint


def draw(drafter: Drafter, verifier: Verifier, settings: str, draws: int = DRAWS) -> tuple[Counter[Text], int]:
    """Texts by count, and how many drafted tokens were accepted."""
    decoder = SpecDecoder(target(), drafter, verifier=verifier, on_drafter_error="raise", adaptive=False)
    results = decoder.generate(PROMPT, n=draws, max_new_tokens=LENGTH, seed=11, ignore_eos=True, **SETTINGS[settings])
    return Counter(tuple(result.token_ids) for result in results), decoder.stats.accepted


def p_value(counts: Counter[Text], probabilities: dict[Text, float]) -> float:
    """Of Pearson's test; texts expected fewer than 5 times share a cell, impossible ones that occur give 0."""
    draws = sum(counts.values())
    if any(probabilities[text] == 0 for text in counts):
        return 0.0
    rare = {text for text, p in probabilities.items() if p * draws < 5}
    cells = [(counts[text], p * draws) for text, p in probabilities.items() if text not in rare]
    cells.append((sum(counts[text] for text in rare), sum(probabilities[text] for text in rare) * draws))
    cells = [(seen, mean) for seen, mean in cells if mean > 0]
    assert len(cells) > 10, "the distribution is too narrow to tell anything"
    return float(chi2.sf(sum((seen - mean) ** 2 / mean for seen, mean in cells), len(cells) - 1))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_text_has_the_targets_distribution(drafter: str, verifier: str, settings: str) -> None:
    made: Drafter = (
        ModelDrafter(ModelConfig(depth=2, beams=3), model=small_model(seed=4))
        if drafter == "model"
        else create_drafter(drafter)
    )
    counts, accepted = draw(made, VERIFIERS[verifier], settings)
    assert (accepted > DRAWS // 20) == (drafter != "none"), accepted
    assert p_value(counts, expected(settings)) > SIGNIFICANCE


def test_the_first_tokens_after_two_prompts_of_one_batch_have_their_own_distributions() -> None:
    """Rows of different lengths and contexts, together."""
    prompts = [PROMPT, PROMPT[:2]]
    decoder = SpecDecoder(target(), "ngram", verifier=RejectionVerifier(), on_drafter_error="raise")
    results = decoder.generate(prompts, n=DRAWS, max_new_tokens=2, seed=3, ignore_eos=True, temperature=1.3)
    for index, prompt in enumerate(prompts):
        counts = Counter(tuple(r.token_ids) for r in results if r.prompt_index == index)
        probabilities = {}
        with torch.inference_mode():
            logits = target().model(torch.tensor([[*prompt, token] for token in range(VOCAB)])).logits.double()
        for first, second in itertools.product(range(VOCAB), repeat=2):
            p = logits[first, len(prompt) - 1].div(1.3).softmax(0)[first]
            probabilities[first, second] = float(p * logits[first, len(prompt)].div(1.3).softmax(0)[second])
        assert p_value(counts, probabilities) > SIGNIFICANCE


def test_the_test_sees_that_typical_acceptance_is_lossy() -> None:
    """It takes any likely enough draft, so the planted n-gram continuation comes too often."""
    settings = "T=1.3"
    verifier = TypicalVerifier(TypicalConfig(epsilon=0.01, delta=0.01))
    counts, accepted = draw(create_drafter("ngram"), verifier, settings)
    assert accepted > DRAWS // 20
    assert p_value(counts, expected(settings)) < SIGNIFICANCE
    assert not verifier.lossless
    drafted = Counter(text[0] for text in counts.elements())[3]  # the prompt's own continuation of 1, 2
    fair = sum(p for text, p in expected(settings).items() if text[0] == 3)
    assert drafted / DRAWS > fair + 0.1
