"""``specdec bench``: measurements. Subcommands are imported when they are asked for."""

from __future__ import annotations

import click

from specdec.cli import LazyGroup

BENCHMARKS = {
    "gpu": "specdec.benchmarks.gpu:gpu",
    "kernels": "specdec.cli.bench.kernels:kernels",
    "layer-parallel": "specdec.cli.bench.layer_parallel:layer_parallel",
    "mt-bench": "specdec.cli.bench.mt_bench:mt_bench",
    "peers": "specdec.cli.bench.peers:peers",
    "prefix": "specdec.cli.bench.prefix:prefix",
    "quant": "specdec.cli.bench.quant:quant",
    "serve": "specdec.cli.bench.serve:serve",
    "texts": "specdec.cli.bench.texts:texts",
}
"""Subcommand -> "module:function"."""


@click.group(cls=LazyGroup, sources=BENCHMARKS)
def bench() -> None:
    """Measure speed-ups on this machine, and check that texts stay the same."""
