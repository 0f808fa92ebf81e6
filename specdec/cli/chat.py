"""``specdec chat``: a conversation on the terminal or over a pipe."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from specdec.cli import INTERRUPTED
from specdec.cli.console import TextPrinter, note, summary
from specdec.cli.generate import decode_utf8
from specdec.cli.options import (
    ModelOptions,
    load_decoder,
    make_params,
    model_options,
    sampling_options,
    system_option,
)

if TYPE_CHECKING:
    from specdec.conversation import Conversation
    from specdec.sampling import SamplingParams
    from specdec.stats import DecodeStats

COMMANDS = ("/exit", "/reset", "/stats")


@click.command()
@system_option
@sampling_options
@model_options
def chat(system: str | None, sampling: dict[str, Any], options: ModelOptions) -> None:
    """Chat with a model; the cache is kept between turns.

    One line is one message. /reset starts again, /stats shows the last answer's numbers, /exit or end of input ends.
    Ctrl-C stops an answer; at the prompt it ends with exit status 130.
    """
    params = make_params(sampling)
    decoder = load_decoder(options)
    from specdec.conversation import Conversation

    conversation = Conversation(decoder, system)
    if sys.stdin.isatty():
        note(f"{options.model}, drafter {decoder.drafter.name}. {', '.join(COMMANDS)}; Ctrl-C stops an answer.")
    last: DecodeStats | None = None
    while True:
        try:
            line = read_line()
        except KeyboardInterrupt:
            click.echo(err=True)
            raise SystemExit(INTERRUPTED) from None
        if line is None or line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line == "/stats":
            note("no answer yet" if last is None else summary(last))
        elif line:
            try:
                last = answer(conversation, line, params)
            except ValueError as error:  # this message cannot be served; the conversation can go on
                click.echo(f"Error: {error}", err=True)


def answer(conversation: Conversation, line: str, params: SamplingParams) -> DecodeStats:
    """Send a line and print the answer as it comes; Ctrl-C ends the answer."""
    if line.startswith("/"):
        from specdec.registry import unknown

        raise ValueError(unknown("command", line, COMMANDS))
    printer = TextPrinter()
    with conversation.send(line, params) as stream:
        try:
            for piece in stream:
                printer.write(piece.text, piece.from_draft)
        except KeyboardInterrupt:
            pass
    printer.finish(stream.result.text)
    if stream.result.error:
        raise ValueError(stream.result.error)
    return stream.stats


def read_line() -> str | None:
    """The next message without surrounding blanks, None at the end of the input."""
    if not sys.stdin.isatty():
        data = sys.stdin.buffer.readline()
        return decode_utf8(data, "stdin").strip() if data else None
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  gives input() line editing
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None
