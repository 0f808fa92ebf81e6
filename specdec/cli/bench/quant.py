"""``specdec bench quant``: what quantizing a target costs and gives, in one table."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from specdec.cli.bench.outputs import check_outputs, refused


@click.command("quant")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option(
    "-q", "--quantize", "names", multiple=True,
    help="Precision to measure, with the KV cache's if wanted (int8, int8+kv-int4); repeatable. All that can run by "
    "default.",
)  # fmt: skip
@click.option(
    "--kv", "caches", multiple=True, help="Precision of the KV cache to measure, weights as they are; repeatable."
)
@click.option("--dtype", default="bf16", show_default=True, help="What they are compared with, and run beside.")
@click.option("-d", "--drafter", "drafters", multiple=True, default=("ngram",), help="Drafter to measure; repeatable.")
@click.option("--limit", type=click.IntRange(min=1), default=16, show_default=True, help="So many questions.")
@click.option(
    "-t", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Per question."
)
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
def quant(
    model: str,
    names: tuple[str, ...],
    caches: tuple[str, ...],
    dtype: str,
    drafters: tuple[str, ...],
    limit: int,
    max_new_tokens: int,
    device: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Compare MODEL quantized with MODEL as it is: perplexity, agreement, memory, speed plain and with each drafter.

    The text is that of the questions that ship. Where a drafter's text differs from plain decoding's of the same
    precision by more than rounding explains, the exit status is 1.
    """
    import torch

    from specdec.benchmarks.precision import Precision
    from specdec.benchmarks.quant import document, run_quant, table
    from specdec.benchmarks.questions import SHIPPED, load_questions
    from specdec.benchmarks.record import write_json
    from specdec.cli.console import note, slow_status
    from specdec.models import find_device, find_dtype
    from specdec.quantization import usable

    where = find_device(device)
    asked = [*map(Precision.parse, names), *(Precision(kv=name) for name in caches)]
    for each in asked:
        each.check(where, dtype)
    check_outputs(json_path)
    if threads is not None:
        torch.set_num_threads(threads)
    questions = load_questions(SHIPPED).limit(limit)
    asked = asked or [Precision(name) for name in usable(where, find_dtype(dtype))]
    rows = {each.label(dtype): each for each in (Precision(), *asked)}

    with slow_status(f"loading {model}") as say, refused():
        lines = run_quant(
            lambda label: rows[label].load(model, dtype, device),
            [*rows], drafters, questions.questions, max_new_tokens, say,
        )  # fmt: skip
    click.echo(table(lines, len(questions.questions)))
    if json_path is not None:
        settings = {
            "model": model, "dtype": dtype, "precisions": names or [each.weights for each in asked if each.weights],
            "kv": list(caches), "drafters": list(drafters), "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        command = ["specdec", *sys.argv[1:]]
        write_json(json_path, document(lines, settings, questions, command, where))
        note(f"wrote {json_path}")
