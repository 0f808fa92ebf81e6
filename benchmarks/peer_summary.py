"""Figures from the runs of a comparison with peers: pure arithmetic, no clock and no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from specdec.benchmarks.peer_schema import Entrant, PeerFigures, PeerRun
from specdec.benchmarks.schema import PLAIN, Interval
from specdec.benchmarks.summary import bootstrap

DISTURBED_CPUS = 0.25
"""A run counts as disturbed when others kept more than this many processors busy meanwhile."""
COMPARABLE = ("fp32", "bf16", "f16")
"""Precisions in which every engine means the same arithmetic, up to rounding."""

Runs = Mapping[int, PeerRun]
"""One row's runs by question."""


def summarise_peers(
    entrants: Sequence[Entrant], runs: Sequence[PeerRun], reference: str | None, seed: int = 0
) -> list[PeerFigures]:
    """The figures of every row, in the order of the entrants.

    Args:
        entrants: all rows, those that did not run included.
        runs: all runs.
        reference: name of the row that the others are compared with; None to compare with none.
        seed: of the bootstrap.
    """
    by_row: dict[str, dict[int, PeerRun]] = {entrant.name: {} for entrant in entrants}
    for run in runs:
        by_row[run.name][run.question_id] = run
    return [_figures(entrant, entrants, by_row, reference, seed) for entrant in entrants]


def fastest_of_ours(entrants: Sequence[Entrant], runs: Sequence[PeerRun]) -> str | None:
    """Name of specdec's row with the most tokens per second of decoding; None where none has any."""
    rates = {
        entrant.name: rate
        for entrant in entrants
        if entrant.ours and (rate := decode_rate([run for run in runs if run.name == entrant.name])) is not None
    }
    return max(rates, key=rates.__getitem__, default=None)


def decode_rate(runs: Sequence[PeerRun]) -> float | None:
    """Tokens per second after the first pass, all runs together."""
    return _rate(sum(run.decode_tokens for run in runs), sum(run.decode_ms for run in runs))


def _figures(
    entrant: Entrant,
    entrants: Sequence[Entrant],
    by_row: Mapping[str, Runs],
    reference: str | None,
    seed: int,
) -> PeerFigures:
    facts = {f.name: getattr(entrant, f.name) for f in fields(Entrant)}
    own = by_row[entrant.name]
    runs = list(own.values())
    if not runs:
        return PeerFigures(**facts)
    compared: Runs = {} if reference is None or reference == entrant.name else by_row[reference]
    ours = own_plain = None
    if not (entrant.ours and entrant.speculation == PLAIN) and entrant.precision in COMPARABLE:
        ours = _plain_of(entrant, entrants, by_row, lambda other: other.ours)
    if entrant.speculation != PLAIN:
        own_plain = _plain_of(entrant, entrants, by_row, lambda other: other.engine == entrant.engine)
    return PeerFigures(
        **facts,
        num_runs=len(runs),
        decode_tokens_per_s=decode_rate(runs),
        end_to_end_tokens_per_s=_rate(sum(run.new_tokens for run in runs), sum(run.total_ms for run in runs)),
        prefill_tokens_per_s=_rate(sum(run.prompt_tokens for run in runs), sum(run.prefill_ms for run in runs)),
        tau=_tau(runs),
        relative=_relative(own, compared, lambda run: _rate(run.decode_tokens, run.decode_ms), seed),
        end_to_end_relative=_relative(own, compared, lambda run: _rate(run.new_tokens, run.total_ms), seed),
        equal_to_plain=None if ours is None else _num_equal(own, ours),
        equal_to_own_plain=None if own_plain is None else _num_equal(own, own_plain),
        own_plain_runs=0 if own_plain is None else len(own.keys() & own_plain.keys()),
        unsettled_runs=sum(bool(run.busy) for run in runs),
        disturbed_runs=sum((run.foreign_cpus or 0.0) > DISTURBED_CPUS for run in runs),
    )


def _plain_of(
    entrant: Entrant, entrants: Sequence[Entrant], by_row: Mapping[str, Runs], wanted: Callable[[Entrant], bool]
) -> Runs | None:
    """Runs of the wanted row without speculation in the same precision; None where there are none."""
    for other in entrants:
        if other.speculation == PLAIN and other.precision == entrant.precision and wanted(other):
            return by_row[other.name] or None
    return None


def _num_equal(runs: Runs, others: Runs) -> int:
    both = runs.keys() & others.keys()
    return sum(runs[question].token_sha256 == others[question].token_sha256 for question in both)


def _relative(runs: Runs, reference: Runs, rate: Callable[[PeerRun], float | None], seed: int) -> Interval | None:
    """Median of the reference's rate over this row's, question by question, and its interval."""
    ratios: dict[tuple[int, ...], list[float]] = {}
    for question in sorted(runs.keys() & reference.keys()):
        own, other = rate(runs[question]), rate(reference[question])
        if own is not None and other is not None:
            ratios[question,] = [other / own]
    return bootstrap(ratios, seed)


def _tau(runs: Sequence[PeerRun]) -> float | None:
    """Tokens per pass; an engine that does not tell its passes has none."""
    passes = [run.passes for run in runs]
    known = [count for count in passes if count is not None]
    if len(known) < len(passes) or not sum(known):
        return None
    return sum(run.decode_tokens for run in runs) / sum(known)


def _rate(tokens: int, milliseconds: float) -> float | None:
    """Tokens per second; None where none came or no time was measured."""
    return 1000.0 * tokens / milliseconds if tokens > 0 and milliseconds > 0 else None
