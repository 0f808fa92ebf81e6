"""What the commands print: text as it comes, one summary line, a spinner for what takes long."""

from __future__ import annotations

import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from specdec.stats import DecodeStats

SPINNER_AFTER = 2.0
"""Seconds something may take without a sign of life."""


def escape_controls(text: str) -> str:
    """Text that cannot steer a terminal: control characters but newline and tab become ``\\x1b`` and the like."""
    return "".join(
        f"\\x{ord(char):02x}" if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text
    )


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour: a terminal, and the user did not set NO_COLOR (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class TextPrinter:
    """Prints generated text to stdout as it comes: escaped for a terminal, unchanged for a file or pipe.

    Attributes:
        written: characters of the text printed so far.
    """

    def __init__(self, terminal: bool | None = None, colour: bool | None = None) -> None:
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.colour = wants_colour(sys.stdout) if colour is None else colour
        self.written = 0

    def write(self, text: str, from_draft: bool = False) -> None:
        """Print a piece; accepted draft tokens are green."""
        self.written += len(text)
        shown = escape_controls(text) if self.terminal else text
        if shown:
            click.echo(click.style(shown, fg="green") if from_draft and self.colour else shown, nl=False, color=True)

    def finish(self, text: str) -> None:
        """Print what ``text``, the whole of it, has beyond the pieces written, and end the line."""
        self.write(text[self.written :])
        click.echo()
        self.written = 0


def summary(stats: DecodeStats) -> str:
    """One line on a generation."""
    parts = [
        f"{stats.emitted} token{'s' * (stats.emitted != 1)}",
        f"{stats.tokens_per_second:.1f} tok/s",
        f"tau {stats.tau:.2f} (tokens per target pass)",
        f"drafter {stats.drafter}",
        f"accepted {stats.accepted}/{stats.drafted} drafted",
    ]
    if not stats.lossless:
        parts.append(f"verifier {stats.verifier} is lossy")
    if stats.plain_reason:
        parts.append(f"{stats.plain_passes}/{stats.passes} passes plain ({stats.plain_reason})")
    if stats.speculation_off:
        parts.append(f"drafting stopped: {stats.speculation_off}")
    return ", ".join(parts)


def note(text: str) -> None:
    """Print a remark to stderr, dimmed on a terminal."""
    text = escape_controls(text)
    click.echo(click.style(text, dim=True) if wants_colour(sys.stderr) else text, err=True, color=True)


@contextmanager
def slow_status(text: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner on stderr once the block has taken ``SPINNER_AFTER`` seconds; nothing where it is no terminal.

    Yields:
        A function that replaces the text.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape

    status = Console(stderr=True).status(escape(text))
    timer = threading.Timer(SPINNER_AFTER, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda message: status.update(escape(message))
    finally:
        timer.cancel()
        timer.join()
        status.stop()
