"""What results say in Markdown: tables, and where their figures come from; a hostile name stays text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.benchmarks.report import command_text, load_text

# An underscore within a word is text to every Markdown reader of today, and names of precisions are full of them.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~]|(?<![^\W_])_|_(?![^\W_])")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells below their heads; texts of cells are escaped, heads are not."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def origin(result: Mapping[str, Any], precision: str = "", extra: str = "") -> str:
    """One line: what ran in which precision on what, when, from which source, and the command.

    Args:
        result: of any benchmark, as JSON has it.
        precision: instead of the settings' dtype.
        extra: one more fact.
    """
    settings, machine, questions = result["settings"], result["machine"], result["questions"]
    temperature, busy = settings.get("temperature") or 0.0, load_text(machine)
    facts = [
        settings["model"],
        precision or settings["dtype"] or "unknown precision",
        f"{settings['max_new_tokens']} new tokens",
        f"{questions['count']} questions of {questions['name']} (sha256 {questions['sha256'][:12]})",
        "both turns" if settings.get("turns") == 2 else "",
        f"temperature {temperature:g}" if temperature else "",
        "" if settings.get("lossless", True) else f"LOSSY policy {settings['verifier']}",
        "captured passes" if settings.get("cuda_graphs") else "",
        f"batches of {settings['batch_size']}" if settings.get("batch_size", 1) != 1 else "",
        f"{settings['queue']} questions a call, which join as rows end" if settings.get("queue") else "",
        extra,
        machine.get("gpu") or "",
        machine["cpu"] or "unknown processor",
        f"{machine['threads']} thread(s)" + (f" ({busy})" if busy else ""),
        str(result["date"])[:10],
        f"commit {_short(result['commit'])}",
    ]
    return f"{', '.join(escaped(fact) for fact in facts if fact)}: {_code(command_text(result['command']))}"


def _short(commit: str | None) -> str:
    """Twelve digits; that files differed from the commit stays said."""
    if commit is None:
        return "unknown"
    return commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")


def _cell(text: str) -> str:
    """Figures are written as they are: brackets around an interval are no link."""
    return text if re.fullmatch(r"[\d. ]+\[[\d., ]+\]", text) else escaped(text)


def escaped(text: str) -> str:
    """Text on one line in which Markdown and HTML see nothing but text."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _code(text: str) -> str:
    """A code span, between more backticks than the text has in a row."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{'`' * (longest + 1)}{room}{text}{room}{'`' * (longest + 1)}"
