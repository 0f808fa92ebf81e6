"""Rebuilds the result tables of README and docs: ``python -m specdec.benchmarks.tables [--check]``.

A block, each marker on a line of its own, is filled from the named file of ``benchmarks/results/``:

    <!-- results: KIND FILE.json -->
    <!-- /results -->

Kinds are ``layer-parallel``, ``mt-bench``, ``peers``, ``prefix``, ``quant``, ``serve`` and ``texts``. Markers inside
fenced code are text.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from specdec.benchmarks import quant_rows
from specdec.benchmarks.markdown import escaped, origin, table
from specdec.benchmarks.report import equal_text, interval_text, number_text
from specdec.benchmarks.schema import PLAIN, SCHEMA, CategoryFloor
from specdec.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
_OPEN = re.compile(r"\s*<!--\s*results:(.*?)-->\s*")
_CLOSE = re.compile(r"\s*<!--\s*/results\s*-->\s*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def fill(text: str, results: Path) -> str:
    """A Markdown text with every block rebuilt from its file in the folder ``results``.

    Raises:
        ValueError: for a block that is malformed or not closed, by its line; an unknown kind or file, by its name; a
            file that holds something else.
    """
    lines, opened, fence = [], 0, ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        start, end = _OPEN.fullmatch(line), _CLOSE.fullmatch(line)
        if opened:
            if start:
                raise ValueError(f"line {opened}: the results block is not closed before line {number}")
            if not end:
                continue
            opened = 0
        elif not fence and end:
            raise ValueError(f"line {number}: closes a results block that was not opened")
        elif not fence and start:
            lines.append(line if line.endswith("\n") else line + "\n")
            lines.append(_table_of(start[1].split(), number, results))
            opened = number
            continue
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        lines.append(line)
    if opened:
        raise ValueError(f"line {opened}: the results block is not closed")
    return "".join(lines)


def mt_bench_table(result: Mapping[str, Any]) -> str:
    """The overall figures of an MT-Bench result, and where they come from."""
    rows = [
        (
            label,
            number_text(figures["decode_tokens_per_s"]),
            interval_text(figures["speedup"]),
            number_text(figures["tau"], 2),
            equal_text(label, figures),
        )
        for label, figures in result["summary"]["overall"].items()
    ]
    heads = ("drafter", "tok/s", "speed-up [95 %]", "tau", "texts equal to plain")
    return f"{table(heads, rows)}\n{_slow_categories(result)}{origin(result)}\n"


def _slow_categories(result: Mapping[str, Any]) -> str:
    """How many categories of each drafter are slower than is allowed, and the slowest of them."""
    found = result["summary"].get("floor")
    if found is None:
        return ""
    floor = CategoryFloor.from_json(found)
    if floor.met:
        return f"No category is slower than {floor.required:g} times plain decoding.\n\n"
    named = []
    for drafter in dict.fromkeys(label for label, _, _ in floor.below):
        slow = [(each.median, category) for label, category, each in floor.below if label == drafter]
        least, category = min(slow)
        named.append(f"{escaped(drafter)} in {len(slow)} ({escaped(category)} {least:.2f})")
    return f"Categories slower than {floor.required:g} times plain decoding, the slowest named: {', '.join(named)}.\n\n"


def peers_table(result: Mapping[str, Any]) -> str:
    """Every row with its precision, remarks such as why a row did not run, and where it comes from."""
    peers: Sequence[Mapping[str, Any]] = result["summary"]["peers"]
    rows = []
    for peer in peers:
        about = (
            peer["name"],
            f"{peer['engine']} {peer['version'] or ''}",
            peer["precision"],
            peer["speculation"] or "",
        )
        if peer["skipped"] is not None:
            rows.append((*about, "did not run", *[""] * 6))
            continue
        equal, own, own_of = peer["equal_to_plain"], peer["equal_to_own_plain"], peer["own_plain_runs"]
        rates = ("decode_tokens_per_s", "end_to_end_tokens_per_s", "prefill_tokens_per_s")
        rows.append((
            *about, *(number_text(peer[rate]) for rate in rates), number_text(peer["tau"], 2),
            "" if equal is None else f"{equal} of {peer['num_runs']}", "" if own is None else f"{own} of {own_of}",
            interval_text(peer["relative"]),
        ))  # fmt: skip
    reference = result["settings"]["reference"]
    heads = (
        "row", "engine", "precision", "speculation", "tok/s", "tok/s end to end", "prefill tok/s", "tau",
        "texts equal to specdec's plain", "texts equal to its own plain",
        f"{reference or 'specdec'}'s speed over it [95 %]",
    )  # fmt: skip
    lines = [f"- {escaped(name)}: {escaped(text)}\n" for name, text in peer_remarks(result)]
    remarks = "".join(["\n", *lines]) if lines else ""
    where = origin(result, f"specdec in {result['settings']['dtype']}")
    return f"{table(heads, rows)}{remarks}\n{where}\n"


def serve_table(result: Mapping[str, Any]) -> str:
    """Throughput and latency of every server, and where they come from."""
    baseline, versions = result["settings"]["baseline"], {row["name"]: row["version"] for row in result["servers"]}
    rows = []
    for figures in result["summary"]["servers"]:
        name, equal = figures["name"], figures["equal_texts"]
        times = [
            number_text(None if figures[kind] is None else figures[kind][share])
            for kind in ("ttft_ms", "token_ms")
            for share in ("p50", "p95")
        ]
        rows.append((
            name, versions[name] or "", number_text(figures["tokens_per_s"]), interval_text(figures["speedup"]),
            *times, number_text(figures["tau"], 2), "" if equal is None else f"{equal} of {figures['num_runs']}",
        ))  # fmt: skip
    heads = (
        "server", "version", "tok/s", "speed-up [95 %]", "TTFT ms, median", "95 %", "ms per token, median", "95 %",
        "tau", f"texts equal to {baseline}'s",
    )  # fmt: skip
    together = result["settings"]["concurrency"]
    extra = f"{together} requests at a time" if together > 1 else "one request at a time"
    return f"{table(heads, rows)}\n{origin(result, extra=extra)}\n"


def quant_table(result: Mapping[str, Any]) -> str:
    """What precisions cost and give, and where the figures come from."""
    precisions = result["precisions"]
    rows = quant_rows.rows(precisions, result["questions"]["count"])
    return f"{table(quant_rows.HEADS, rows)}\n{origin(result, extra=quant_rows.caption(precisions))}\n"


_COMPANY = {
    "unsettled_runs": "answers that began while another engine still computed",
    "disturbed_runs": "answers that shared the machine with something else that computed",
}


def peer_remarks(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader of a comparison with peers must know, in pairs: what it is about, and what to know of it."""
    peers: Sequence[Mapping[str, Any]] = result["summary"]["peers"]
    found: dict[str, list[str]] = {}
    for peer in peers:
        name, failed = peer["name"], peer["failed"]
        left_out = failed and f"left out after {peer['num_runs']} of {result['questions']['count']} questions: {failed}"
        for sentence in filter(None, [*(peer["notes"] or ()), peer["skipped"], left_out]):
            found.setdefault(sentence, []).append(name)
    remarks = [(", ".join(names), sentence) for sentence, names in found.items()]
    ran = [peer for peer in peers if peer["num_runs"]]
    for kind, what in _COMPANY.items():
        rows = [f"{peer['name']} ({peer[kind]} of {peer['num_runs']})" for peer in ran if peer[kind]]
        if ran and all(peer[kind] == peer["num_runs"] for peer in ran):
            rows = ["all"]
        if rows:
            remarks.append((what, ", ".join(rows)))
    return remarks


