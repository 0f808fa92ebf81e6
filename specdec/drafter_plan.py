"""What a drafter will take of memory, by its files, before it and its target are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec.drafters.base import Drafter
from specdec.drafters.heads import HeadDrafter
from specdec.drafters.weights import read_config
from specdec.load_plan import LoadPlan, read_headers
from specdec.memory_plan import SPARE_SLOTS, drafter_kv, held_bytes, layers_kv
from specdec.registry import auto_drafter, create_drafter

_PANEL_OVERHEAD = 9 / 8
"""Bytes of a weight in 8 bit, scales included, as our CPU kernels want it; a little less where rows share a scale."""


@dataclass(frozen=True)
class DrafterPlan:
    """What a drafter takes.

    Attributes:
        weights: bytes.
        kv: bytes of the keys and values that its own model or layers keep.
        features: hidden states of the target that it reads.
        unknown: the drafters in it that will have weights of which nothing is known, by name.
    """

    weights: int = 0
    kv: int = 0
    features: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.weights + self.kv


def resolve_planned(drafter: Drafter | str, load: LoadPlan, options: Mapping[str, Any] | None = None) -> Drafter:
    """The drafter that a name stands for with a target that is not loaded yet.

    Args:
        drafter: the name, or the drafter itself.
        load: the plan of loading the target.
        options: of a drafter by name.
    """
    if isinstance(drafter, Drafter):
        return drafter
    return create_drafter(auto_drafter(load.facts, load.flat) if drafter == "auto" else drafter, options)


def plan_drafter(drafter: Drafter, load: LoadPlan, rows: int = 1, length: int = 0) -> DrafterPlan:
    """What a drafter takes once it has met its target.

    Args:
        drafter: as it was created.
        load: the plan of loading the target.
        rows: decoded at a time.
        length: of the longest text, tokens.
    """
    if drafter.parts:
        plans = [plan_drafter(part, load, rows, length) for part in drafter.parts]
        return DrafterPlan(
            sum(plan.weights for plan in plans), sum(plan.kv for plan in plans), sum(plan.features for plan in plans),
            tuple(name for plan in plans for name in plan.unknown),
        )  # fmt: skip
    there = DrafterPlan(held_bytes(drafter), drafter_kv(drafter, rows, length), len(drafter.every_feature))
    try:
        folder = drafter.weights_folder(load.facts)
        return there if folder is None else _plan_folder(drafter, folder, load, rows, length)
    except (ValueError, KeyError, TypeError):  # binding it says what is wrong
        return replace(there, unknown=(drafter.name,))


def _plan_folder(drafter: Drafter, folder: Path, load: LoadPlan, rows: int, length: int) -> DrafterPlan:
    """Of weights that lie in a folder."""
    element = load.shape.element
    if '"drafter"' not in _text_of(folder / "config.json"):  # published by others, with layers that we do not know
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return DrafterPlan(size, unknown=() if size else (drafter.name,))  # they may be pickled
    config, headers = read_config(folder), read_headers(folder)
    matrix = _PANEL_OVERHEAD if load.in_panels else element
    total = 0.0
    for name, (dtype, shape) in headers.items():
        if name.endswith("::scale"):
            continue
        if not dtype.is_floating_point and name == "vocabulary":
            total += dtype.itemsize * math.prod(shape)
            if not any(other.startswith("output.") for other in headers):  # rows of the target's output head
                total += matrix * shape[0] * load.shape.hidden
            continue
        total += math.prod(shape) * (matrix if len(shape) == 2 else element)
    kv, features = _states(drafter, config["shape"], load, length)
    return DrafterPlan(math.ceil(total), rows * kv, features)


def _states(drafter: Drafter, shape: Mapping[str, Any], load: LoadPlan, length: int) -> tuple[int, int]:
    """Bytes of keys and values of a row, and how many hidden states are read."""
    if isinstance(drafter, HeadDrafter):
        with torch.device("meta"):
            module = drafter.make_module(shape)
        return layers_kv(module, length, load.shape.element), len({*module.features})
    layers = len(shape.get("layers", ()))  # of the target's, in a draft model made to order
    own = replace(load.shape, layers=layers, cached=load.shape.cached * layers // load.shape.layers, kv_bits=None)
    return own.kv_bytes(length + SPARE_SLOTS) if layers else 0, 0


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
