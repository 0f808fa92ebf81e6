"""Names of drafters and acceptance policies, and the classes behind them.

Built-ins and third-party plugins go through the same seam: a name maps to ``"module:Class"``, which is imported when it
is asked for. Packages add names through the entry-point groups ``specdec.drafters`` and ``specdec.verifiers``.
"""

from __future__ import annotations

import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.drafters.base import Drafter
    from specdec.drafters.weights import TargetFacts
    from specdec.target import HFTarget
    from specdec.verifiers.base import Verifier

_BUILT_IN = {
    "specdec.drafters": {
        "none": "specdec.drafters.none:NoneDrafter",
        "ngram": "specdec.drafters.ngram:NgramDrafter",
        "suffix": "specdec.drafters.suffix:SuffixDrafter",
        "recycling": "specdec.drafters.recycling:RecyclingDrafter",
        "lookahead": "specdec.drafters.lookahead:LookaheadDrafter",
        "skip": "specdec.drafters.skip:SkipDrafter",
        "model": "specdec.drafters.model:ModelDrafter",
        "layer_parallel": "specdec.drafters.layer_parallel:LayerParallelDrafter",
        "medusa": "specdec.drafters.medusa:MedusaDrafter",
        "clover": "specdec.drafters.clover:CloverDrafter",
        "ppd": "specdec.drafters.ppd:PPDDrafter",
        "eagle": "specdec.drafters.eagle:EagleDrafter",
    },
    "specdec.verifiers": {
        "greedy": "specdec.verifiers.match:GreedyVerifier",
        "coupled": "specdec.verifiers.match:CoupledVerifier",
        "rejection": "specdec.verifiers.rejection:RejectionVerifier",
        "typical": "specdec.verifiers.typical:TypicalVerifier",
    },
}

JOIN = "+"
"""Between the names of drafters that draft one tree together."""

AUTO_DRAFTER = "suffix"
"""What ``drafter="auto"`` stands for where no trained weights ship for the target."""

