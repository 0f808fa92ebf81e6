"""``specdec bench``: measurements. Subcommands are imported when they are asked for."""

from __future__ import annotations

import importlib

import click

BENCHMARKS = {
    "mt-bench": "specdec.cli.bench.mt_bench:mt_bench",
}
"""Subcommand -> "module:function"."""


class LazyBenchmarks(click.Group):
    """Imports a benchmark's module only for that benchmark."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help page."""
        return sorted(BENCHMARKS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None where there is none of that name."""
        if cmd_name not in BENCHMARKS:
            return None
        module, _, function = BENCHMARKS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), function)
        return command


@click.group(cls=LazyBenchmarks)
def bench() -> None:
    """Measure speed-ups on this machine."""
