"""Which layers of a target draft best for it: a search on texts it wrote, by acceptance over cost.

How often a subset is right is measured as it drafts. The whole model reads a text once; then the subset reads all of
its places at the same time, each seeing the whole model's keys and values of the tokens before it and the subset's own
of what was drafted since. Nothing is trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.heads import drafting_head, make_vocabulary
from specdec.drafters.pruned import choose_layers, spaced_layers
from specdec.drafters.skip import NAME, SkippedLayers, kept_folder
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.model_shape import ModelShape
from specdec.target import HFTarget
from specdec.training.calibrate import (
    RANKS,
    SEED_OFFSET,
    Calibration,
    CalibrationReporter,
    CalibrationRequest,
)
from specdec.training.corpus import make_texts
from specdec.training.storage import writing
from specdec.training.synthesis import SynthesisSettings
from specdec.training.texts import TrainingText, texts_sha256

_SHARES = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
"""Sizes of the subsets the search begins with, of the target's layers."""

Layers = tuple[int, ...]


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search.

    Attributes:
        trials: subsets measured.
        levels: draft passes measured, one behind the other.
        depth: most draft passes of a step that the score considers.
        vocab_size: tokens that can be drafted, the most frequent ones of the texts; 0 for all.
    """

    trials: int = 40
    levels: int = 2
    depth: int = 5
    vocab_size: int = 8192

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("levels", 1), ("depth", 1), ("vocab_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Subset:
    """A subset that was measured.

    Attributes:
        layers: their indices.
        hit_rates: ``[levels][RANKS]`` chance that the rank-r guess of a draft pass is what the whole model chooses.
        positions: places looked at per level.
        cost: of a draft pass, in passes of the whole model, by the weights that are read.
        speedup: of the best chain of such drafts, if a pass over it takes as long as one over a token.
    """

    layers: Layers
    hit_rates: list[list[float]]
    positions: list[int]
    cost: float
    speedup: float


class ReadText:
    """A text that the whole target has read.

    Args:
        target: the model.
        text: prompt and reply.
        max_len: tokens of it that are used.
    """

    def __init__(self, target: HFTarget, text: TrainingText, max_len: int) -> None:
        ids = [*text.prompt_ids, *text.reply_ids][:max_len]
        self.tokens = torch.tensor([ids], device=target.device)
        self.prompt_len = min(len(text.prompt_ids), len(ids))
        self._places = torch.arange(len(ids), device=target.device)
        seen = self._places.unsqueeze(1) >= self._places
        self._cache = target.new_cache(1, len(ids))
        out = target.run(self.tokens, None, self._cache, self._places.unsqueeze(0), seen.unsqueeze(0))
        self.chosen = out.logits[0].argmax(-1)  # [T]

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def draft(self, draft: SkippedLayers, levels: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Per level what a draft begun at each place says, and what the whole model chooses there.

        The draft begun at place t has the text's own tokens: level i reads token t + i and guesses the one behind it.

        Yields:
            Logits ``[P, V']`` and tokens ``[P]`` at the places whose guess belongs to the reply.
        """
        size, cache = len(self), self._cache
        cache.reserve((levels + 1) * size)
        own = torch.eye(size, dtype=torch.bool, device=self._places.device)
        before = self._places.unsqueeze(1) > self._places
        depth = self._places
        for level in range(levels):
            at = self._places + level
            inside = at < size - 1
            at = at.clamp(max=size - 1)
            depth = torch.cat([depth, self._places + level])
            ancestors = torch.cat([before, *[own] * (level + 1)], dim=1)
            logits = draft.run(self.tokens[:, at], cache, depth.unsqueeze(0), ancestors.unsqueeze(0))[0]
            used = inside & (at >= self.prompt_len - 1)
            yield logits[used], self.chosen[at[used]]


