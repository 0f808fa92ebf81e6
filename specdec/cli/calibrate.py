"""``specdec calibrate``: measure how often a drafter's guesses are right, and keep it with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from specdec.cli.options import split_assignments
from specdec.cli.train import Line, describe_features, describe_writing, load_target
from specdec.registry import make_config, unknown

if TYPE_CHECKING:
    from specdec.training.calibrate import Calibration


@click.command()
@click.option("-d", "--drafter", required=True, help="Trained drafter, or skip.")
@click.option("-o", "options", multiple=True, metavar="weights=DIR", help="Folder of the weights; else the usual one.")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--data", type=click.Path(path_type=Path), help="Jsonl of prompts or conversations; else its own.")
@click.option("--tokens", type=click.IntRange(min=1), default=20_000, show_default=True, help="Tokens of replies.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Keep texts and features there.")
@click.option("--dtype", default="auto", show_default=True, help="The target's: auto, fp32, bf16, fp16.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--seed", type=int, help="Of the texts; by default one apart from the training's.")
def calibrate(
    drafter: str,
    options: tuple[str, ...],
    model: str,
    data: Path | None,
    tokens: int,
    cache: Path | None,
    dtype: str,
    device: str,
    threads: int | None,
    seed: int | None,
) -> None:
    """Measure a trained drafter's hit rates per depth and rank, and write them into its config.json.

    Drafters shape their trees by them: -o tree=calibrated, -o depth=0 of model, the sizes of PPD's. The text is held
    out: the model writes it now, from another seed than the training's.

    For skip the layers that draft best for their cost are searched, and kept with their rates, where --drafter skip
    finds them or in -o weights=DIR; -o trials=N, levels=N, depth=N, vocab_size=N are the search's.
    """
    import torch

    from specdec.drafters.skip import NAME
    from specdec.training.calibrate import CalibrationReporter, CalibrationRequest, calibrate_drafter
    from specdec.training.method import METHODS
    from specdec.training.skip import SearchOptions, calibrate_skip

    if drafter not in (*METHODS, NAME):
        raise ValueError(unknown("trainable drafter", drafter, (*METHODS, NAME)))
    given = split_assignments(options)
    searching = None
    if drafter == NAME:
        searching = make_config(SearchOptions, {k: v for k, v in given.items() if k != "weights"}, "the search")
        given = {k: v for k, v in given.items() if k == "weights"}
    folder = weights_option(given)
    if threads is not None:
        torch.set_num_threads(threads)
    show = Line()
    report = CalibrationReporter(
        note=show.note,
        writing=lambda done: show(describe_writing(done)),
        features=lambda done: show(describe_features(done)),
        batch=lambda done, total: show(f"batch {done}/{total}", always=done == total),
    )
    target, tokenizer = load_target(model, dtype, device)
    with TemporaryDirectory(prefix="specdec-calibrate-") as temporary:
        request = CalibrationRequest(drafter, folder, cache or Path(temporary), tokens, data, seed)
        if searching is None:
            found = calibrate_drafter(request, target, tokenizer, report)
        else:
            subset, found = calibrate_skip(request, target, tokenizer, report, searching)
    show.end()
    if searching is not None:
        click.echo(
            f"layers {', '.join(map(str, subset.layers))} of {target.num_layers}: a draft pass reads "
            f"{100 * subset.cost:.0f} % of a whole one; a chain of drafts is up to {subset.speedup:.2f} times as fast "
            "as plain decoding"
        )
    click.echo(describe(found))


def weights_option(options: Mapping[str, str]) -> str:
    """The folder given with ``-o weights=``; "" where none is. Raises ValueError for other options."""
    for name in options:
        if name != "weights":
            raise ValueError(unknown("option of calibrate", name, ["weights"]))
    return options.get("weights", "")


def describe(found: Calibration) -> str:
    """A table of rates in percent, a line per depth, and where they were written."""
    ranks = len(found.hit_rates[0])
    lines = ["depth" + "".join(f"{f'rank {rank}':>9}" for rank in range(1, ranks + 1)) + f"{'positions':>11}"]
    for depth, (rates, count) in enumerate(zip(found.hit_rates, found.positions, strict=True), start=1):
        lines.append(f"{depth:>5}" + "".join(f"{100 * rate:>8.1f}%" for rate in rates) + f"{count:>11}")
    lines.append(f"written to {found.folder / 'config.json'} (about tau {found.expected_tau:.2f} as a chain)")
    return "\n".join(lines)
