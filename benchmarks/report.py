"""A measured result as one self-contained HTML page: no script, nothing fetched, light and dark, wide and narrow."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from specdec.benchmarks.charts import bar_chart, interval_chart, legend, line_chart
from specdec.benchmarks.schema import PLAIN, SCHEMA, CategoryFloor
from specdec.benchmarks.summary import floor_text
from specdec.files import write_atomically
from specdec.stats import PHASES

KIND = "mt-bench"
NOTHING = "–"
_BUSY_LOAD = 0.5
_X_LABELS = 8  # numbers below an axis that fit a phone
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1b1f24; --quiet: #57606a; --rule: #d0d5da; --box: #f3f5f7;
--link: #0b5cad; --s0: #0b5cad; --s1: #b3400b; --s2: #1a7340; --s3: #8a2a8c; --s4: #7a5a00; --s5: #0f6e7a;
--s6: #b01e5a; --s7: #4d5359; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e9ec; --quiet: #a9b2bc; --rule: #3a4149;
--box: #1f2429; --link: #6cb2ff; --s0: #6cb2ff; --s1: #ff9d5c; --s2: #5fd38a; --s3: #d99bea; --s4: #e3c14f;
--s5: #5ccfdd; --s6: #ff8fb8; --s7: #c4c9cf; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--page); color: var(--text);
font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0 .8rem; }
.quiet { color: var(--quiet); fill: var(--quiet); font-weight: 400; }
.notice { border-left: 4px solid var(--s1); background: var(--box); padding: .5rem .8rem; }
code { display: block; font: .9em/1.6 ui-monospace, monospace; background: var(--box); padding: .3rem .6rem; }
code span { display: inline-block; max-width: 100%; }
dl { display: grid; grid-template-columns: 1fr; margin: .8rem 0; }
dt { color: var(--quiet); } dd { margin: 0 0 .4rem; }
@media (min-width: 40rem) { dl { grid-template-columns: 10rem 1fr; } dd { margin: 0; } }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
.scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th span { display: inline-block; width: max-content; max-width: 12rem; white-space: normal; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; white-space: normal; }
thead th span { max-width: 5.6rem; }
tbody th { font-weight: 600; }
.group { padding-top: 1rem; color: var(--quiet); } .group span { max-width: 18rem; }
th:first-child, .words td, .words th { text-align: left; }
.words td { white-space: normal; min-width: 10rem; }
tbody th:first-child { padding-left: 0; } thead th:first-child { padding-left: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .4rem 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: .4rem; } .legend svg { flex: none; }
.plot { padding: .5rem 1rem .5rem .5rem; } .lines .plot { padding-left: 4rem; }
.plot text { font-size: 14px; fill: var(--text); } .plot .row { font-weight: 600; font-size: 15px; }
.plot text { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
.plot .quiet { fill: var(--quiet); } .grid { stroke: var(--rule); }
.reference { stroke: var(--text); stroke-width: 2; stroke-dasharray: 5 4; }
""" + "".join(f".s{number} {{ color: var(--s{number}); }}\n" for number in range(8))


def write_html(result: Mapping[str, Any], path: Path) -> None:
    """Write an MT-Bench result as a page, whole or not at all.

    Args:
        result: what ``BenchResult.to_json`` gives; figures may be null. Every text in it is escaped.
        path: the file, replaced where it is there.

    Raises:
        ValueError: for a result of another kind or schema.
    """
    if result.get("kind") != KIND or result.get("schema") != SCHEMA:
        raise ValueError(
            f"a report is made of a {KIND!r} result of schema {SCHEMA}, "
            f"got {result.get('kind')!r} of schema {result.get('schema')!r}"
        )
    write_atomically(path, _page(result))


def number_text(value: float | None, digits: int = 1) -> str:
    """A rounded number; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def interval_text(interval: Mapping[str, float] | None) -> str:
    """A median and its interval, ``1.25 [1.17, 1.49]``; nothing for None."""
    return "" if interval is None else f"{interval['median']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def equal_text(label: str, figures: Mapping[str, Any]) -> str:
    """How many texts equal plain decoding's, of those that can be compared; nothing for plain decoding itself."""
    if label == PLAIN:
        return ""
    equal, total = figures["equal_runs"], figures["num_runs"]
    compared = (equal or 0) + (figures["differing_runs"] or 0)
    if not compared:
        return "not compared"
    return f"{equal} of {total}" if compared == total else f"{equal} of {compared} compared"


def load_text(machine: Mapping[str, Any]) -> str:
    """A warning where the machine was busy before the benchmark began; else nothing."""
    load = machine.get("load_at_start") or 0.0
    return f"busy: load {load:.1f} at the start, so take the times with care" if load > _BUSY_LOAD else ""


def command_text(command: Sequence[str]) -> str:
    """The command line on one line, quoted as a shell wants it."""
    return " ".join(shlex.join(command).split())


