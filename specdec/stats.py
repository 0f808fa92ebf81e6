"""What a generation did and where its time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

PHASES = ("prefill", "draft", "target", "accept", "commit", "other")


@dataclass
class DecodeStats:
    """Counts and times of one row, or of a whole call.

    Accepted is not emitted: a pass emits its accepted draft tokens plus one bonus token, less what lies beyond the end
    of the text. ``tau`` counts emitted tokens per target pass.

    Attributes:
        passes: target passes over trees the row took part in, prefill not counted; of a call, those of all its rows.
        steps: the same, a pass that several rows took part in counted once.
        plain_passes: those of them whose trees were roots alone.
        drafted: draft nodes proposed.
        accepted: draft nodes accepted.
        emitted: tokens emitted, bonus tokens included.
        accepted_per_pass: number of passes by count of accepted nodes, the acceptance histogram.
        offered_depth: number of passes by depth of the tree offered.
        milliseconds: wall-clock per phase. A row of a batch carries the time of the steps it took part in.
        verifier: name of the acceptance policy.
        lossless: whether that policy keeps the target's distribution.
        drafter: name of the drafter.
        speculation_off: why drafting stopped for good, None while it is on.
        plain_reason: why the planner last chose a plain pass, None where it never did.
    """

    passes: int = 0
    steps: int = 0
    plain_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    accepted_per_pass: Counter[int] = field(default_factory=Counter)
    offered_depth: Counter[int] = field(default_factory=Counter)
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    verifier: str = ""
    lossless: bool = True
    drafter: str = ""
    speculation_off: str | None = None
    plain_reason: str | None = None

    @property
    def tau(self) -> float:
        """Mean emitted tokens per target pass; 0 before the first."""
        return self.emitted / self.passes if self.passes else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Entry d-1: of the passes whose tree reached depth d, the share that accepted a node there."""
        rates = []
        for depth in range(1, max(self.offered_depth, default=0) + 1):
            offered = sum(count for offered, count in self.offered_depth.items() if offered >= depth)
            reached = sum(count for accepted, count in self.accepted_per_pass.items() if accepted >= depth)
            rates.append(reached / offered)
        return rates

    @property
    def decode_ms(self) -> float:
        """Wall-clock of everything but prefill."""
        return sum(value for phase, value in self.milliseconds.items() if phase != "prefill")

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over decode time; 0 before the first."""
        return 1000.0 * self.emitted / self.decode_ms if self.decode_ms else 0.0

    def count_pass(self, drafts: tuple[int, int], accepted: int, plain: bool = False) -> None:
        """Record one pass over a tree of so many draft nodes, reaching so deep; ``plain`` if it was a root alone."""
        drafted, depth = drafts
        self.passes += 1
        self.plain_passes += plain
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_per_pass[accepted] += 1
        self.offered_depth[depth] += 1

    def add(self, other: DecodeStats) -> None:
        """Add another row's or call's counts and times to this one."""
        self.passes += other.passes
        self.steps += other.steps
        self.plain_passes += other.plain_passes
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.emitted += other.emitted
        self.accepted_per_pass.update(other.accepted_per_pass)
        self.offered_depth.update(other.offered_depth)
        self.add_times(other.milliseconds)

    def add_times(self, milliseconds: dict[str, float]) -> None:
        """Add wall-clock per phase."""
        for phase, value in milliseconds.items():
            self.milliseconds[phase] += value

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return {
            "drafter": self.drafter,
            "verifier": self.verifier,
            "lossless": self.lossless,
            "speculation_off": self.speculation_off,
            "plain_reason": self.plain_reason,
            "passes": self.passes,
            "steps": self.steps,
            "plain_passes": self.plain_passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "emitted": self.emitted,
            "tau": self.tau,
            "tokens_per_second": self.tokens_per_second,
            "acceptance_by_depth": self.acceptance_by_depth,
            "accepted_per_pass": {str(k): v for k, v in sorted(self.accepted_per_pass.items())},
            "milliseconds": dict(self.milliseconds),
        }


class PhaseClock:
    """Times the phases of one step; what no phase covers is ``other``.

    Args:
        finish: called at the end of a phase, to wait for work a device has queued; None where nothing is queued.
    """

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish
        self.milliseconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._began = "other", 0.0
        self._start = perf_counter()

    def phase(self, name: str) -> PhaseClock:
        """For ``with``: add the block's wall-clock to a phase; not within another."""
        self._phase = name
        return self

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._finish is not None:
            self._finish()
        self.milliseconds[self._phase] += 1000.0 * (perf_counter() - self._began)

    def stop(self) -> dict[str, float]:
        """Times per phase since construction, ``other`` being the remainder."""
        total = 1000.0 * (perf_counter() - self._start)
        self.milliseconds["other"] += total - sum(self.milliseconds.values())
        return self.milliseconds
