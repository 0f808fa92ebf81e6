"""``specdec bench serve``: OpenAI-compatible servers on MT-Bench's questions."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.cli.bench.outputs import check_outputs

if TYPE_CHECKING:
    from specdec.benchmarks.serve import ServeRun


@click.command("serve")
@click.option(
    "--base-url", "urls", multiple=True, required=True, metavar="[NAME=]URL", help="A server; repeatable, to compare."
)
@click.option("--baseline", help="Server that the others are compared with; the first by default.")
@click.option("-m", "--model", help="Name of the model for the record; what the first server calls it by default.")
@click.option("--dtype", default="", help="What the servers compute in, for the record: they do not say.")
@click.option("--questions", type=click.Path(path_type=Path), help="A question.jsonl instead of MT-Bench's.")
@click.option("--limit", type=click.IntRange(min=1), help="So many questions, spread evenly over the categories.")
@click.option("--turns", type=click.IntRange(1, 2), default=1, show_default=True, help="Turns of each question.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Per turn.")
@click.option("-c", "--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="At a time.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Times to run everything.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the intervals.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
def serve(
    urls: tuple[str, ...],
    baseline: str | None,
    model: str | None,
    dtype: str,
    questions: Path | None,
    limit: int | None,
    turns: int,
    max_new_tokens: int,
    concurrency: int,
    repeat: int,
    seed: int,
    json_path: Path | None,
) -> None:
    """Measure throughput and latency of OpenAI-compatible servers, such as `vllm serve` with and without a drafter.

    Answers are streamed and greedy. Servers answer block by block in turn; TTFT is the time to the first piece of text.
    """
    from specdec.benchmarks.masking import masked_arguments
    from specdec.benchmarks.questions import load_questions
    from specdec.benchmarks.serve import ServeSettings, run_serve
    from specdec.benchmarks.serve_client import ServerClient, ServerError
    from specdec.cli.console import note
    from specdec.registry import unknown

    named = split_urls(urls)
    if baseline is not None and baseline not in named:
        raise ValueError(unknown("server", baseline, named))
    check_outputs(json_path)
    servers = {name: ServerClient(url) for name, url in named.items()}
    found = load_questions(questions)
    found = found if limit is None else found.limit(limit)
    note(f"questions: {found.name} ({found.source}), {len(found.questions)} of sha256 {found.sha256}")

    def show(runs: Sequence[ServeRun], total: int) -> None:
        note(f"{len(runs)}/{total} answers, {runs[-1].server}: {runs[-1].num_tokens} tokens")

    try:
        name = model or next(iter(servers.values())).models()[0].rstrip("/").rsplit("/", 1)[-1]
        settings = ServeSettings(
            model=name, dtype=dtype, max_new_tokens=max_new_tokens, turns=turns, concurrency=concurrency,
            repeat=repeat, baseline=baseline or next(iter(named)), seed=seed,
        )  # fmt: skip
        result = run_serve(
            servers, settings, found, out=json_path, progress=show,
            command=["specdec", *masked_arguments(sys.argv[1:])],
        )  # fmt: skip
    except ServerError as error:
        raise click.ClickException(str(error)) from error
    click.echo(report(result))
    if json_path is not None:
        note(f"wrote {json_path}")


def split_urls(urls: Sequence[str]) -> dict[str, str]:
    """Servers by name from ``NAME=URL`` texts; a URL alone is named after its host and port."""
    named: dict[str, str] = {}
    for text in urls:
        name, equals, url = text.partition("=")
        if not equals or "://" in name:
            name, url = text.partition("://")[2].split("/")[0], text
        if not name or not url:
            raise ValueError(f"--base-url takes [NAME=]URL, got {text!r}")
        if name in named:
            raise ValueError(f"two servers are called {name!r}: give them names, NAME=URL")
        named[name] = url
    return named


def report(result: Mapping[str, Any]) -> str:
    """A line per server."""
    from specdec.benchmarks.report import interval_text, number_text

    lines = []
    for row in result["summary"]["servers"]:
        parts = [f"{row['name']}: {number_text(row['tokens_per_s'])} tok/s"]
        if row["speedup"]:
            parts.append(
                f"speed-up {interval_text(row['speedup'])}, {row['equal_texts']} of {row['num_runs']} texts equal"
            )
        for key, what in (("ttft_ms", "TTFT"), ("token_ms", "per token")):
            if row[key]:
                parts.append(f"{what} {row[key]['p50']:.1f} ms (p95 {row[key]['p95']:.1f})")
        if row["tau"]:
            parts.append(f"tau {row['tau']:.2f}")
        lines.append(", ".join(parts))
    return "\n".join(lines)
