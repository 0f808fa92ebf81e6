"""A tiny random Llama with a byte-level tokenizer, saved as a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_chat import TEMPLATE, Invoke, make_model, make_tokenizer

from specdec.cli import main


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