def measure(
    texts: Sequence[ReadText], draft: SkippedLayers, levels: int, vocabulary: Tensor | None
) -> tuple[list[list[float]], list[int]]:
    """``[levels][RANKS]`` hit rates, and the places looked at per level.

    Raises:
        ValueError: where there is no place to look at.
    """
    hits = torch.zeros(levels, RANKS, dtype=torch.float64)
    places = [0] * levels
    for text in texts:
        for level, (logits, chosen) in enumerate(text.draft(draft, levels)):
            best = logits.topk(min(RANKS, logits.shape[-1]), dim=-1).indices
            guesses = best if vocabulary is None else vocabulary[best]
            found = (guesses == chosen.unsqueeze(1)).sum(0).cpu()
            hits[level, : len(found)] += found
            places[level] += len(chosen)
    if not all(places):
        raise ValueError("no text is long enough for a guess: give more --tokens or other --data")
    return (hits / torch.tensor(places).unsqueeze(1)).tolist(), places


def cost_of(shape: ModelShape, num_layers: int, vocab_size: int) -> float:
    """Weights a draft pass reads, as a share of those of a whole pass: what small passes wait for.

    Args:
        shape: of the target.
        num_layers: kept.
        vocab_size: tokens that can be drafted; 0 for all.
    """
    layer = shape.hidden * (2 * shape.queries + 2 * shape.keys + 3 * shape.inner)
    whole = shape.layers * layer + shape.hidden * shape.vocab
    return (num_layers * layer + shape.hidden * (vocab_size or shape.vocab)) / whole


def speedup_of(hit_rates: Sequence[Sequence[float]], cost: float, depth: int) -> float:
    """Of the best chain of 1 to ``depth`` drafts: expected tokens over 1 + drafts x cost; below 1 where none pays.

    Deeper drafts than were measured are taken to be as good as the deepest of these.
    """
    best, tokens, chance = 0.0, 1.0, 1.0
    for level in range(depth):
        chance *= hit_rates[min(level, len(hit_rates) - 1)][0]
        tokens += chance
        best = max(best, tokens / (1.0 + (level + 1) * cost))
    return best


