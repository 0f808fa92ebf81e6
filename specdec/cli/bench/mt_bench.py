"""``specdec bench mt-bench``: plain decoding and drafters on MT-Bench's questions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specdec.cli.bench.outputs import check_outputs, resumable
from specdec.cli.options import graphs_option, quantize_option

if TYPE_CHECKING:
    from specdec.benchmarks.settings import DrafterSpec


@click.command("mt-bench")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("-d", "--drafter", "drafters", multiple=True, default=("auto",), help="Drafter to measure; repeatable.")
@click.option("-o", "options", multiple=True, metavar="DRAFTER.NAME=VALUE", help="Drafter option; repeatable.")
@click.option("--questions", type=click.Path(path_type=Path), help="A question.jsonl, or 'hostile'; else MT-Bench's.")
@click.option("--limit", type=click.IntRange(min=1), help="So many questions, spread evenly over the categories.")
@click.option("--turns", type=click.IntRange(1, 2), default=2, show_default=True, help="Turns of each question.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Per turn.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Questions at a time.")
@click.option("--queue", type=click.IntRange(min=2), help="Questions of a call: above --batch-size, others join.")
@click.option("--dtype", default="auto", show_default=True, help="Weights' type: auto, fp32, bf16, fp16.")
@quantize_option
@graphs_option
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Times to run everything.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of sampling and the intervals.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--verifier", default="auto", show_default=True, help="Acceptance policy; see `specdec list`.")
@click.option("--adaptive/--fixed-trees", default=True, help="Draft what pays, or what the drafter makes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
@click.option("--html", "html_path", type=click.Path(path_type=Path, dir_okay=False), help="Write a page there.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same --json.")
def mt_bench(
    model: str,
    drafters: tuple[str, ...],
    options: tuple[str, ...],
    questions: Path | None,
    limit: int | None,
    turns: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    queue: int | None,
    dtype: str,
    quantize: str | None,
    cuda_graphs: bool | None,
    device: str,
    repeat: int,
    seed: int,
    threads: int | None,
    verifier: str,
    adaptive: bool,
    json_path: Path | None,
    html_path: Path | None,
    resume: bool,
) -> None:
    """Measure how much faster drafters make MODEL, against plain decoding of it in the same process.

    Every text is compared with plain decoding's. Where they differ by more than rounding explains, no speed-up is
    printed and the exit status is 1.
    """
    import torch

    from specdec.benchmarks.mt_bench import run_mt_bench
    from specdec.benchmarks.questions import load_questions
    from specdec.benchmarks.settings import Settings
    from specdec.cli.bench.screen import Screen, report
    from specdec.cli.console import note, slow_status
    from specdec.registry import resolve_drafter

    if queue is not None and queue <= batch_size:
        raise ValueError(f"--queue must be above --batch-size, {batch_size}, got {queue}")
    check_outputs(json_path, html_path, resume=resume)
    if "auto" not in drafters:  # else which options there are depends on the model
        make_specs(drafters, options)
    found = load_questions(questions)
    found = found if limit is None else found.limit(limit)
    if threads is not None:
        torch.set_num_threads(threads)
    with slow_status(f"loading {model}") as say:
        from specdec.graphs import check_graphs, make_target
        from specdec.models import find_device, load_model

        check_graphs(cuda_graphs, find_device(device), None)
        loaded = load_model(model, dtype=dtype, device=device, packed=True, progress=say, quantize=quantize)
        target = make_target(loaded.model, cuda_graphs=cuda_graphs)
    specs = make_specs(drafters, options, resolve_drafter("auto", target))
    if loaded.tokenizer is None:
        raise ValueError(f"{model!r} has no tokenizer: questions are text")
    settings = Settings(
        model=model, dtype=quantize or str(target.dtype).removeprefix("torch."), device=str(target.device),
        drafters=specs, turns=turns, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size,
        queue=queue or 0, repeat=repeat, seed=seed, verifier=verifier, adaptive=adaptive,
        cuda_graphs=bool(cuda_graphs),
    )  # fmt: skip
    note(f"questions: {found.name} ({found.source}), {len(found.questions)} of sha256 {found.sha256}")
    with resumable(json_path), Screen() as screen:
        result = run_mt_bench(
            target, loaded.tokenizer, settings, found, out=json_path, resume=resume, progress=screen.show,
            command=["specdec", *sys.argv[1:]],
        )  # fmt: skip
    click.echo(report(result))
    if json_path is not None:
        note(f"wrote {json_path}")
    if html_path is not None:
        from specdec.benchmarks.report import write_html

        write_html(result.to_json(), html_path)
        note(f"wrote {html_path}")


def make_specs(drafters: Sequence[str], options: Sequence[str], auto: str = "auto") -> tuple[DrafterSpec, ...]:
    """Drafters from names and ``drafter.option=value`` texts; "none" is left out, as plain decoding always runs.

    Args:
        drafters: names.
        options: texts.
        auto: what "auto" stands for; its options go by either name.

    Raises:
        ValueError: for an unknown drafter, an option of a drafter that does not run, or one the drafter refuses.
    """
    from specdec.benchmarks.schema import PLAIN
    from specdec.benchmarks.settings import DrafterSpec
    from specdec.cli.options import split_assignments
    from specdec.registry import create_drafter, unknown

    chosen: dict[str, dict[str, str]] = {auto if name == "auto" else name: {} for name in drafters if name != PLAIN}
    for key, value in split_assignments(tuple(options)).items():
        drafter, dot, option = key.partition(".")
        if not dot:
            raise ValueError(f"-o takes DRAFTER.NAME=VALUE here, got {key}={value!s}")
        drafter = auto if drafter == "auto" else drafter
        if drafter not in chosen:
            raise ValueError(unknown("drafter of -o", drafter, chosen))
        chosen[drafter][option] = value
    specs = []
    for name, values in chosen.items():
        create_drafter(name, values)
        specs.append(DrafterSpec(name, name, dict(values)))
    return tuple(specs)
