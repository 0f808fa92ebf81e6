"""Rebuilds the result tables of README and docs: ``python -m specdec.benchmarks.tables [--check]``.

A block ``<!-- results: mt-bench FILE.json -->`` ... ``<!-- /results -->`` is filled from that file of
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

from specdec.benchmarks.record import write_atomically

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """The text with every block rebuilt.

    Raises:
        ValueError: for a kind or a file that is not known, named.
    """

    def replace(match: re.Match[str]) -> str:
        head, kind, file, tail = match.groups()
        path = results / file
        if kind != "mt-bench" or not path.is_file():
            raise ValueError(f"unknown results block: {kind} {file} (kinds: mt-bench; files lie in {results.name}/)")
        return head + mt_bench_table(json.loads(path.read_text(encoding="utf-8"))) + tail

    return _BLOCK.sub(replace, text)


def mt_bench_table(result: dict[str, Any]) -> str:
    """A Markdown table of the overall figures, and where they come from."""
    lines = ["| drafter | tok/s | speed-up [95 %] | tau | texts equal to plain |", "|---|---|---|---|---|"]
    for label, values in result["summary"]["overall"].items():
        gain = values["speedup"]
        speedup = "" if gain is None else f"{gain['median']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
        equal = "" if gain is None else f"{values['equal_runs']} of {values['num_runs']}"
        cells = (_escaped(label), f"{values['decode_tokens_per_s']:.1f}", speedup, f"{values['tau']:.2f}", equal)
        lines.append("| " + " | ".join(cells) + " |")
    load = result["machine"].get("load_at_start") or 0.0
    busy = f" (busy: load {load:.1f} at the start, so take the times with care)" if load > 0.5 else ""
    settings, machine, questions = result["settings"], result["machine"], result["questions"]
    lines.append("")
    lines.append(
        f"{_escaped(settings['model'])}, {_escaped(settings['dtype'])}, {settings['max_new_tokens']} new tokens, "
        f"{questions['count']} questions of {_escaped(questions['name'])} (sha256 {questions['sha256'][:12]}), "
        f"{_escaped(machine['cpu'])}, {machine['threads']} thread(s){busy}, {result['date'][:10]}, "
        f"commit {_escaped(str(result['commit'])[:12])}: `{_escaped(' '.join(result['command']))}`"
    )
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the files, or with ``--check`` print what differs and return 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    check = parser.parse_args(arguments).check
    stale = False
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = path.read_text(encoding="utf-8")
        after = fill(before, ROOT / "benchmarks" / "results")
        if before != after and check:
            stale = True
            sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), path.name))
        elif before != after:
            write_atomically(path, after)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
