"""Drafts of two draft models side by side: how often they are right, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from statistics import median
from time import perf_counter
from typing import Any

import torch

from specdec.batch import Batch, Row
from specdec.benchmarks import record
from specdec.benchmarks.questions import QuestionSet
from specdec.benchmarks.schema import SCHEMA
from specdec.drafters.model import ModelDrafter
from specdec.sampling import PositionNoise, SamplingParams
from specdec.target import HFTarget
from specdec.tree import TokenTree

KIND = "layer-parallel"


@dataclass(frozen=True)
class Start:
    """When and where a comparison began; the machine's load is that of before.

    Attributes:
        date: ISO 8601, UTC.
        machine: see ``record.machine``.
    """

    date: str
    machine: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> Start:
        """On a device, at this moment."""
        return cls(datetime.now(UTC).isoformat(timespec="seconds"), record.machine(device))


@dataclass(frozen=True)
class DraftComparison:
    """What two drafters proposed for the same beginnings of the same texts.

    Attributes:
        drafts: beginnings.
        accuracy: per drafter, the share of drafted levels at which the text's own token was among the nodes below the
            text's own tokens: accepted nodes over depth.
        milliseconds: per drafter, the median time of a draft, the pass over new tokens included.
    """

    drafts: int
    accuracy: tuple[float, float]
    milliseconds: tuple[float, float]

    @property
    def accuracy_lost(self) -> float:
        """Share of the first one's accuracy that the second one lacks; below 0 where it is better."""
        return 1.0 - self.accuracy[1] / self.accuracy[0] if self.accuracy[0] else 0.0

    @property
    def speedup(self) -> float:
        """The first one's time over the second one's."""
        return self.milliseconds[0] / self.milliseconds[1]


@torch.inference_mode()
def compare_drafts(
    drafters: tuple[ModelDrafter, ModelDrafter],
    target: HFTarget,
    texts: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    stride: int = 3,
) -> DraftComparison:
    """Let two drafters draft in turn, along texts that the target wrote greedily.

    Args:
        drafters: already bound to the target; the first is what the second is compared with.
        target: the model that wrote the texts.
        texts: prompts with their replies.
        prompt_lens: tokens of each prompt, at least 1.
        stride: tokens between the places where a draft is asked for.

    Raises:
        ValueError: where no text is long enough for a draft.
    """
    accepted, offered = [0, 0], [0, 0]
    times: tuple[list[float], list[float]] = ([], [])
    vocabulary = torch.arange(target.vocab_size, device=target.device)
    for text, start in zip(texts, prompt_lens, strict=True):
        noise = PositionNoise(0, vocabulary)
        row = Row(list(text[:start]), start, len(text) + 1, SamplingParams(temperature=0.0), noise)
        batch = Batch([row], target.vocab_size, target.device)
        for drafter in drafters:
            drafter.start(batch, None)
            drafter.propose(batch)  # reads the prompt
        for place in range(start + stride, len(text), stride):
            row.tokens = list(text[:place])
            for index in _turns(place):
                began = perf_counter()
                tree = drafters[index].propose(batch)
                depth = int(tree.depth.max())  # waits for a device
                times[index].append(1000.0 * (perf_counter() - began))
                within = min(depth, len(text) - place)
                accepted[index] += min(count_right(tree, text[place:]), within)
                offered[index] += within
        for drafter in drafters:
            drafter.stop()
    if not times[0] or not min(offered):
        raise ValueError(f"no text is {stride} tokens longer than its prompt, or nothing is drafted")
    first, second = (hits / total for hits, total in zip(accepted, offered, strict=True))
    return DraftComparison(len(times[0]), (first, second), (median(times[0]), median(times[1])))


def count_right(tree: TokenTree, goal: Sequence[int]) -> int:
    """Nodes of a tree of one row on the path that spells ``goal``."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    node = right = 0
    for token in goal:
        found = children.get((node, token))
        if found is None:
            break
        node, right = found, right + 1
    return right


def _turns(place: int) -> tuple[int, int]:
    """Which drafter goes first, alternating, so that neither profits from a warm cache."""
    return (0, 1) if place % 2 else (1, 0)


def document(
    found: DraftComparison, settings: dict[str, Any], questions: QuestionSet, command: Sequence[str], start: Start
) -> dict[str, Any]:
    """The result as JSON: what was measured, on what, from which commit.

    Args:
        found: of a draft model as it is, and in groups of layers.
        settings: what was asked for: ``model``, ``draft_model``, ``dtype``, ``group``, ``depth``, ``beams``,
            ``max_new_tokens``.
        questions: what the texts answer.
        command: the command line.
        start: when and where it began.
    """
    return {
        "schema": SCHEMA, "kind": KIND, "date": start.date, "command": list(command), "commit": record.commit(),
        "machine": start.machine, "versions": record.versions(), "settings": settings,
        "questions": questions.to_json(),
        "comparison": asdict(found) | {"accuracy_lost": found.accuracy_lost, "speedup": found.speedup},
    }  # fmt: skip
