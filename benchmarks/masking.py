"""Published results say nothing of where files lie on the machine that made them: paths are cut to their last part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# An absolute path, or one from the home folder. What stands before keeps addresses ("https://a/b"), relative paths,
# fractions ("tokens/s") and closing tags as they are.
_PATH = re.compile(r"""(?<![\w:/.~<\\-])(?:~?(?:/[^\s/:;,'"`()<>|\\]+)+/?|[A-Za-z]:[\\/][^\s:;,'"`()<>|]+)""")


def masked(value: Any) -> Any:
    """A JSON value in which every absolute path within a text is cut to its last part; keys stay as they are."""
    if isinstance(value, str):
        return _PATH.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], value)
    if isinstance(value, Mapping):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value


def masked_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line in which absolute paths, values of ``name=path`` included, are cut to their last part."""
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if Path(argument).is_absolute():
            found.append(Path(argument).name)
        elif equals and Path(value).is_absolute():
            found.append(f"{name}={Path(value).name}")
        else:
            found.append(str(masked(argument)))
    return found
