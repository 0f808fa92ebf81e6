"""Through the whole decoder, sampled text has the target's distribution: chi-square against exact enumeration."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from models import random_model
from scipy.stats import chi2

from specdec import SamplingParams, SpecDecoder
from specdec.drafters.base import Drafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.registry import create_drafter
from specdec.sampling import log_probs
from specdec.target import HFTarget
from specdec.verifiers.base import Verifier
from specdec.verifiers.match import CoupledVerifier
from specdec.verifiers.rejection import RejectionConfig, RejectionVerifier

VOCAB = 6
PROMPT = [1, 2, 3, 1, 2]
LENGTH = 3
DRAWS = 1500
SETTINGS = [{"temperature": 0.7, "top_k": 4}, {"temperature": 1.3, "top_p": 0.9}]
SIGNIFICANCE = 1e-4 / 24  # over all cases of this file


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(vocab_size=VOCAB, eos_token_id=None, initializer_range=0.15)


def joint(model: Any, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Probability of every text of LENGTH tokens."""
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + list(text[:-1]) for text in texts])).logits[:, len(PROMPT) - 1 :]
    chosen = log_probs(logits.flatten(0, 1).double(), params).view(len(texts), LENGTH, VOCAB)
    total = chosen.gather(2, torch.tensor(texts).unsqueeze(2)).squeeze(2).sum(1).exp()
    return dict(zip(texts, total.tolist(), strict=True))


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's test, with cells expecting fewer than 5 merged into one; 0 where the impossible happened."""
    draws = sum(counts.values())
    if any(expected[text] < 1e-9 for text in counts):
        return 0.0
    rare = [text for text, p in expected.items() if p * draws < 5]
    cells = [(counts[text], p * draws) for text, p in expected.items() if p * draws >= 5]
    cells.append((sum(counts[text] for text in rare), sum(expected[text] for text in rare) * draws))
    cells = [(seen, mean) for seen, mean in cells if mean > 0]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def draw(model: Any, drafter: Drafter, verifier: Verifier, settings: dict[str, Any]) -> Counter[tuple[int, ...]]:
    decoder = SpecDecoder(HFTarget(model), drafter, verifier=verifier, on_drafter_error="raise")
    results = decoder.generate(PROMPT, n=DRAWS, max_new_tokens=LENGTH, seed=11, ignore_eos=True, **settings)
    return Counter(tuple(result.token_ids) for result in results)


VERIFIERS = {
    "coupled": CoupledVerifier(),
    "rejection, ranked": RejectionVerifier(RejectionConfig("deterministic")),
    "rejection, with replacement": RejectionVerifier(RejectionConfig("with_replacement")),
    "rejection, without replacement": RejectionVerifier(RejectionConfig("without_replacement")),
}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("drafter", ["ngram", "recycling", "model"])
def test_sampled_text_has_the_targets_distribution(
    model: Any, drafter: str, verifier: str, settings: dict[str, Any]
) -> None:
    stranger = random_model(seed=4, vocab_size=VOCAB, eos_token_id=None, initializer_range=0.15)
    options = ModelConfig(depth=2, beams=2)
    made = ModelDrafter(options, model=stranger) if drafter == "model" else create_drafter(drafter)
    counts = draw(model, made, VERIFIERS[verifier], settings)
    assert p_value(counts, joint(model, SamplingParams(**settings))) > SIGNIFICANCE


def test_the_test_sees_a_distribution_that_is_off(model: Any) -> None:
    """Typical acceptance is lossy, and the same test says so."""
    from specdec.verifiers.typical import TypicalConfig, TypicalVerifier

    settings = {"temperature": 1.3}
    perfect = ModelDrafter(ModelConfig(depth=2, beams=1), model=model)
    counts = draw(model, perfect, TypicalVerifier(TypicalConfig(epsilon=0.01, delta=0.01)), settings)
    coupled = draw(model, perfect, CoupledVerifier(), settings)
    expected = joint(model, SamplingParams(**settings))
    assert p_value(coupled, expected) > SIGNIFICANCE
    stranger = create_drafter("ngram")
    counts = draw(model, stranger, TypicalVerifier(TypicalConfig(epsilon=0.01, delta=0.01)), settings)
    assert p_value(counts, expected) < SIGNIFICANCE