FASTER_THAN_AUTO = {"suffix+eagle": "eagle"}
"""What it stands for instead, the best first, where weights ship for the target for the drafter named behind: measured
to be faster with these (README's table). Not for targets with activations in 8 bits, nor for quantized ones that other
kernels run: their passes are half as long, or cost more for each node, and drafts are not."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """An error message for a name that is none of the choices, with the nearest of them."""
    ordered = sorted(choices)
    near = difflib.get_close_matches(name, ordered, n=3)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (choices: {', '.join(ordered)})"


def available(group: str) -> dict[str, str]:
    """Names of a group and where each is found, built-ins first; a plugin cannot replace a built-in."""
    found = dict(_BUILT_IN[group])
    for name, place in _installed(group):
        found.setdefault(name, place)
    return found


@cache
def _installed(group: str) -> tuple[tuple[str, str], ...]:
    """Names and places that installed packages add; looking through all of them takes longer than a pass."""
    return tuple((point.name, point.value) for point in entry_points(group=group))


def drafter_names() -> dict[str, str]:
    """Drafters by name."""
    return available("specdec.drafters")


def verifier_names() -> dict[str, str]:
    """Acceptance policies by name."""
    return available("specdec.verifiers")


def _load(group: str, kind: str, name: str) -> Any:
    found = available(group)
    if name not in found:
        raise ValueError(unknown(kind, name, found))
    module, _, attribute = found[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def drafter_class(name: str) -> type[Drafter]:
    """The class of a drafter; "auto" is allowed, and names joined by ``JOIN``."""
    if JOIN in name:
        from specdec.drafters.hybrid import HybridDrafter

        return HybridDrafter
    cls: type[Drafter] = _load("specdec.drafters", "drafter", AUTO_DRAFTER if name == "auto" else name)
    return cls


def drafter_parts(name: str) -> list[str]:
    """The drafters that a name joins by ``JOIN``, or the one it is. Raises ValueError where they make no hybrid."""
    names = name.split(JOIN)
    if len(names) > 1:
        from specdec.drafters.hybrid import check_names

        check_names(names)
    return names


def resolve_drafter(name: str, target: HFTarget) -> str:
    """The drafter that "auto" stands for with this target; any other name as it is."""
    if name != "auto":
        return name
    from specdec.drafters.weights import TargetFacts
    from specdec.quantization import is_quantized, passes_stay_flat

    return auto_drafter(TargetFacts.of(target), not is_quantized(target.model) or passes_stay_flat(target.model))


def auto_drafter(facts: TargetFacts, flat: bool) -> str:
    """The drafter that "auto" stands for.

    Args:
        facts: of the target.
        flat: whether its passes over a few nodes take little longer than over one, as they do in 16 bits.
    """
    from specdec.drafters.weights import find_pretrained

    if not flat:
        return AUTO_DRAFTER
    return next((name for name, part in FASTER_THAN_AUTO.items() if find_pretrained(part, facts)), AUTO_DRAFTER)


def create_drafter(name: str, options: Mapping[str, Any] | None = None) -> Drafter:
    """A drafter by name, with options of its configuration; strings are converted to the option's type.

    Of names joined by ``JOIN`` the options of a part carry its name in front ("eagle.width"); others are the whole's.
    """
    if JOIN in name:
        return _create_hybrid(name, options or {})
    cls = drafter_class(name)
    return cls(make_config(cls.Config, options or {}, f"drafter {name!r}"))  # type: ignore[call-arg]


def _create_hybrid(name: str, options: Mapping[str, Any]) -> Drafter:
    from specdec.drafters.hybrid import HybridConfig, HybridDrafter

    names = drafter_parts(name)
    for part in names:
        drafter_class(part)  # unknown names first
    own: dict[str, Any] = {}
    of_parts: dict[str, dict[str, Any]] = {part: {} for part in names}
    for key, value in options.items():
        part, dot, option = key.partition(".")
        if not dot:
            own[key] = value
        elif part in of_parts:
            of_parts[part][option] = value
        else:
            raise ValueError(unknown(f"part of drafter {name!r} in option {key!r}:", part, of_parts))
    for key in own:
        if key not in HybridConfig.__dataclass_fields__:
            choices = HybridConfig.__dataclass_fields__
            raise ValueError(
                f"{unknown(f'option of drafter {name!r}', key, choices)}; options of a part carry its name in front: "
                f"{names[-1]}.{key}"
            )
    config = make_config(HybridConfig, own, f"drafter {name!r}")
    parts = []
    for part, values in of_parts.items():
        try:
            parts.append(create_drafter(part, values))
        except ValueError as error:
            raise ValueError(f"{error} (in {name!r} options of this part are given as {part}.NAME=VALUE)") from error
    return HybridDrafter(parts, config)


def check_verifier(name: str) -> None:
    """Raise ValueError where no acceptance policy goes by the name; "auto" is allowed."""
    names = [*verifier_names(), "auto"]
    if name not in names:
        raise ValueError(unknown("verifier", name, names))


def create_verifier(name: str) -> Verifier:
    """An acceptance policy by name, with its defaults."""
    verifier: Verifier = _load("specdec.verifiers", "verifier", name)()
    return verifier


def make_config(config: type[Any], options: Mapping[str, Any], owner: str) -> Any:
    """An instance of a configuration dataclass from options, converting strings.

    Raises:
        ValueError: for an unknown option, a missing one, or a value that is not of the option's type.
    """
    hints = typing.get_type_hints(config)
    for name in options:
        if name not in hints:
            raise ValueError(unknown(f"option of {owner}", name, hints))
    required = [f.name for f in fields(config) if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in options]
    if missing:
        raise ValueError(f"{owner} needs {', '.join(missing)}: -o {missing[0]}=...")
    return config(**{name: _convert(value, hints[name], name) for name, value in options.items()})


def _convert(text: Any, hint: Any, name: str) -> Any:
    """Read an option given as text; other values pass."""
    if not isinstance(text, str):
        return text
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if type(None) in typing.get_args(hint) and text.lower() == "none":
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise ValueError(unknown(f"value of {name}", text, typing.get_args(hint)))
        return text
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() in ("true", "1", "yes")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"{name} must be of type {hint.__name__}, got {text!r}") from None
    return text
