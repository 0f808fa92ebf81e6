"""What the comparison with peers shows: a live table or lines while it runs, and the final table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from specdec.cli.bench.screen import align

if TYPE_CHECKING:
    from specdec.benchmarks.peer_bench import PeerProgress
    from specdec.benchmarks.peer_schema import PeerFigures, PeersResult
    from specdec.benchmarks.schema import Interval

_LEFT = ("row", "engine", "precision", "speculation")
_RIGHT = ("tok/s", "end to end", "prefill", "tau", "equal", "equal own", "ours/its", "end to end")


class PeersScreen:
    """A live table on stderr; where that is no terminal, a line per row's turn, without comparisons."""

    def __init__(self) -> None:
        self._live: Any = None

    def __enter__(self) -> PeersScreen:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # It paints when told to, never by itself: nobody but the engine that is timed may compute.
            self._live = Live(console=Console(stderr=True), transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: PeerProgress) -> None:
        """Show what was done so far."""
        if self._live is not None:
            self._live.update(_live_table(progress), refresh=True)
            return
        from specdec.benchmarks.peer_summary import decode_rate

        latest = progress.latest
        where = ", ".join(str(run.question_id) for run in latest)
        rate = _number(decode_rate(latest))
        click.echo(f"[{len(progress.runs)}/{progress.total}] question {where}: {latest[0].name} {rate} tok/s", err=True)


def _live_table(progress: PeerProgress) -> Any:
    from rich.table import Table

    from specdec.benchmarks.peer_summary import decode_rate

    table = Table(title=f"question {progress.latest[-1].question_id}, {len(progress.runs)} of {progress.total} answers")
    for header in ("row", "precision", "answers", "tok/s", ""):
        table.add_column(header, justify="right" if header in ("answers", "tok/s") else "left")
    for name, entrant in progress.entrants.items():
        runs = [run for run in progress.runs if run.name == name]
        if entrant.skipped is None:
            state = "left out" if entrant.failed else ""
            table.add_row(name, entrant.precision, str(len(runs)), _number(decode_rate(runs)), state)
    return table


def report(result: PeersResult) -> str:
    """The final table as text, with what it was compared with and what ran on what."""
    from specdec.benchmarks.report import load_text
    from specdec.benchmarks.tables import peer_remarks

    document = result.to_json()
    settings, machine, questions = result.settings, result.machine, result.questions
    busy = load_text(machine)
    lines = [
        align([_LEFT + _RIGHT, *(_row(found) for found in result.peers if not found.skipped)], num_left=len(_LEFT)),
        "",
        f"ours/its: tokens per second of {settings['reference'] or 'specdec'}, our reference row, over this row's: "
        "median over questions with its 95 % interval, of decoding and end to end. Above 1 the reference is faster.",
        "Precisions differ between rows: compare like with like. tau: tokens per target pass.",
        "equal: texts that are specdec's plain ones in the same precision; equal own: those of the same engine without "
        "speculation.",
        *(f"{names}: {sentence}" for names, sentence in peer_remarks(document)),
        f"questions: first turns of {questions['name']} ({questions['source']}), {questions['count']} of sha256 "
        f"{questions['sha256']}",
        f"model: {settings['model']} on {machine['cpu']}, {machine['threads']} threads; {settings['max_new_tokens']} "
        "tokens, greedy",
    ]
    return "\n".join([*lines, *([f"The machine was {busy}."] if busy else [])])


def _row(found: PeerFigures) -> Sequence[str]:
    equal = "" if found.equal_to_plain is None else f"{found.equal_to_plain}/{found.num_runs}"
    own = "" if found.equal_to_own_plain is None else f"{found.equal_to_own_plain}/{found.own_plain_runs}"
    return (
        found.name,
        f"{found.engine} {found.version or ''}",
        found.precision,
        found.speculation,
        _number(found.decode_tokens_per_s),
        _number(found.end_to_end_tokens_per_s),
        _number(found.prefill_tokens_per_s, 0),
        _number(found.tau, 2),
        equal,
        own,
        _interval(found.relative),
        _interval(found.end_to_end_relative),
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(found: Interval | None) -> str:
    return "" if found is None else f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"
