"""The files that benchmarks write: seen to before anything is loaded, and gone on with after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from specdec.cli.console import note


def check_outputs(*paths: Path | None, resume: bool = False) -> None:
    """Raise ValueError where a file's folder is not there, or where there is none to resume the first one from."""
    if resume and paths[0] is None:
        raise ValueError("--resume needs --json, the file the interrupted run was to write")
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {str(path.absolute().parent)!r} to write {path.name!r} to")


@contextmanager
def refused() -> Iterator[None]:
    """End with a message where texts differ that must not."""
    from specdec.benchmarks.agreement import AgreementError

    try:
        yield
    except AgreementError as error:
        raise click.ClickException(f"refused: {error}") from error


@contextmanager
def resumable(json_path: Path | None) -> Iterator[None]:
    """The same, and say of an interrupted run how it goes on, and of one that fails why."""
    try:
        with refused():
            yield
    except KeyboardInterrupt:
        if json_path is not None:
            note("interrupted; the same command with --resume goes on")
        raise
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