def search(
    num_layers: int, score: Callable[[Layers], Subset], trials: int, seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Subset:  # fmt: skip
    """The best subset found: first, outer and evenly spaced layers to begin with, then steps that improve on the best.

    Args:
        num_layers: of the target.
        score: measures a subset.
        trials: subsets measured; fewer where there are no more.
        seed: of the steps' order.
        progress: told how many were measured, of how many.
    """
    sizes = sorted({max(1, round(share * num_layers)) for share in _SHARES})
    starts = [tuple(range(size)) for size in sizes]
    starts += [tuple(choose(num_layers, size)) for choose in (choose_layers, spaced_layers) for size in sizes]
    measured: dict[Layers, Subset] = {}
    best: Subset | None = None

    def attempt(layers: Layers) -> bool:
        nonlocal best
        measured[layers] = found = score(layers)
        progress(len(measured), trials)
        if best is not None and found.speedup <= best.speedup:
            return False
        best = found
        return True

    for layers in dict.fromkeys(starts):
        if len(measured) < trials:
            attempt(layers)
    chance = random.Random(seed)
    assert best is not None
    while len(measured) < trials:
        open_steps = [layers for layers in neighbours(best.layers, num_layers) if layers not in measured]
        chance.shuffle(open_steps)
        for layers in open_steps[: trials - len(measured)]:
            if attempt(layers):
                break
        else:
            break
    return best


def neighbours(layers: Layers, num_layers: int) -> list[Layers]:
    """Subsets with a layer less, a layer more, or another one in the place of one."""
    others = [index for index in range(num_layers) if index not in layers]
    fewer = [tuple(kept for kept in layers if kept != gone) for gone in layers] if len(layers) > 1 else []
    more = [tuple(sorted((*layers, new))) for new in others]
    exchanged = [tuple(sorted(new if kept == gone else kept for kept in layers)) for gone in layers for new in others]
    return [*fewer, *more, *exchanged]


@torch.inference_mode()
def calibrate_skip(
    request: CalibrationRequest,
    target: HFTarget,
    tokenizer: Any | None,
    report: CalibrationReporter,
    options: SearchOptions | None = None,
) -> tuple[Subset, Calibration]:
    """Find the layers that draft for a target and write them, with their vocabulary and hit rates, to a folder.

    Half of the texts are searched on; the rates that are written are of the other half.

    Args:
        request: what is wanted; ``weights`` is the folder to write, made where it is missing. "" is the one in which
            ``skip`` finds what is kept for the target on this machine.
        target: the model.
        tokenizer: its tokenizer; None for a model that comes without.
        report: told how it goes.
        options: of the search.

    Raises:
        ValueError: for damaged texts, too few of them, a full disk.
    """
    options = options or SearchOptions()
    settings = SynthesisSettings(seed=SEED_OFFSET if request.seed is None else request.seed, sampled_every=0)
    store = make_texts(
        target, tokenizer, request.cache, settings, request.tokens, request.data, report.writing, report.note
    )
    texts = store.first(request.tokens)
    if len(texts) < 2:
        raise ValueError(f"a search takes at least 2 texts, there are {len(texts)}: give more --tokens or other --data")
    searched, held_out = texts[::2], texts[1::2]
    vocabulary = _vocabulary(target, searched, options.vocab_size)
    head = None if vocabulary is None else drafting_head(target, vocabulary)
    size, shape = 0 if vocabulary is None else len(vocabulary), ModelShape.of(target)
    read = [ReadText(target, text, request.max_len) for text in searched]

    def score(layers: Layers, on: Sequence[ReadText] = read) -> Subset:
        rates, places = measure(on, SkippedLayers(target, layers, head), options.levels, vocabulary)
        cost = cost_of(shape, len(layers), size)
        return Subset(layers, rates, places, cost, speedup_of(rates, cost, options.depth))

    found = search(target.num_layers, score, options.trials, settings.seed, report.batch)
    checked = score(found.layers, [ReadText(target, text, request.max_len) for text in held_out])
    about = {
        "search": asdict(options) | {"tokens": request.tokens, "seed": settings.seed, "data": store.origin["data"]},
        "texts": {"count": len(texts), "sha256": texts_sha256(texts)},
        "cost": round(checked.cost, 4),
        "speedup_if_width_is_free": round(checked.speedup, 4),
        "calibration": {"texts": len(held_out), "positions": checked.positions},
    }
    facts = TargetFacts.of(target)
    weights = DrafterWeights(
        NAME, facts, {"layers": list(found.layers)},
        {} if vocabulary is None else {"vocabulary": vocabulary.cpu()}, about, checked.hit_rates,
    )  # fmt: skip
    folder = Path(request.weights).expanduser() if request.weights else kept_folder(facts)
    with writing(folder):
        save_weights(folder, weights, _card(checked, target))
    return checked, Calibration(folder, checked.hit_rates, checked.positions)


def _vocabulary(target: HFTarget, texts: Sequence[TrainingText], size: int) -> Tensor | None:
    """``[V']`` the most frequent tokens of replies, then those of low ids; None for all."""
    if not 0 < size < target.vocab_size:
        return None
    ids = torch.tensor([token for text in texts for token in text.reply_ids])
    counts = torch.bincount(ids, minlength=target.vocab_size)
    return make_vocabulary(counts, size, sorted(target.eos_token_ids)).to(target.device)


def _card(found: Subset, target: HFTarget) -> str:
    rates: Mapping[str, str] = {f"depth {d + 1}": f"{100 * r[0]:.1f} %" for d, r in enumerate(found.hit_rates)}
    lines = [
        f"# Layers of {type(target.model).__name__} that draft for it",
        "",
        f"{len(found.layers)} of {target.num_layers}: {', '.join(map(str, found.layers))}. Found by `specdec calibrate "
        "--drafter skip`; nothing was trained.",
        "",
        f"A draft pass reads {100 * found.cost:.0f} % of what a whole one reads. Right on held-out text: "
        f"{', '.join(f'{name} {rate}' for name, rate in rates.items())}.",
    ]
    return "\n".join(lines) + "\n"
