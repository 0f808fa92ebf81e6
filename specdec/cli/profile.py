"""``specdec profile``: measure what passes cost on this machine, and keep it for the planner."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specdec.cli.console import note, slow_status
from specdec.cli.options import graphs_option, kv_option, quantize_option
from specdec.files import write_atomically

if TYPE_CHECKING:
    from specdec.latency import LatencyCurve

_PLOT_HEIGHT = 320


@click.command()
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--dtype", default="auto", show_default=True, help="Weights' type: auto, fp32, bf16, fp16.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@quantize_option
@kv_option
@graphs_option
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--refresh", is_flag=True, help="Measure again where a profile is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write the curves to an SVG file.")
def profile(
    model: str, dtype: str, device: str, quantize: str | None, kv: str | None, cuda_graphs: bool | None,
    threads: int | None, refresh: bool, as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """Measure the time of a pass over n nodes, at several lengths and batch sizes.

    The result is kept for this machine, number of threads, model, precisions, kind of layers and captured passes;
    `specdec generate` and others, given the same, plan their trees by it. Without one they go by what they see while
    decoding.
    """
    import torch

    from specdec.graphs import check_graphs, make_target
    from specdec.kv_quantized import find_kv
    from specdec.latency import LatencyKey, load_curve, measure_curve, save_curve
    from specdec.models import find_device, load_model

    kv_bits = find_kv(kv)
    check_graphs(cuda_graphs, find_device(device), kv_bits)
    if threads is not None:
        torch.set_num_threads(threads)
    with slow_status(f"loading {model}") as say:
        loaded = load_model(model, dtype=dtype, device=device, packed=True, quantize=quantize, progress=say)
        target = make_target(loaded.model, kv_bits, cuda_graphs)
        key = LatencyKey.of(target)
        curve = None if refresh else load_curve(key)
        if curve is None:
            say("measuring: leave the machine alone for half a minute")
            curve = measure_curve(target)
            save_curve(curve, key)
    if plot is not None:
        write_atomically(plot, draw(curve, f"{model}, {key.precision}, {key.device}"))
    if as_json:
        click.echo(json.dumps({"model": model, "key": vars(key), "curve": curve.to_json()}))
    else:
        click.echo(f"{key.architecture}, {key.precision}, {key.threads} threads, {key.device}")
        click.echo(table(curve))
        note(f"kept in {key.path()}")


def table(curve: LatencyCurve) -> str:
    """Milliseconds, a line per batch size and length; below each how many plain passes that is."""
    lines = ["batch  length" + "".join(f"{f'n={nodes}':>9}" for nodes in curve.nodes)]
    for batch in curve.batches:
        for length in curve.lengths:
            times = [curve.at(nodes, batch, length) for nodes in curve.nodes]
            lines.append(f"{batch:>5}{length:>8}" + "".join(f"{ms:>9.2f}" for ms in times))
            lines.append(" " * 13 + "".join(f"{ms / times[0]:>8.2f}x" for ms in times))
    return "\n".join(lines)


def draw(curve: LatencyCurve, title: str) -> str:
    """An SVG file: the curves over n, both sides labelled, light and dark."""
    from specdec.benchmarks.charts import NUM_COLOURS, line_chart, mark
    from specdec.benchmarks.report import STYLE

    most = math.log(curve.nodes[-1]) or 1.0
    series = {
        f"batch {batch}, {length} cached tokens": [
            (math.log(nodes) / most, curve.at(nodes, batch, length)) for nodes in curve.nodes
        ]
        for batch in curve.batches
        for length in curve.lengths
    }
    chart = line_chart(
        "latency",
        "Milliseconds of a pass over n nodes",
        series,
        x_labels=[(math.log(nodes) / most, f"n = {nodes}" if nodes == 1 else str(nodes)) for nodes in curve.nodes],
        y_most=max(ms for points in series.values() for _, ms in points),
        height=_PLOT_HEIGHT,
    )
    chart = chart.removeprefix('<div class="plot">').removesuffix("</div>")
    top = 40 + 20 * len(series)
    named = "".join(
        f'<g class="s{index % NUM_COLOURS}" transform="translate(76 {48 + 20 * index})">{mark(index)}'
        f'<text x="14" y="5">{escape(label)}</text></g>'
        for index, label in enumerate(series)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="720" height="{top + _PLOT_HEIGHT + 60}" '
        f'style="background: var(--page); font-family: system-ui, sans-serif"><style>{STYLE}</style>'
        f'<text x="60" y="24" class="row">Milliseconds of a pass over n nodes: {escape(title)}</text>{named}'
        f'<svg x="60" y="{top}" width="630" height="{_PLOT_HEIGHT + 50}" overflow="visible">{chart}</svg></svg>\n'
    )
