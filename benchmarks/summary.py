"""Figures from runs: pure arithmetic, no clock and no model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np

from specdec.benchmarks.roofline import Roofline
from specdec.benchmarks.schema import PLAIN, CategoryFloor, Figures, Interval, Run, Summary
from specdec.stats import PHASES, DecodeStats

RESAMPLES = 2000
LEAST_SPEEDUP = 0.97
"""Of any drafter over plain decoding, in any category."""


def summarise(runs: Sequence[Run], roofline: Roofline, seed: int = 0) -> Summary:
    """Figures by label, plain decoding first, overall and per category; categories in the order of the runs."""
    categories: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        categories[run.category].append(run)
    by_category = {category: _by_label(found, roofline, seed) for category, found in categories.items()}
    return Summary(_by_label(runs, roofline, seed), by_category, floor=category_floor(by_category))


def category_floor(
    categories: Mapping[str, Mapping[str, Figures]], required: float = LEAST_SPEEDUP
) -> CategoryFloor | None:
    """Which drafters are slower than ``required`` times plain decoding in which categories; None without a drafter."""
    found = [
        (label, category, figures.speedup)
        for category, by_label in categories.items()
        for label, figures in by_label.items()
        if figures.speedup is not None
    ]
    below = sorted((each for each in found if each[2].median < required), key=lambda each: each[2].median)
    return CategoryFloor(required, below) if found else None


def floor_text(floor: CategoryFloor) -> str:
    """One sentence, the slowest first; a category whose interval reaches the floor may be noise."""
    if floor.met:
        return f"every category of every drafter is at least {floor.required:g} times as fast as plain decoding"
    named = ", ".join(
        f"{label} in {category} {found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"
        + (" (may be noise)" if found.high >= floor.required else "")
        for label, category, found in floor.below
    )
    return f"slower than {floor.required:g} times plain decoding: {named}"


def _by_label(runs: Sequence[Run], roofline: Roofline, seed: int) -> dict[str, Figures]:
    labels = sorted({run.drafter for run in runs} - {PLAIN})
    plain = [run for run in runs if run.drafter == PLAIN]
    found = {PLAIN: figures(plain, None, roofline, seed)} if plain else {}
    for label in labels:
        found[label] = figures([run for run in runs if run.drafter == label], plain, roofline, seed)
    return found


def figures(runs: Sequence[Run], plain: Sequence[Run] | None, roofline: Roofline, seed: int = 0) -> Figures:
    """The figures of one drafter's runs.

    Args:
        runs: at least one.
        plain: plain decoding's, to compare with; None for plain decoding itself.
        roofline: what bounds a pass.
        seed: of the bootstrap.
    """
    if not runs:
        raise ValueError("figures need at least one run")
    steps = sum(run.steps for run in runs)
    emitted = sum(run.emitted for run in runs)
    counts = count(runs)
    per_pass = {phase: ms / steps for phase, ms in counts.milliseconds.items() if phase != "prefill"}
    context = sum(run.context_tokens * run.steps for run in runs) / steps
    speedup = end_to_end = None
    if plain is not None:
        speedup = bootstrap(paired_ratios(runs, plain, lambda run: run.decode_ms), seed)
        end_to_end = bootstrap(paired_ratios(runs, plain, lambda run: run.wall_ms), seed)
    return Figures(
        num_runs=len(runs),
        emitted=emitted,
        decode_tokens_per_s=1000.0 * emitted / sum(run.decode_ms for run in runs),
        end_to_end_tokens_per_s=1000.0 * emitted / sum(run.wall_ms for run in runs),
        speedup=speedup,
        end_to_end_speedup=end_to_end,
        tau=counts.tau,
        acceptance_by_depth=counts.acceptance_by_depth,
        milliseconds_per_pass=per_pass,
        first_token_ms=median(run.first_token_ms for run in runs),
        equal_runs=sum(run.equal is True for run in runs),
        differing_runs=sum(run.equal is False for run in runs),
        roofline_fraction=roofline.floor_ms(context) / per_pass["target"],
    )


def count(runs: Sequence[Run]) -> DecodeStats:
    """Counts and times of runs, added up."""
    total = DecodeStats()
    for run in runs:
        phases = dict.fromkeys(PHASES, 0.0) | run.milliseconds
        total.add(
            DecodeStats(
                passes=run.passes,
                drafted=run.drafted,
                accepted=run.accepted,
                emitted=run.emitted,
                accepted_per_pass=Counter(run.accepted_per_pass),
                offered_depth=Counter(run.offered_depth),
                milliseconds=phases,
            )
        )
    return total


def paired_ratios(
    runs: Sequence[Run], plain: Sequence[Run], milliseconds: Callable[[Run], float]
) -> dict[tuple[int, ...], list[float]]:
    """Ratios of tokens per second to plain decoding's, per question (or batch of questions) one per repeat.

    All turns of a question count together, and only those that both have.
    """
    rates = [_rates(side, milliseconds) for side in (runs, plain)]
    ratios: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for questions, repeat in sorted(rates[0].keys() & rates[1].keys()):
        ours, theirs = rates[0][questions, repeat], rates[1][questions, repeat]
        turns = ours.keys() & theirs.keys()
        if turns:
            ratios[questions].append(_rate(ours, turns) / _rate(theirs, turns))
    return dict(ratios)


_Turns = dict[int, tuple[int, float]]
"""Turn -> tokens emitted and milliseconds."""


def _rates(runs: Sequence[Run], milliseconds: Callable[[Run], float]) -> dict[tuple[tuple[int, ...], int], _Turns]:
    found: dict[tuple[tuple[int, ...], int], _Turns] = defaultdict(dict)
    for run in runs:
        found[run.question_ids, run.repeat][run.turn] = (run.emitted, milliseconds(run))
    return found


def _rate(turns: _Turns, wanted: set[int]) -> float:
    return sum(turns[turn][0] for turn in wanted) / sum(turns[turn][1] for turn in wanted)


def bootstrap(ratios: dict[tuple[int, ...], list[float]], seed: int = 0) -> Interval | None:
    """Median of all ratios and its 95 % interval: questions are resampled, each with all its repeats.

    Repeats of one question are not independent, so they move together. None without a ratio.
    """
    if not ratios:
        return None
    repeats = max(map(len, ratios.values()))
    table = np.array([found + [np.nan] * (repeats - len(found)) for found in ratios.values()])  # [Q, R]
    drawn = np.random.default_rng(seed).integers(len(table), size=(RESAMPLES, len(table)))
    medians = np.nanmedian(table[drawn].reshape(RESAMPLES, -1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(float(np.nanmedian(table)), float(low), float(high))
