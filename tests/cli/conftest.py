"""A tiny random Llama with a byte-level tokenizer, saved as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_chat import TEMPLATE, Invoke, make_model, make_tokenizer

from specdec.cli import main


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a chat template."""
    return save(tmp_path_factory.mktemp("chat_model"), TEMPLATE)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model without a chat template."""
    return save(tmp_path_factory.mktemp("base_model"), None)


def save(folder: Path, template: str | None) -> str:
    """Save model and tokenizer; the folder as text."""
    tokenizer = make_tokenizer(template)
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def invoke() -> Invoke:
    """Run ``specdec`` in this process."""

    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, list(arguments), input=stdin)

    return run
