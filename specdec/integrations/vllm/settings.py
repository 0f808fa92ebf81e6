"""What the user says through ``additional_config={"specdec": {...}}``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from specdec.registry import drafter_class, drafter_names, unknown

UNSUPPORTED = {
    "ppd": "its prompt tokens are embeddings within the target's own pass, and vLLM's passes take token ids only",
    "lookahead": "its guesses ride in the target's own pass, and are read from logits that a proposer is not shown",
    "skip": "it runs the target's own layers, and vLLM alone runs the target",
    "layer_parallel": "it runs the target's own layers in groups, and vLLM alone runs the target",
}
"""Drafters that cannot work through a proposer, and why."""

_CHAIN: Mapping[str, Mapping[str, int]] = {
    "ngram": {},
    "suffix": {},
    "recycling": {"candidates": 1},
    "model": {"beams": 1},
    "medusa": {"width": 1, "branching": 1},
    "clover": {"width": 1, "branching": 1},
    "eagle": {"width": 1, "branching": 1},
}
"""Options that make a drafter draft its best chain and no tree around it, which vLLM could not check."""
_CHEAP_TREES = ("ngram", "suffix")
"""They look a tree up whose branches compete for its nodes: cut to a chain's size it would be a shorter chain."""


@dataclass(frozen=True)
class Settings:
    """Which drafter runs, and how.

    Attributes:
        drafter: its name; "auto" is allowed.
        options: of its configuration.
    """

    drafter: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.drafter != "auto" and self.drafter not in drafter_names():
            raise ValueError(unknown("drafter", self.drafter, [*drafter_names(), "auto"]))
        if self.drafter in UNSUPPORTED:
            raise ValueError(f"drafter {self.drafter!r} cannot run in vLLM: {UNSUPPORTED[self.drafter]}")
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options must be an object of names and values, got {self.options!r}")

    @classmethod
    def read(cls, additional_config: Any) -> Settings:
        """The settings of a vLLM configuration; the defaults where it says nothing.

        Raises:
            ValueError: for what is unknown or of the wrong kind.
        """
        given = additional_config.get("specdec", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(f'additional_config["specdec"] must be an object, got {given!r}')
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(unknown('setting of additional_config["specdec"]', name, names))
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """The value of ``additional_config`` that ``read`` understands."""
        return {"specdec": {"drafter": self.drafter, "options": dict(self.options)}}


def chain_options(drafter: str, given: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Options of a drafter whose trees are flattened to chains of at most ``num_tokens``; those given stay.

    Args:
        drafter: name.
        given: what the user set.
        num_tokens: k, most tokens vLLM checks per step.
    """
    known = {f.name for f in fields(drafter_class(drafter).Config)}
    options: dict[str, Any] = {}
    if drafter in _CHAIN:
        options = {"depth": num_tokens, **_CHAIN[drafter]}
        if drafter not in _CHEAP_TREES:
            options["max_nodes"] = num_tokens + 1
    return {**{name: value for name, value in options.items() if name in known}, **given}
