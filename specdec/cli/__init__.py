"""The command line: ``specdec COMMAND``. Commands are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

COMMANDS = {
    "bench": "specdec.cli.bench:bench",
    "calibrate": "specdec.cli.calibrate:calibrate",
    "chat": "specdec.cli.chat:chat",
    "demo": "specdec.cli.demo:demo",
    "export": "specdec.cli.export:export",
    "generate": "specdec.cli.generate:generate",
    "list": "specdec.cli.list:list_",
    "plan": "specdec.cli.plan:plan",
    "profile": "specdec.cli.profile:profile",
    "train": "specdec.cli.train:train",
    "vllm-config": "specdec.cli.vllm_config:vllm_config",
}
"""Command -> "module:function"."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, 128 + SIGINT."""


class InputError(click.ClickException):
    """Something the user gave cannot be served; exit status 2."""

    exit_code = 2


class LazyGroup(click.Group):
    """Imports a command's module only for that command, and turns errors of the user's making into one line.

    Args:
        sources: command -> "module:function".
        attributes: what click gives every group.
    """

    def __init__(self, *, sources: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._sources = sources

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help page."""
        return sorted(self._sources)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None where there is none of that name."""
        if cmd_name not in self._sources:
            return None
        module, _, function = self._sources[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command: ValueError exits with 2, Ctrl-C with 130, both without a traceback."""
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise InputError(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from specdec import __version__

        click.echo(f"specdec {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, sources=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Version.")
def main() -> None:
    """Speculative decoding for Hugging Face models: the same text, sooner."""
