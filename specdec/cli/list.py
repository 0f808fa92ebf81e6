"""``specdec list``: what drafters, acceptance policies and models there are."""

from __future__ import annotations

import inspect
import json
import re
import typing
from dataclasses import MISSING, Field, fields
from typing import Any

import click


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(as_json: bool) -> None:
    """Show drafters with their options, acceptance policies and model aliases."""
    from specdec.model_files import ALIASES
    from specdec.registry import AUTO_DRAFTER, JOIN, drafter_names, verifier_names

    drafters = {name: describe_drafter(name) for name in drafter_names()}
    verifiers = {name: describe_verifier(name) for name in verifier_names()}
    models = {alias: str(source) for alias, source in ALIASES.items()}
    hybrid = describe_drafter(JOIN)
    if as_json:
        document = {
            "auto_drafter": AUTO_DRAFTER,
            "drafters": drafters,
            "hybrid": hybrid,
            "verifiers": verifiers,
            "models": models,
        }
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(
        "Drafters (--drafter NAME -o OPTION=VALUE); auto is the best whose weights ship for the model, else "
        f"{AUTO_DRAFTER}"
    )
    for name, about in drafters.items():
        click.echo(f"  {name:<12} {about['summary']}")
        for option, detail in about["options"].items():
            click.echo(f"      {option}={detail['default']}  {detail['help']}")
    click.echo(f"  {f'A{JOIN}B':<12} {hybrid['summary']}")
    click.echo(
        f"      names joined by {JOIN!r}, such as suffix{JOIN}eagle; a part's options carry its name: -o eagle.width=3"
    )
    for option, detail in hybrid["options"].items():
        click.echo(f"      {option}={detail['default']}  {detail['help']}")
    click.echo("\nVerifiers (--verifier NAME)")
    for name, about in verifiers.items():
        kept = "unknown" if about["lossless"] is None else "lossless" if about["lossless"] else "lossy"
        click.echo(f"  {name:<12} {kept}: {about['summary']}")
    click.echo("\nModels (--model NAME, a folder, or a hub id)")
    for alias, source in models.items():
        click.echo(f"  {alias:<12} {source}")


def describe_drafter(name: str) -> dict[str, Any]:
    """Summary and options of a drafter; one that cannot be imported says why."""
    from specdec.registry import drafter_class

    try:
        cls = drafter_class(name)
    except Exception as error:  # somebody else's plugin must not take the others down
        return {"summary": f"cannot be imported: {type(error).__name__}: {error}", "options": {}}
    helps = attribute_docs(cls.Config)
    hints = typing.get_type_hints(cls.Config)
    options = {
        option.name: {
            "type": getattr(hints[option.name], "__name__", str(hints[option.name])),
            "default": default_of(option),
            "help": helps.get(option.name, ""),
        }
        for option in fields(cls.Config)
    }
    return {"summary": first_sentence(cls), "options": options}


def describe_verifier(name: str) -> dict[str, Any]:
    """Summary of an acceptance policy and whether it is lossless, None where it cannot be imported."""
    from specdec.registry import create_verifier

    try:
        verifier = create_verifier(name)
    except Exception as error:
        return {"summary": f"cannot be imported: {type(error).__name__}: {error}", "lossless": None}
    return {"summary": first_sentence(type(verifier)), "lossless": verifier.lossless}


def default_of(option: Field[Any]) -> Any:
    """An option's default as a plain value; "required" where there is none."""
    value = option.default
    if option.default_factory is not MISSING:
        value = option.default_factory()
    if value is MISSING:
        return "required"
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def first_sentence(cls: type[Any]) -> str:
    """A class's docstring up to the end of its first sentence."""
    paragraph = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[A-Z])", paragraph)[0]


def attribute_docs(cls: type[Any]) -> dict[str, str]:
    """What the ``Attributes:`` sections of a class and its bases say of each attribute."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
        found.update({name: " ".join(text.split()) for name, text in entries})
    return found
