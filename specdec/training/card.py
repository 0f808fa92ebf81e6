"""The model card of a trained drafter."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any


def make_card(facts: Mapping[str, Any]) -> str:
    """A Markdown page on how a drafter came about.

    Args:
        facts: as ``specdec.training.run.collect_facts`` gathers them; what is missing is left out. ``measured`` may be
            added: ``tokens_per_pass``, and whatever says of what they are and how they were measured.

    Returns:
        The text of README.md. Names that users gave are escaped.
    """
    drafter, target = escape(facts.get("drafter", "?")), escape(facts.get("target", "?"))
    option = "model" if drafter == "model" else "weights"
    sections = [
        f"# {drafter} drafter for {target}",
        "Drafts tokens for speculative decoding with specdec; the target checks every one of them, so the text stays "
        f"the target's own.\n\n    specdec generate --model {_plain(facts.get('target', '?'))} --drafter "
        f'{_plain(facts.get("drafter", "?"))} -o {option}=FOLDER "..."',
        _measured(facts.get("measured") or {}),
        _held_out(facts.get("held_out") or {}),
        _texts(facts.get("texts") or {}),
        _start(facts.get("start")),
        _how(facts),
        _curve(facts.get("curve") or (), facts),
        "## Licence\n\nThese weights were learnt from text that the target wrote and from its hidden states: they "
        "derive from the target, whose licence applies to them.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escape(value: Any) -> str:
    """Text that Markdown and HTML show as it is: one line, no control characters, no markup."""
    text = "".join(" " if unicodedata.category(char)[0] == "C" else char for char in str(value))
    for char in "\\`*_[]|#":
        text = text.replace(char, "\\" + char)
    return html.escape(text, quote=False)


def _plain(value: Any) -> str:
    """For a code block: one line."""
    return " ".join("".join(" " if unicodedata.category(char)[0] == "C" else char for char in str(value)).split())


def _measured(found: Mapping[str, Any]) -> str:
    if "tokens_per_pass" not in found:
        return ""
    rows = [row for name, value in found.items() if name != "tokens_per_pass" for row in _flat(name, value)]
    text = f"## Measured\n\n{_number(found['tokens_per_pass'])} tokens per target pass."
    return f"{text}\n\n{_table(('what', 'value'), rows)}" if rows else text


def _held_out(found: Mapping[str, Any]) -> str:
    acceptance: Sequence[float] = found.get("acceptance") or ()
    if not acceptance:
        return ""
    positions = found.get("positions") or ["?"] * len(acceptance)
    rows = [
        (str(depth), f"{rate:.3f}", str(count))
        for depth, (rate, count) in enumerate(zip(acceptance, positions, strict=False), start=1)
    ]
    text = (
        "## Held-out acceptance\n\nHow often the first guess at a depth is the target's own token, the true tokens "
        "before it given, on texts that were not trained on.\n\n"
    ) + _table(("depth", "accepted", "positions"), rows)
    if "expected_tau" in found:
        text += (
            f"\n\nA greedy chain would emit {found['expected_tau']:.2f} tokens per target pass: an estimate from the "
            "rates above, not a measurement; trees emit more."
        )
    return text


def _texts(texts: Mapping[str, Any]) -> str:
    if not texts:
        return ""
    source = texts.get("data")
    origin = (
        "The target wrote all of it, prompts and replies."
        if source is None
        else f"Prompts are from {escape(source.get('name', '?'))} (sha256 {escape(source.get('sha256', '?'))}); "
        "replies the file lacks are the target's own."
    )
    rows = [
        ("texts", texts.get("count", "?")),
        ("of these held out", texts.get("held_out", "?")),
        ("tokens of replies", texts.get("reply_tokens", "?")),
        ("sha256 of the texts", texts.get("sha256", "?")),
    ]
    return f"## Trained on\n\n{origin}\n\n" + _table(("what", "value"), [(name, escape(value)) for name, value in rows])


def _start(start: Mapping[str, Any] | None) -> str:
    """The weights gone on from, and those that they went on from, the latest first."""
    rows = []
    while start:
        texts = start.get("texts") or {}
        values = (start.get("commit"), texts.get("reply_tokens"), start.get("tokens"), texts.get("sha256"))
        rows.append(["?" if value is None else escape(value) for value in values])
        start = start.get("start")
    if not rows:
        return ""
    headers = ("commit", "tokens of replies", "reply tokens trained on, repeats included", "sha256 of the texts")
    return "## Went on from\n\nWeights that were trained before, the latest first.\n\n" + _table(headers, rows)


def _how(facts: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for name in ("commit", "target_facts", "dtype", "steps", "skipped", "tokens", "seconds", "machine", "versions"):
        if name in facts:
            rows += _flat(name, facts[name])
    for name in ("options", "trainer"):
        rows += _flat(name, facts.get(name) or {})
    return "## How\n\n" + _table(("what", "value"), rows) if rows else ""


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _flat(f"{name}.{key}", inner)]
    return [(escape(name.replace("_", " ")), escape(value))]


def _curve(points: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    rows = [
        (
            str(point.get("step", "")),
            str(point.get("tokens", "")),
            _number(point.get("held_out_loss")),
            " ".join(_number(rate) for rate in point.get("acceptance", ())),
            _number(point.get("expected_tau")),
        )
        for point in points
    ]
    headers = ("step", "reply tokens", "held-out loss", "accepted by depth", "estimated tau")
    return f"## Learning curve\n\n{_measured_on(facts)}{_table(headers, rows)}" if rows else ""


def _measured_on(facts: Mapping[str, Any]) -> str:
    """A paragraph on what text the curve's rows are of; "" where that is not known."""
    some = (facts.get("trainer") or {}).get("evaluation_tokens")
    if some is None:
        return ""
    positions = (facts.get("held_out") or {}).get("positions") or ["?"]
    return (
        f"The last row is measured on all held-out texts ({escape(positions[0])} positions), those above on the first "
        f"{escape(some)} tokens of them. Where these are fewer, it does not compare with the others: they may still be "
        "rising where it falls.\n\n"
    )


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