def _page(result: Mapping[str, Any]) -> str:
    settings, summary = result["settings"], result["summary"]
    overall: Mapping[str, Any] = summary["overall"]
    drafters = [label for label in overall if label != PLAIN]
    busy = load_text(result["machine"])
    title = f"MT-Bench speed-up of {settings['model']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_subtitle(result))}</p>',
        f'<p class="notice">The machine was {escape(busy)}.</p>' if busy else "",
        _facts(result),
        "<h2>Overall</h2>",
        "<p>Speed-up is the median, over questions, of the ratio to plain decoding (none) of the same question in the "
        "same process, with a 95 % bootstrap interval. Tau is tokens per target pass.</p>",
        _overall_table(overall),
        *_categories(summary["categories"], overall, drafters),
        _floor(summary.get("floor")),
        *_acceptance(overall, drafters),
        *_time_split(overall),
        *_latency(summary.get("latency_curve") or []),
        "<h2>Versions and settings</h2>",
        _pairs("versions", {**result["versions"]}),
        _pairs("settings", {**settings, "drafters": _drafters_text(settings.get("drafters") or [])}),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + "\n</main></body></html>\n"
    )


def _subtitle(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    place = machine.get("gpu") or machine.get("cpu") or "an unknown machine"
    return f"{result['settings'].get('dtype') or 'unknown precision'} on {place}, {str(result['date'])[:10]}"


def _facts(result: Mapping[str, Any]) -> str:
    machine, questions, settings = result["machine"], result["questions"], result["settings"]
    flags = ", ".join(machine.get("flags") or [])
    memory = result["summary"].get("peak_memory_bytes")
    weights, bandwidth = result.get("weight_bytes"), result.get("bandwidth_gb_s")
    facts = {
        "Model": f"{settings['model']}, {settings.get('dtype') or 'unknown precision'}",
        "Machine": _joined(
            machine.get("gpu"), machine.get("cpu"), _count(machine.get("threads"), "thread"),
            _count(machine.get("cores"), "core"), f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else None,
            flags, machine.get("os"),
        ),
        "Questions": _joined(
            f"{questions['count']} of {questions['name']}", questions.get("source"), f"sha256 {questions['sha256']}"
        ),
        "Weights": _joined(
            f"{weights / 1e9:.3g} GB" if weights else None,
            f"memory bandwidth measured {bandwidth:.3g} GB/s" if bandwidth else None,
            f"peak memory {memory / 2**30:.2f} GiB" if memory else None,
        ),
        "Date": str(result["date"]),
        "Commit": str(result["commit"] or "unknown"),
    }  # fmt: skip
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text) or NOTHING}</dd>" for name, text in facts.items())
    command = " ".join(f"<span>{escape(shlex.quote(word))}</span>" for word in result["command"]) or NOTHING
    return f"<dl>{rows}<dt>Command</dt><dd><code>{command}</code></dd></dl>"


def _overall_table(overall: Mapping[str, Any]) -> str:
    heads = (
        "drafter", "tok/s", "speed-up [95\u00a0%]", "tok/s end to end", "speed-up end to end [95\u00a0%]", "tau",
        "first token, ms", "share of roofline", "equal texts",
    )  # fmt: skip
    rows = []
    for label, values in overall.items():
        rows.append((
            label, number_text(values["decode_tokens_per_s"]), interval_text(values["speedup"]),
            number_text(values["end_to_end_tokens_per_s"]), interval_text(values["end_to_end_speedup"]),
            number_text(values["tau"], 2), number_text(values["first_token_ms"], 0),
            _share(values["roofline_fraction"]), equal_text(label, values),
        ))  # fmt: skip
    return _table("Overall figures", heads, rows)


def _categories(
    categories: Mapping[str, Mapping[str, Any]], overall: Mapping[str, Any], drafters: Sequence[str]
) -> list[str]:
    if not drafters:
        return []
    rows = [
        (name, {label: (found.get(label) or {}).get("speedup") for label in drafters})
        for name, found in (("overall", overall), *categories.items())
    ]
    groups: dict[str, list[Sequence[str]]] = {name: [] for name in categories}
    for name, found in categories.items():
        for label, values in found.items():
            speedup = interval_text(values["speedup"])
            rate, tau = number_text(values["decode_tokens_per_s"]), number_text(values["tau"], 2)
            groups[name].append((label, rate, speedup, tau, equal_text(label, values)))
    heads = ("drafter", "tok/s", "speed-up [95\u00a0%]", "tau", "equal texts")
    return [
        "<h2>Speed-up by category</h2>",
        "<p>Marks are medians, lines 95 % intervals; the dashed line at 1 is plain decoding.</p>",
        legend(drafters),
        interval_chart("speedup", "Speed-up by category with 95 % intervals", rows, drafters),
        _table("Figures by category", heads, groups),
    ]


def _floor(found: Mapping[str, Any] | None) -> str:
    if found is None or found["below"] is None:
        return ""
    return f"<p>{escape(floor_text(CategoryFloor.from_json(found)))}.</p>"


