"""The table of ``specdec bench quant``, from the result as JSON has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.benchmarks.schema import PLAIN

HEADS = (
    "weights", "perplexity", "change", "same token", "same text", "weights MB", "KV MB", "drafter", "tok/s", "speed-up",
    "tau",
)  # fmt: skip
"""KV is a row's cache with room for ``KV_TOKENS``."""
KV_TOKENS = 4096


def rows(precisions: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row per precision and drafter; what belongs to the precision stands in its first."""
    found = []
    for line in precisions:
        left: tuple[str, ...] = (
            line["precision"], f"{line['perplexity']:.3f}", f"{100 * line['perplexity_change']:+.1f} %",
            f"{100 * line['top_agreement']:.1f} %", f"{100 * line['text_agreement']:.0f} %",
            f"{line['weight_bytes'] / 1e6:.0f}", f"{line['kv_bytes'] / 1e6:.0f}",
        )  # fmt: skip
        for name, figures in line["drafters"].items():
            label = "plain" if name == PLAIN else name
            speeds = f"{figures['tokens_per_s']:.1f}", f"{figures['speedup']:.2f}", f"{figures['tau']:.2f}"
            found.append((*left, label, *speeds))
            left = ("",) * len(left)
    return found
