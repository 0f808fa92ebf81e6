"""Hit rates of a trained drafter: how often its guess of each rank at each depth is right, on text it did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from specdec.drafters.weights import (
    DrafterWeights,
    TargetFacts,
    check_weights,
    find_weights,
    load_weights,
    write_config,
)
from specdec.target import HFTarget
from specdec.training.corpus import make_texts
from specdec.training.dataset import TrainingSet
from specdec.training.features import FeatureProgress, compute_features, group_by_length
from specdec.training.method import Method, TrainingBatch, create_method, expected_tau, method_class
from specdec.training.storage import writing
from specdec.training.synthesis import Progress, SynthesisSettings
from specdec.training.texts import TrainingText, texts_sha256

RANKS = 10
"""Ranks of a guess that are told apart."""

SEED_OFFSET = 1_000_003
"""Added to the training's seed, so that the target writes other texts."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate, on what.

    Attributes:
        drafter: name of the drafter.
        weights: folder of its weights; "" for those that ship.
        cache: folder of texts and hidden states.
        tokens: tokens of replies to look at.
        data: jsonl of prompts or conversations; None for the target's own.
        seed: of the texts; None for one apart from the training's.
        batch_tokens: padded tokens of a batch.
        max_len: tokens of a text that are used.
    """

    drafter: str
    weights: str
    cache: Path
    tokens: int = 20_000
    data: Path | None = None
    seed: int | None = None
    batch_tokens: int = 4096
    max_len: int = 512


@dataclass(frozen=True)
class CalibrationReporter:
    """What is told of a calibration, and to whom."""

    note: Callable[[str], None] = lambda _: None
    writing: Callable[[Progress], None] = lambda _: None
    features: Callable[[FeatureProgress], None] = lambda _: None
    batch: Callable[[int, int], None] = lambda _done, _total: None


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        folder: the weights' folder, whose config.json holds the rates now.
        hit_rates: ``[D][R]`` chance that the rank-r guess at depth d + 1 is right, the true tokens before it given.
        positions: places looked at per depth.
    """

    folder: Path
    hit_rates: list[list[float]]
    positions: list[int] = field(default_factory=list)

    @property
    def expected_tau(self) -> float:
        """Estimate of tokens per target pass of a greedy chain."""
        return expected_tau([rates[0] for rates in self.hit_rates])


def calibrate_drafter(
    request: CalibrationRequest, target: HFTarget, tokenizer: Any | None, report: CalibrationReporter
) -> Calibration:
    """Measure a drafter's hit rates and write them into its folder.

    Args:
        request: what is wanted.
        target: the model it drafts for.
        tokenizer: its tokenizer; None for a model that comes without.
        report: told how it goes.

    Raises:
        ValueError: for weights that are missing, damaged or for another target, a drafter that is not trained, damaged
            texts, a full disk.
    """
    method_class(request.drafter)
    facts = TargetFacts.of(target)
    folder = find_weights(request.drafter, request.weights, facts)
    weights = load_weights(folder)
    check_weights(weights, request.drafter, facts)
    method = load_method(weights, target)
    trained_on: Mapping[str, Any] = weights.facts.get("texts") or {}
    seed = request.seed
    if seed is None:
        seed = int((trained_on.get("synthesis") or {}).get("seed", 0)) + SEED_OFFSET
    settings = SynthesisSettings(seed=seed, sampled_every=0)  # greedy replies: what the first guess is compared with
    store = make_texts(
        target, tokenizer, request.cache, settings, request.tokens, request.data, report.writing, report.note
    )
    texts, data = store.first(request.tokens), store.origin["data"]
    if data is not None and data["sha256"] == (trained_on.get("data") or {}).get("sha256"):
        report.note(f"{data['name']} is what the drafter was trained on: the rates will be too high for other text")
    features = compute_features(
        target, store.texts, request.cache / "features", method.features, request.max_len, report.features
    )
    features.check(method.features)
    dataset = TrainingSet(texts, features, method.features, max_len=request.max_len, batch_tokens=request.batch_tokens)
    hit_rates, positions = measure(method, list(all_batches(dataset, texts, request)), report.batch)
    about = {
        "texts": len(texts),
        "sha256": texts_sha256(texts),
        "positions": positions,
        "data": data,
        "seed": seed,
    }
    with writing(folder):
        write_config(folder, replace(weights, hit_rates=hit_rates, facts={**weights.facts, "calibration": about}))
    return Calibration(folder, hit_rates, positions)


def load_method(weights: DrafterWeights, target: HFTarget) -> Method:
    """The training method that weights belong to, with them in its module.

    Options come from the module's shape, and from the facts of the training where it is silent.
    """
    kind = method_class(weights.drafter)
    known = {option.name for option in fields(kind.Options)}
    trained = {name: value for name, value in (weights.facts.get("options") or {}).items() if name in known}
    options = trained | kind.options_of(weights.shape)
    method = create_method(weights.drafter, target, options)
    counts = torch.zeros(target.vocab_size, dtype=torch.int64)
    vocabulary = weights.tensors.get("vocabulary")
    if vocabulary is not None:
        counts[vocabulary] = 1  # the most frequent tokens are these then
    method.prepare(counts)
    made = method.module.state_dict().get("vocabulary")
    if vocabulary is not None and (made is None or not torch.equal(made.cpu(), vocabulary)):
        raise ValueError(
            f"the vocabulary of these weights of drafter {weights.drafter!r} is not one its training makes"
        )
    weights.load_into(method.module)
    return method


def all_batches(
    dataset: TrainingSet, texts: Sequence[TrainingText], request: CalibrationRequest
) -> Iterator[TrainingBatch]:
    """Every text that has something to guess; none of these was trained on, so none is held out."""
    usable = sorted(dataset.training + dataset.held_out)
    lengths = [min(len(texts[index]), request.max_len) for index in usable]
    for group in group_by_length(lengths, request.batch_tokens):
        yield dataset.collate([usable[place] for place in group])


@torch.no_grad()
def measure(
    method: Method, batches: Sequence[TrainingBatch], progress: Callable[[int, int], None] = lambda _done, _total: None
) -> tuple[list[list[float]], list[int]]:
    """``[D][R]`` hit rates over batches, and the places looked at per depth.

    Raises:
        ValueError: where there is no place to look at.
    """
    method.module.eval()
    device = next(method.module.parameters()).device
    hits = totals = torch.zeros(0)
    for done, batch in enumerate(batches):
        found, seen = method.hits(batch.to(device), RANKS)
        hits = found.cpu().double() if not hits.numel() else hits + found.cpu()
        totals = seen.cpu().double() if not totals.numel() else totals + seen.cpu()
        progress(done + 1, len(batches))
    if not totals.numel() or float(totals[0]) == 0:
        raise ValueError("no text is long enough for a guess: give more --tokens or other --data")
    rates = hits / totals.clamp(min=1).unsqueeze(1)
    return rates.tolist(), [int(total) for total in totals.tolist()]
