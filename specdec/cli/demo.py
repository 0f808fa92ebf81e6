"""``specdec demo``: an answer as it streams, and an honest measurement of what speculation gained."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import click

from specdec.cli.console import TextPrinter, slow_status
from specdec.cli.options import ModelOptions, load_decoder, model_options, split_assignments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from specdec.decoder import SpecDecoder
    from specdec.prompts import Message
    from specdec.result import GenerationResult

QUESTION = "Write Python functions add, subtract, multiply and divide, each with a docstring."
"""Its answer repeats its own shape, which suits drafters; MT-Bench has the representative numbers."""


@dataclass(frozen=True)
class TimedRun:
    """One generation and the wall-clock of the whole call, prefill included."""

    result: GenerationResult
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over wall-clock."""
        return len(self.result.token_ids) / self.seconds


@click.command()
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Timed runs of each kind.")
@model_options
def demo(max_new_tokens: int, repeats: int, options: ModelOptions) -> None:
    """Answer one question, then time the same answer with and without speculation.

    Runs alternate, and each has a new drafter, so that none profits from having seen the answer. The question was
    chosen to suit drafting, so other texts gain less. The line at the end has medians; a ratio below 1 means that
    speculation was slower.
    """
    decoder = load_decoder(options)
    messages = [{"role": "user", "content": QUESTION}]
    click.echo(f"{options.model}: {QUESTION}")
    printer = TextPrinter()
    shade = click.style("green", fg="green") if printer.colour else "green (on a terminal)"
    click.echo(f"Accepted draft tokens are {shade}.\n", color=True)
    with decoder.stream(messages, max_new_tokens=max_new_tokens) as stream:
        for piece in stream:
            printer.write(piece.text, piece.from_draft)
        printer.finish(stream.result.text)
    speculative, plain = [], []
    with slow_status("timing") as say:
        timed_run(decoder, "none", {}, messages, max_new_tokens)  # warm-up; the stream above was the drafter's
        for repeat in range(repeats):
            say(f"timing, repeat {repeat + 1} of {repeats}")
            drafter_options = split_assignments(options.drafter_options)
            speculative.append(timed_run(decoder, options.drafter, drafter_options, messages, max_new_tokens))
            plain.append(timed_run(decoder, "none", {}, messages, max_new_tokens))
    click.echo("\n" + verdict(speculative, plain))


def timed_run(
    decoder: SpecDecoder,
    drafter: str,
    drafter_options: dict[str, str],
    messages: Sequence[Message],
    max_new_tokens: int,
) -> TimedRun:
    """Generate on the same target with a new drafter, greedily, and time the call."""
    from specdec.decoder import SpecDecoder
    from specdec.registry import create_drafter

    fresh = SpecDecoder(decoder.target, create_drafter(drafter, drafter_options), tokenizer=decoder.tokenizer)
    start = perf_counter()
    result = fresh.chat(messages, max_new_tokens=max_new_tokens)
    return TimedRun(result, perf_counter() - start)


def verdict(speculative: list[TimedRun], plain: list[TimedRun]) -> str:
    """The demo's last line; run i of one list was measured next to run i of the other."""
    stats = speculative[0].result.stats
    ratio = median(s.tokens_per_second / p.tokens_per_second for s, p in zip(speculative, plain, strict=True))
    equal = len({tuple(run.result.token_ids) for run in [*speculative, *plain]}) == 1
    return ", ".join(
        [
            f"{len(speculative[0].result.token_ids)} tokens",
            f"{median(run.tokens_per_second for run in speculative):.1f} tok/s with drafter {stats.drafter}",
            f"{median(run.tokens_per_second for run in plain):.1f} without",
            f"ratio {ratio:.2f}" + (" (slower)" if ratio < 1 else ""),
            f"tau {stats.tau:.2f} (tokens per target pass)",
            f"texts {'equal' if equal else 'DIFFER'}",
        ]
    )
