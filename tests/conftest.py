"""Options of the test run, and what holds for every test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of MT-Bench is compared with ``model.generate``; ``--mt-bench-questions 10 --mt-bench-tokens 128``."""
    parser.addoption("--mt-bench-questions", type=int, default=2, help="first turns compared (default 2)")
    parser.addoption("--mt-bench-tokens", type=int, default=32, help="new tokens per question (default 32)")
    parser.addoption("--all-kernels", action="store_true", help="compile the Triton kernels in every configuration")


def pytest_collection_finish() -> None:
    """Collections leave alone what imports made, a million objects: benchmarks collect before each text."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models run fastest on one thread, on a busy machine by far; the real model has them all."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("real_model") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
