"""What a benchmark shows: a live table while it runs, lines where there is no terminal, and the final tables."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from specdec.benchmarks.mt_bench import Progress
    from specdec.benchmarks.schema import BenchResult, Figures, Interval, Run

_HEADERS = (
    "category", "drafter", "tok/s", "end to end", "speed-up", "end to end", "tau", "accepted at depth 1 2 3",
    "draft", "target", "accept", "commit", "other", "first", "equal", "roofline",
)  # fmt: skip


class Screen:
    """A live table on stderr; where that is no terminal, a line per turn of a question, without speed-ups.

    The table goes when the block ends: what is refused leaves no speed-up behind.
    """

    def __init__(self) -> None:
        self._live: Any = None

    def __enter__(self) -> Screen:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show what was done so far."""
        if self._live is None:
            latest = progress.latest
            rates = ", ".join(f"{run.drafter} {_rate(run):.1f} tok/s" for run in latest)
            where = f"question {latest[0].question_id}, turn {latest[0].turn}"
            click.echo(f"[{len(progress.runs)}/{progress.total}] {where}: {rates}", err=True)
        else:
            self._live.update(_live_table(progress), refresh=True)


def _rate(run: Run) -> float:
    return 1000.0 * run.emitted / run.decode_ms


def _live_table(progress: Progress) -> Any:
    from rich.table import Table

    from specdec.benchmarks.schema import PLAIN
    from specdec.benchmarks.summary import count, paired_ratios

    table = Table(title=f"question {progress.latest[0].question_id}, turn {progress.latest[0].turn}")
    for header in ("drafter", "runs", "tok/s", "speed-up", "tau"):
        table.add_column(header, justify="left" if header == "drafter" else "right")
    labels = list(dict.fromkeys(run.drafter for run in progress.runs))
    plain = [run for run in progress.runs if run.drafter == PLAIN]
    for label in sorted(labels, key=lambda label: (label != PLAIN, label)):
        runs = [run for run in progress.runs if run.drafter == label]
        speedup = "" if label == PLAIN else f"{_median(paired_ratios(runs, plain, lambda run: run.decode_ms)):.2f}"
        total = count(runs)
        per_label = progress.total // len(labels)
        table.add_row(label, f"{len(runs)}/{per_label}", f"{total.tokens_per_second:.1f}", speedup, f"{total.tau:.2f}")
    return table


def _median(ratios: dict[tuple[int, ...], list[float]]) -> float:
    from statistics import median

    return median(value for found in ratios.values() for value in found)


def report(result: BenchResult) -> str:
    """The final tables as text: per category, then overall, with what ran and on what."""
    from specdec.benchmarks.summary import floor_text

    questions, machine, settings = result.questions, result.machine, result.settings
    floor = result.summary.floor
    rows = [
        _row(category, label, found)
        for category, by_label in [*result.summary.categories.items(), ("overall", result.summary.overall)]
        for label, found in by_label.items()
    ]
    curve = ", ".join(f"{nodes}: {ms:.1f}" for nodes, ms in result.summary.latency_curve)
    lines = [
        align([_HEADERS, *rows], num_left=2),
        "",
        "Speed-up: median of paired ratios with its 95 % interval. tau: tokens per target pass. draft to other: "
        "milliseconds per pass. first: median milliseconds to the first token.",
        *([] if floor is None else [floor_text(floor)]),
        f"equal: runs whose tokens are plain decoding's, of those compared; {_rounding(result.runs)}",
        f"questions: {questions['name']} ({questions['source']}), {questions['count']} of sha256 {questions['sha256']}",
        f"model: {settings['model']} {settings['dtype']} on {machine['gpu'] or machine['cpu']}, {machine['threads']} "
        f"threads; {settings['turns']} turn(s) of {settings['max_new_tokens']} tokens, temperature "
        f"{settings['temperature']:g}, batch {settings['batch_size']}"
        + (f" of a queue of {settings['queue']}" if settings.get("queue") else "")
        + f", {settings['repeat']} repeat(s)",
        *lossy_lines(settings),
        f"a pass reads {result.weight_bytes / 1e6:.0f} MB of weights; measured {result.bandwidth_gb_s:.1f} GB/s; peak "
        f"memory {result.summary.peak_memory_bytes / 2**30:.2f} GiB",
        f"milliseconds of a pass by tree nodes: {curve}",
    ]
    if machine["load_at_start"] is not None and machine["load_at_start"] > 1:
        lines.append(f"the machine was busy (load {machine['load_at_start']}): take these figures with care")
    return "\n".join(lines)


def lossy_lines(settings: Mapping[str, Any]) -> list[str]:
    """A line that marks a lossy policy; none for the others."""
    if settings.get("lossless", True):
        return []
    return [f"LOSSY: policy {settings['verifier']!r} writes other texts than the target would"]


def _rounding(runs: Sequence[Run]) -> str:
    found = [run.difference for run in runs if run.difference is not None]
    if not any(run.equal is not None for run in runs):
        return "none was compared, as the policy draws tokens of its own"
    if not found:
        return "none differs"
    gap = max(difference.gap or 0.0 for difference in found)
    return f"{len(found)} differ by rounding (widest gap of log-probabilities {gap:.2g})"


def _row(category: str, label: str, found: Figures) -> tuple[str, ...]:
    compared = found.equal_runs + found.differing_runs
    phases = found.milliseconds_per_pass
    return (
        category,
        label,
        f"{found.decode_tokens_per_s:.1f}",
        f"{found.end_to_end_tokens_per_s:.1f}",
        _interval(found.speedup),
        _interval(found.end_to_end_speedup),
        f"{found.tau:.2f}",
        " ".join(f"{rate:.2f}" for rate in found.acceptance_by_depth[:3]),
        *(f"{phases[phase]:.1f}" for phase in ("draft", "target", "accept", "commit", "other")),
        f"{found.first_token_ms:.0f}",
        f"{found.equal_runs}/{compared}" if compared else "",
        f"{100 * found.roofline_fraction:.0f} %",
    )


def _interval(found: Interval | None) -> str:
    return "" if found is None else f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def align(rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Rows of equally many cells as lines in columns, the first ``num_left`` of them aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
