"""``specdec bench texts``: whether text with speculation is text without, in every precision."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.cli.bench.outputs import check_outputs, resumable

if TYPE_CHECKING:
    from specdec.benchmarks.settings import DrafterSpec
    from specdec.target import HFTarget


_SIZES = (1, 4)
"""Texts at a time, as far as there are as many."""


@click.command("texts")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("-d", "--drafter", "drafters", multiple=True, default=("auto",), help="Drafter to check; repeatable.")
@click.option("-o", "options", multiple=True, metavar="DRAFTER.NAME=VALUE", help="Drafter option; repeatable.")
@click.option(
    "-q", "--quantize", "names", multiple=True,
    help="Precision to check, with the KV cache's if wanted (bf16, int8, int8+kv-int4); repeatable. --dtype's alone by "
    "default.",
)  # fmt: skip
@click.option("--dtype", default="bf16", show_default=True, help="Of weights, and beside quantized ones.")
@click.option(
    "--batch-size", "sizes", type=click.IntRange(min=1), multiple=True,
    help="Texts at a time; repeatable. 1 and 4 by default.",
)  # fmt: skip
@click.option("--questions", type=click.Path(path_type=Path), help="A question.jsonl, or 'hostile'; else MT-Bench's.")
@click.option("--limit", type=click.IntRange(min=1), help="So many questions, spread evenly over the categories.")
@click.option("--turns", type=click.IntRange(1, 2), default=1, show_default=True, help="Turns of each question.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Per turn.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of sampling.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--adaptive/--fixed-trees", default=True, help="Draft what pays, or what the drafter makes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same --json.")
def texts(
    model: str,
    drafters: tuple[str, ...],
    options: tuple[str, ...],
    names: tuple[str, ...],
    dtype: str,
    sizes: tuple[int, ...],
    questions: Path | None,
    limit: int | None,
    turns: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    threads: int | None,
    adaptive: bool,
    json_path: Path | None,
    resume: bool,
) -> None:
    """Compare the texts of drafters, and of batches, with those plain decoding of MODEL writes one at a time.

    Where a text differs though rows of a pass do not depend on each other, or elsewhere by more than rounding explains,
    the exit status is 1. Nothing is timed.
    """
    import torch

    from specdec.benchmarks.masking import masked_arguments
    from specdec.benchmarks.precision import Precision
    from specdec.benchmarks.questions import load_questions
    from specdec.benchmarks.tables import texts_table
    from specdec.benchmarks.texts import TextSettings, broken, run_texts
    from specdec.cli.bench.mt_bench import make_specs
    from specdec.cli.console import note
    from specdec.models import find_device
    from specdec.registry import resolve_drafter

    check_outputs(json_path, resume=resume)
    where = find_device(device)
    asked = [*map(Precision.parse, names)] or [Precision()]
    precisions = {each.label(dtype): each for each in asked}
    for each in asked:
        each.check(where, dtype)
    if "auto" not in drafters:  # else which options there are depends on the model
        make_specs(drafters, options)
    found = load_questions(questions)
    found = found if limit is None else found.limit(limit)
    most = sum(min(turns, len(question.turns)) for question in found.questions)
    sizes = sizes or tuple(size for size in _SIZES if size <= most)
    if max(sizes) > most:
        raise ValueError(
            f"--batch-size {max(sizes)}: there are {most} texts in all, ask more questions or fewer at a time"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    settings = TextSettings(
        model=model, precisions=tuple(precisions), drafters=(*drafters, *options), batch_sizes=sizes, turns=turns,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, weights=dtype,
        device=str(where), adaptive=adaptive,
    )  # fmt: skip

    def load(precision: str) -> tuple[HFTarget, Any, Sequence[DrafterSpec]]:
        target, tokenizer = precisions[precision].load(model, dtype, device)
        return target, tokenizer, make_specs(drafters, options, resolve_drafter("auto", target))

    note(f"questions: {found.name} ({found.source}), {len(found.questions)} of sha256 {found.sha256}")
    with resumable(json_path):
        result = run_texts(
            load, settings, found, out=json_path, resume=resume, say=note,
            command=["specdec", *masked_arguments(sys.argv[1:])],
        )  # fmt: skip
    click.echo(texts_table(result))
    if json_path is not None:
        note(f"wrote {json_path}")
    wrong = broken(result)
    if wrong:
        raise click.ClickException("\n".join(wrong))