def prefix_table(result: Mapping[str, Any]) -> str:
    """A line per drafter of what sharing a prefix gave, and where it comes from."""
    settings, rows = result["settings"], []
    for line in result["drafters"]:
        shared, without = line["shared_s"], line["unshared_s"]
        ratios = [b / a for a, b in zip(shared, without, strict=True)]
        texts = f"{line['equal_rows']} of {settings['batch_size']}"
        if line["rounding_rows"]:
            texts += f", {line['rounding_rows']} by rounding"
        rows.append((
            "plain" if line["drafter"] == PLAIN else line["drafter"], number_text(median(shared), 2),
            number_text(median(without), 2), f"{line['speedup']:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            number_text(line["shared_prefill_s"], 2), number_text(line["unshared_prefill_s"], 2),
            number_text(line["shared_bytes"] / 1e6, 1), number_text(line["unshared_bytes"] / 1e6, 1),
            f"{100 * line['excess']:+.1f} %", texts,
        ))  # fmt: skip
    heads = (
        "drafter", "shared, s", "not shared, s", "speed-up [least, most]", "prefill shared, s",
        "prefill not shared, s", "KV shared, MB", "KV not shared, MB", "KV beyond one prefix and the suffixes",
        "texts equal to each row's alone",
    )  # fmt: skip
    what = f"{settings['dtype']}, {settings['prefix']} tokens shared, {settings['suffix']} of each row's own"
    return f"{table(heads, rows)}\n{origin(result, what)}\n"


def layer_parallel_table(result: Mapping[str, Any]) -> str:
    """A draft model as it is and with its layers in groups, and where the figures come from."""
    found, settings = result["comparison"], result["settings"]
    labels = ("one layer at a time", f"groups of {settings['group']}")
    changes = (("", ""), (f"{0.0 - 100 * found['accuracy_lost']:+.1f} %", number_text(found["speedup"], 2)))
    rows = [
        (label, number_text(accuracy, 3), change, number_text(ms, 2), speedup)
        for label, accuracy, ms, (change, speedup) in zip(
            labels, found["accuracy"], found["milliseconds"], changes, strict=True
        )
    ]
    heads = ("draft model's layers", "accuracy", "change", "ms a draft, median", "speed-up of drafting")
    beams = f", {settings['beams']} beams" if settings["beams"] > 1 else ""
    extra = f"{found['drafts']} drafts of {settings['depth']} levels{beams} by {settings['draft_model']}"
    return f"{table(heads, rows)}\n{origin(result, extra=extra)}\n"


