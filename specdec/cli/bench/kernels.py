"""``specdec bench kernels``: the operations in ``specdec.kernels`` beside the least time they can take."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from specdec.cli.bench.outputs import check_outputs


@click.command("kernels")
@click.option("--op", "names", multiple=True, metavar="NAME", help="Operation to measure; repeatable. All by default.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--seconds", type=click.FloatRange(min=0), help="What it may take; 420 by default.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
def kernels(
    names: tuple[str, ...], device: str, seconds: float | None, threads: int | None, json_path: Path | None
) -> None:
    """Measure the GPU kernels, each beside its floor: bytes over the copy bandwidth, or arithmetic over the rate.

    Results are compared with the references first; where one is wrong nothing is timed and the exit status is 1.
    Without a CUDA device the CPU paths run at small sizes: a test of the command, not of the kernels.
    """
    import torch

    from specdec.benchmarks.kernel_cases import OPERATIONS
    from specdec.benchmarks.kernels import SECONDS, run_kernels
    from specdec.benchmarks.record import write_json
    from specdec.cli.console import note
    from specdec.registry import unknown

    for name in names:
        if name not in OPERATIONS:
            raise ValueError(unknown("operation", name, OPERATIONS))
    check_outputs(json_path)
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.inference_mode():
            result = run_kernels(
                torch.device(device), {name: OPERATIONS[name] for name in names or OPERATIONS},
                SECONDS if seconds is None else seconds, note, ["specdec", *sys.argv[1:]],
            )  # fmt: skip
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    click.echo(report(result))
    if json_path is not None:
        write_json(json_path, result)
        note(f"wrote {json_path}")


def report(result: Mapping[str, Any]) -> str:
    """The result as a table; what it must not be taken for comes first."""
    from specdec.benchmarks.kernels import describe
    from specdec.cli.bench.screen import align

    rows = [("operation", "size", "by", "median us", "p10", "p90", "floor us", "of floor", "timed by")]
    reasons = []
    for case in result["cases"]:
        size = describe(case["shape"])
        for name, found in case["results"].items():
            if "median_us" not in found:
                (why, reason), *_ = found.items()
                reasons.append(f"{why}: {case['operation']}, {size}, {name}: {reason}")
                continue
            times = (found["median_us"], found["p10_us"], found["p90_us"], case["floor_us"])
            rows.append(
                (
                    case["operation"],
                    size,
                    name,
                    *(f"{t:.1f}" for t in times),
                    f"{found['of_floor']:.0%}",
                    found["timed_by"],
                )
            )
    machine = result["machine"]
    head = [
        *([result["note"]] if result["note"] else []),
        f"{machine['gpu'] or machine['cpu']}: copies {result['copy_gb_s']:.0f} GB/s, products "
        f"{result['matmul_tflops']:.2f} TFLOP/s",
    ]
    return "\n".join([*head, align(rows, 3), *reasons])
