"""``specdec bench prefix``: what it gives a batch that its prompts begin alike."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from specdec.cli.bench.outputs import check_outputs, refused


@click.command("prefix")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--dtype", default="bf16", show_default=True, help="Weights' type: auto, fp32, bf16, fp16.")
@click.option("-d", "--drafter", "drafters", multiple=True, default=("none",), help="Drafter to measure; repeatable.")
@click.option("--rows", type=click.IntRange(min=2), default=16, show_default=True, help="Prompts of the batch.")
@click.option("--prefix", "prefix_len", type=click.IntRange(1), default=1024, show_default=True, help="Shared tokens.")
@click.option("--suffix", type=click.IntRange(min=1), default=16, show_default=True, help="Tokens of each row's own.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Per row.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Calls of each kind, in turn.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
def prefix(
    model: str,
    dtype: str,
    drafters: tuple[str, ...],
    rows: int,
    prefix_len: int,
    suffix: int,
    max_new_tokens: int,
    repeat: int,
    device: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Decode a batch whose prompts begin alike, with sharing and without: seconds, bytes of keys and values, texts.

    Where a text differs from the one its row writes alone by more than rounding explains, the exit status is 1.
    """
    import torch

    from specdec.benchmarks.prefix import PrefixSizes, document, make_prompts, run_prefix
    from specdec.benchmarks.questions import SHIPPED, load_questions
    from specdec.benchmarks.record import write_json
    from specdec.benchmarks.tables import prefix_table
    from specdec.cli.console import note, slow_status
    from specdec.models import load_model
    from specdec.registry import create_drafter
    from specdec.target import HFTarget

    check_outputs(json_path)
    for name in drafters:
        create_drafter(name)
    if threads is not None:
        torch.set_num_threads(threads)
    sizes, questions = PrefixSizes(rows, prefix_len, suffix, max_new_tokens), load_questions(SHIPPED)
    with slow_status(f"loading {model}") as say, refused():
        loaded = load_model(model, dtype=dtype, device=device, packed=True)
        if loaded.tokenizer is None:
            raise ValueError(f"{model!r} has no tokenizer: prompts are made of text")
        target = HFTarget(loaded.model)
        prompts = make_prompts(sizes, questions, loaded.tokenizer, target.vocab_size)
        figures = run_prefix(target, loaded.tokenizer, drafters, prompts, sizes, repeat, say)
    settings = {
        "model": model, "dtype": dtype, "drafters": list(drafters), "batch_size": rows, **asdict(sizes),
        "max_new_tokens": max_new_tokens, "repeat": repeat,
    }  # fmt: skip
    result = document(figures, settings, questions, ["specdec", *sys.argv[1:]], target.device)
    click.echo(prefix_table(result))
    if json_path is not None:
        write_json(json_path, result)
        note(f"wrote {json_path}")