def texts_table(result: Mapping[str, Any]) -> str:
    """Per precision and drafter the texts that are plain decoding's at each batch size, and where all of it is from."""
    sizes: Sequence[int] = result["settings"]["batch_sizes"]
    rows = []
    for line in result["precisions"]:
        found = {(row["drafter"], row["batch_size"]): row for row in line["drafters"]}
        for drafter in dict.fromkeys([PLAIN, *(row["drafter"] for row in line["drafters"])]):
            cells = [_texts_cells(found.get((drafter, size)), line["num_texts"]) for size in sizes]
            first = next(filter(None, (_first_text(found.get((drafter, size))) for size in sizes)), "")
            label = "plain" if drafter == PLAIN else drafter
            rows.append((line["precision"], label, *(cell for pair in cells for cell in pair), first))
    labels = ["alone" if size == 1 else f"{size} at a time" for size in sizes]
    heads = ("precision", "drafter", *(head for label in labels for head in (f"texts equal, {label}", "tau")))
    close = [escaped(line["precision"]) for line in result["precisions"] if not line["invariant"]]
    remark = f"Rounding may decide near-ties otherwise in {', '.join(close)}.\n\n" if close else ""
    return f"{table((*heads, 'first text that differs'), rows)}\n{remark}{origin(result)}\n"


def _texts_cells(row: Mapping[str, Any] | None, num_texts: int) -> tuple[str, str]:
    """Equal texts and tau; None is what they are compared with."""
    if row is None:
        return "compared with", number_text(1.0, 2)
    by_rounding = f", {row['rounding']} by rounding" if row["rounding"] else ""
    return f"{row['equal']} of {num_texts}{by_rounding}", number_text(row["tau"], 2)


def _first_text(row: Mapping[str, Any] | None) -> str:
    """Where the first difference is; nothing where there is none."""
    if row is None or row["first"] is None:
        return ""
    together = f", {row['batch_size']} at a time" if row["batch_size"] > 1 else ""
    return f"question {row['first']['question_id']}, turn {row['turn']}, token {row['first']['position']}{together}"


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "layer-parallel": layer_parallel_table,
    "mt-bench": mt_bench_table,
    "peers": peers_table,
    "prefix": prefix_table,
    "quant": quant_table,
    "serve": serve_table,
    "texts": texts_table,
}


def _table_of(words: Sequence[str], number: int, results: Path) -> str:
    if len(words) != 2:
        raise ValueError(f"line {number}: a results block names a kind and a file, got {' '.join(words)!r}")
    kind, name = words
    if kind not in TABLES:
        raise ValueError(f"line {number}: unknown kind of results {kind!r}, choose from {', '.join(TABLES)}")
    files = sorted(path.name for path in results.glob("*.json"))
    if name not in files:
        raise ValueError(f"line {number}: no file {name!r} in {results}, there are {', '.join(files) or 'none'}")
    try:
        result = json.loads((results / name).read_text(encoding="utf-8"))
        if (result.get("schema"), result.get("kind")) != (SCHEMA, kind):
            raise ValueError(
                f"holds {result.get('kind')!r} of schema {result.get('schema')!r}, not {kind!r} of {SCHEMA}"
            )
        return TABLES[kind](result)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"line {number}: {name} cannot be read: {error}") from error
    except KeyError as error:
        raise ValueError(f"line {number}: {name} has no {error}") from error


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite README.md and docs/*.md below ``root``.

    Returns:
        0; with ``--check``, which writes nothing, 1 where a file disagrees with its results; 2 for a block that cannot
        be filled, in which case no file is changed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m specdec.benchmarks.tables", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a table is out of date")
    check = parser.parse_args(arguments).check
    changed: dict[Path, tuple[str, str]] = {}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        try:
            before = path.read_text(encoding="utf-8")
            after = fill(before, root / "benchmarks" / "results")
        except (OSError, ValueError) as error:
            print(f"{path.relative_to(root)}: {error}", file=sys.stderr)
            return 2
        if after != before:
            changed[path] = (before, after)
    for path, (before, after) in changed.items():
        if check:
            name = str(path.relative_to(root))
            lines = (before.splitlines(keepends=True), after.splitlines(keepends=True))
            sys.stdout.writelines(difflib.unified_diff(*lines, name, f"{name}, rebuilt"))
        else:
            write_atomically(path, after)
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
