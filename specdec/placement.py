"""Target and draft model on different devices (Dovetail, Zhang et al. 2024): what crosses, and the tree that pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from specdec.drafters.base import Drafter
from specdec.latency import LatencyCurve
from specdec.optimal_tree import OptimalTrees
from specdec.registry import drafter_class, drafter_parts

NODE_BYTES = 16
"""What a node of a ranked tree is: token and parent, int64 each."""

USUAL_CHANCES = (0.6, 0.13, 0.06, 0.04)
"""That a draft model's guess of each rank is the target's token: a small model of the same family, where nothing is
known of it."""

DraftNodes = Callable[[int, float], Sequence[float]]
"""Nodes of each of a draft model's passes for a tree so deep, where a step emits so many tokens."""


def by_levels(beams: int, again: int = 0) -> DraftNodes:
    """Of passes for a level each: the first reads what the last step emitted, a further one the level above its own.

    Args:
        beams: nodes expanded per level.
        again: tokens that the first one reads though it did before.
    """
    return lambda depth, tokens: [tokens + again, *[float(beams)] * (depth - 1)]


USUAL_PASSES = by_levels(4)
"""Of as many beams as the model drafter has where nothing is said."""


@dataclass(frozen=True)
class Link:
    """A way between devices.

    Attributes:
        latency_ms: of the smallest copy, the wait for it included.
        bytes_per_ms: of large ones.

    Raises:
        ValueError: for a latency below 0 or a rate that is not positive.
    """

    latency_ms: float = 0.0
    bytes_per_ms: float = float("inf")

    def __post_init__(self) -> None:
        if not self.latency_ms >= 0 or not self.bytes_per_ms > 0:
            raise ValueError(f"a link takes time and has a rate above 0, got {self}")

    def ms(self, num_bytes: float) -> float:
        """Milliseconds of a copy."""
        return self.latency_ms + num_bytes / self.bytes_per_ms


@dataclass(frozen=True)
class DraftPlan:
    """A tree that pays on given devices.

    Attributes:
        nodes: root included; 1 where none pays.
        depth: levels drafted; 0 where none pays.
        tokens: expected per step, the bonus token included.
        speedup: over plain decoding, at least 1.
    """

    nodes: int
    depth: int
    tokens: float
    speedup: float


def plan_draft(
    target: LatencyCurve,
    draft: LatencyCurve,
    link: Link | None = None,
    *,
    chances: Sequence[float] | Sequence[Sequence[float]] = USUAL_CHANCES,
    draft_nodes: DraftNodes = USUAL_PASSES,
    max_nodes: int = 24,
    max_depth: int = 5,
    batch: int = 1,
    length: int = 0,
    node_bytes: int = NODE_BYTES,
) -> DraftPlan:
    """The best tree by Sequoia's rule, of a step that takes

        L_target(nodes) + sum(L_draft(n) for n in draft_nodes) + 2 * latency + batch * nodes * node_bytes / rate

    as the draft's nodes go one way and what was accepted comes back.

    Args:
        target: the target's passes on its device.
        draft: the draft model's on its own.
        link: between the two; None where they share a device.
        chances: that the child of each rank is accepted, given that its parent is; or a row of them per depth.
        draft_nodes: of the draft model's passes.
        max_nodes: largest tree.
        max_depth: deepest one.
        batch: rows.
        length: committed tokens per row.
        node_bytes: that cross for a node; a tree whose children were drawn brings a distribution over the vocabulary.
    """
    link = link or Link()
    plain = target.at(1, batch, length)
    crossing = link.ms(0) + link.latency_ms

    def pass_ms(nodes: int) -> float:
        if nodes == 1:
            return plain
        return target.at(nodes, batch, length) + crossing + batch * nodes * node_bytes / link.bytes_per_ms

    def draft_ms(depth: int, tokens: float) -> float:
        return sum(draft.at(count, batch, length) for count in draft_nodes(depth, tokens)) if depth else 0.0

    best = OptimalTrees(chances, max_nodes, max_depth).fastest(pass_ms, draft_ms)
    depth, nodes = best.depth, len(best.parents)
    ms = pass_ms(nodes) + draft_ms(depth, best.tokens)
    return DraftPlan(nodes, depth, best.tokens, best.tokens * plain / ms)


def chances_by_depth(hit_rates: Sequence[Sequence[float]], ranks: int, depth: int) -> list[list[float]]:
    """``[depth][ranks]`` chances from calibrated rates ``[D][R]``: deeper levels are as the last, ranks at most R."""
    rows = [[float(rate) for rate in rates[:ranks]] for rates in hit_rates]
    return (rows + rows[-1:] * depth)[:depth]


def measure_link(first: torch.device, second: torch.device, rounds: int = 7) -> Link:
    """A link's median times, there and back, of 8 bytes and of 4 MiB; instantaneous within one device."""
    if first == second:
        return Link()
    small, large = _copy_ms(first, second, 1, rounds), _copy_ms(first, second, 1 << 19, rounds)
    return Link(small, (8 << 19) / max(large - small, 1e-6))


def _copy_ms(first: torch.device, second: torch.device, count: int, rounds: int) -> float:
    samples = []
    values = torch.zeros(count, dtype=torch.int64, device=first)
    for _ in range(rounds + 1):
        start = perf_counter()
        back = values.to(second).to(first)
        back[-1].item()  # waits
        samples.append(1000.0 * (perf_counter() - start) / 2)
    return sorted(samples[1:])[rounds // 2]


def with_draft_device(drafter: Any, options: Mapping[str, Any] | None, device: torch.device | str) -> dict[str, Any]:
    """A drafter's options with the device of its draft model; of joined drafters every part that has one gets it.

    Args:
        drafter: its name.
        options: its other options.
        device: as ``specdec.models.find_device`` takes it.

    Raises:
        ValueError: for a drafter that is constructed already, one of which no part runs a model of its own, and for a
            device given twice.
    """
    if not isinstance(drafter, str):
        raise ValueError(f"draft_device {str(device)!r} goes with a drafter's name; this one is constructed already")
    given, found = dict(options or {}), {}
    for part in drafter_parts(drafter):
        if "device" in drafter_class(part).Config.__dataclass_fields__:
            name = "device" if part == drafter else f"{part}.device"
            if name in given:
                raise ValueError(
                    f"the draft model's device is given twice: {str(device)!r} and {str(given[name])!r} as {name!r}"
                )
            found[name] = str(device)
    if not found:
        raise ValueError(f"drafter {drafter!r} runs on the target's device: it takes no draft_device {str(device)!r}")
    return given | found


def check_in_step(drafter: Drafter, adaptive: bool) -> None:
    """Refuse clocks that decide about trees for which processes wait for each other: they may disagree.

    Args:
        drafter: or a hybrid, of which a part may be ``in_step``.
        adaptive: whether trees are planned by what passes take.

    Raises:
        ValueError: saying what to pass instead.
    """
    for part in drafter.parts or (drafter,):
        if part.in_step and adaptive:
            raise ValueError(
                f"drafter {part.name!r} shares its work among processes, which may plan different trees by their "
                "clocks and wait for each other: pass adaptive=False (--fixed-trees), and a seed where tokens are drawn"
            )
        if part.in_step and part is not drafter and getattr(getattr(drafter, "config", None), "ask", "") == "paying":
            raise ValueError(
                f"drafter {part.name!r} shares its work among processes, of which some may ask it where others do not: "
                f"have {drafter.name!r} ask all parts in every pass, ask='always' (-o ask=always)"
            )
