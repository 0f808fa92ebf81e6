"""The table of ``specdec bench quant``, from the result as JSON has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.benchmarks.schema import PLAIN

HEADS = (
    "weights", "perplexity", "change", "same token", "same text", "weights MB", "KV MB", "drafter", "tok/s", "speed-up",
    "tau", "texts equal to plain",
)  # fmt: skip
"""KV is a row's cache with room for ``KV_TOKENS``; plain is plain decoding in the row's own precision."""
KV_TOKENS = 4096


def rows(precisions: Sequence[Mapping[str, Any]], num_texts: int) -> list[tuple[str, ...]]:
    """One row per precision and drafter; what belongs to the precision stands in its first.

    Args:
        precisions: of the result.
        num_texts: answers that every drafter gave in every precision.
    """
    found = []
    for line in precisions:
        left: tuple[str, ...] = (
            line["precision"], f"{line['perplexity']:.3f}", f"{100 * line['perplexity_change']:+.1f} %",
            f"{100 * line['top_agreement']:.1f} %", f"{100 * line['text_agreement']:.0f} %",
            f"{line['weight_bytes'] / 1e6:.0f}", f"{line['kv_bytes'] / 1e6:.0f}",
        )  # fmt: skip
        for name, figures in line["drafters"].items():
            label, equal = name, f"{num_texts - figures['differing']} of {num_texts}"
            if name == PLAIN:
                label, equal = "plain", ""
            speeds = f"{figures['tokens_per_s']:.1f}", f"{figures['speedup']:.2f}", f"{figures['tau']:.2f}"
            found.append((*left, label, *speeds, equal))
            left = ("",) * len(left)
    return found


def caption(precisions: Sequence[Mapping[str, Any]]) -> str:
    """What perplexity and the same tokens are over; nothing where the result does not say."""
    counts = sorted({line["scored_tokens"] for line in precisions if line.get("scored_tokens")})
    return f"perplexity and same token over {' or '.join(map(str, counts))} tokens" if counts else ""