def _acceptance(overall: Mapping[str, Any], drafters: Sequence[str]) -> list[str]:
    found = {label: overall[label]["acceptance_by_depth"] or [] for label in drafters}
    deepest = max((len(shares) for shares in found.values()), default=0)
    if not deepest:
        return []
    # Depth 1 alone would divide by zero: the axis is then two wide.
    across = max(deepest - 1, 1)
    every = math.ceil(deepest / _X_LABELS)
    series = {
        label: [(depth / across, share) for depth, share in enumerate(shares) if share is not None]
        for label, shares in found.items()
    }
    x_labels = [(depth / across, str(depth + 1)) for depth in range(0, deepest, every)]
    cells = [
        (str(depth + 1), *(_share(shares[depth]) if depth < len(shares) else "" for shares in found.values()))
        for depth in range(deepest)
    ]
    chart = line_chart("acceptance", "Acceptance by depth", series, x_labels=x_labels, y_most=1.0, percent=True)
    return [
        "<h2>Acceptance by depth</h2>",
        "<p>Of the passes whose draft reached a depth (below), the share that accepted a token there.</p>",
        legend(drafters),
        f'<div class="lines">{chart}</div>',
        _table("Acceptance by depth", ("depth", *found), cells),
    ]


def _time_split(overall: Mapping[str, Any]) -> list[str]:
    split = {
        label: {phase: ms for phase, ms in (values["milliseconds_per_pass"] or {}).items() if ms is not None}
        for label, values in overall.items()
    }
    measured = {phase for bar in split.values() for phase in bar}
    phases = [phase for phase in PHASES if phase in measured] + sorted(measured - set(PHASES))
    if not phases:
        return []
    heads = ("drafter", *(f"{phase}, ms" for phase in phases), "sum, ms")
    cells = [
        (label, *(number_text(bar.get(phase), 2) for phase in phases), number_text(sum(bar.values()), 2))
        for label, bar in split.items()
    ]
    return [
        "<h2>Time per pass</h2>",
        "<p>Milliseconds of one target pass and the work around it, by phase.</p>",
        legend(phases, bars=True),
        bar_chart("split", "Time per pass by phase", split, phases),
        _table("Time per pass", heads, cells),
    ]


def _latency(curve: Sequence[Sequence[float]]) -> list[str]:
    points = sorted((int(nodes), ms) for nodes, ms in curve if ms is not None)
    if not points:
        return ["<h2>Latency of a pass</h2>", "<p>Not measured.</p>"]
    widest = math.log2(points[-1][0]) or 1.0
    places = [(math.log2(nodes) / widest, ms) for nodes, ms in points]
    every = math.ceil(len(points) / _X_LABELS)
    x_labels = [(places[index][0], str(points[index][0])) for index in range(0, len(points), every)]
    chart = line_chart(
        "latency", "Latency of a pass over n nodes", {"L(n)": places}, x_labels=x_labels,
        y_most=max(ms for _, ms in points),
    )  # fmt: skip
    first = points[0][1]
    cells = [(str(nodes), number_text(ms, 2), f"{ms / first:.2f}" if first else "") for nodes, ms in points]
    return [
        "<h2>Latency of a pass</h2>",
        "<p>L(n): milliseconds of one target pass over a tree of n nodes (below, logarithmic).</p>",
        f'<div class="lines">{chart}</div>',
        _table("Latency of a pass", ("nodes", "ms", f"of L({points[0][0]})"), cells),
    ]


def _table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]] | Mapping[str, Iterable[Sequence[str]]]
) -> str:
    """A table in a box of its own that scrolls; rows begin with their head, and may be in groups that have a title."""
    head = "".join(f'<th scope="col">{_label(text)}</th>' for text in heads)
    body = ""
    for title, group in rows.items() if isinstance(rows, Mapping) else (("", rows),):
        body += "<tbody>"
        if title:
            body += f'<tr><th class="group" scope="rowgroup" colspan="{len(heads)}">{_label(title)}</th></tr>'
        for first, *rest in group:
            cells = "".join(f"<td>{escape(text) or NOTHING}</td>" for text in rest)
            body += f'<tr><th scope="row">{_label(first)}</th>{cells}</tr>'
        body += "</tbody>"
    return _box(caption, f"<table><thead><tr>{head}</tr></thead>{body}</table>")


def _pairs(caption: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_label(str(name))}</th><td>{NOTHING if value is None else escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    head = f'<thead><tr><th scope="col">{caption}</th><th scope="col">value</th></tr></thead>'
    return _box(caption, f'<table class="words">{head}<tbody>{rows}</tbody></table>')


def _box(caption: str, table: str) -> str:
    return f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">{table}</div>'


def _label(text: str) -> str:
    """A head of its natural width, broken only where it is longer than its share of a phone."""
    return f"<span>{escape(text)}</span>"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _drafters_text(drafters: Sequence[Mapping[str, Any]]) -> str:
    """Drafters with their options, as the command line would name them."""
    found = []
    for drafter in drafters:
        options = " ".join(f"{name}={value}" for name, value in (drafter.get("options") or {}).items())
        name = drafter["name"] if drafter["name"] == drafter["label"] else f"{drafter['label']}: {drafter['name']}"
        found.append(f"{name} ({options})" if options else name)
    return ", ".join(found)


def _count(number: int | None, noun: str) -> str | None:
    return None if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _joined(*texts: str | None) -> str:
    return ", ".join(text for text in texts if text)
