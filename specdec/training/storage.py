"""Errors of the disk in one sentence, and JSON files that must be whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing to ``path`` into a ValueError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot write {path}: {reason}; what was finished before is kept: make room and run the same command again"
        ) from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: naming the file and the remedy where it cannot be read or is no JSON object.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} is damaged (no JSON object): {remedy}")
    return document


def to_json(document: Any) -> str:
    """A JSON document as the files of this package hold it."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
