"""A measured result as one self-contained HTML page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from specdec.benchmarks.record import write_atomically

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 60rem; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


def write_html(result: dict[str, Any], path: Path) -> None:
    """Write the overall and per-category tables of an MT-Bench result; every string in it is escaped."""
    settings, machine = result["settings"], result["machine"]
    facts = [
        f"model {settings['model']}, {settings['dtype']}",
        f"{machine['cpu']}, {machine['threads']} threads",
        f"questions {result['questions']['name']}, sha256 {result['questions']['sha256']}",
        f"{result['date']}, commit {result['commit']}",
        " ".join(result["command"]),
    ]
    tables = [_table("overall", result["summary"]["overall"])]
    tables += [_table(name, figures) for name, figures in result["summary"]["categories"].items()]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MT-Bench speed-up</title><style>{_STYLE}</style><h1>MT-Bench speed-up</h1>"
        + "".join(f"<p>{escape(fact)}</p>" for fact in facts)
        + "".join(tables)
        + "</html>\n"
    )
    write_atomically(path, page)


def _table(caption: str, figures: dict[str, dict[str, Any]]) -> str:
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("drafter", "tok/s", "speed-up [95 %]", "tau", "equal texts")
    )
    rows = "".join(_row(label, values) for label, values in figures.items())
    return f'<h2>{escape(caption)}</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _row(label: str, values: dict[str, Any]) -> str:
    gain = values["speedup"]
    speedup = "" if gain is None else f"{gain['median']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"
    equal = f"{values['equal_runs']} of {values['num_runs']}"
    cells = (f"{values['decode_tokens_per_s']:.1f}", speedup, f"{values['tau']:.2f}", equal)
    return f'<tr><th scope="row">{escape(label)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
